"""Training: the packed cohort, the loop (`train.fit`), the choice of score and thresholds on healthy scans.

`train.train` is the way in.
"""
