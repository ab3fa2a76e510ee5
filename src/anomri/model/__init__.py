"""A trained model at work: its folder on disk, inference, the detection it makes in one scan, and
that detection's lesions.

`detector.Detector` is the way in.
"""
