"""The methods, one file each, and their networks, noise, augmentation and synthetic anomalies.

`base.Method` says what a method must offer; `registry` builds one by its name, and is where a new
one is made known.
"""
