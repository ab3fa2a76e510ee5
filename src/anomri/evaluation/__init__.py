"""How well maps agree with labels, patient by patient and pooled, with intervals.

`evaluate.evaluate` is the way in.
"""
