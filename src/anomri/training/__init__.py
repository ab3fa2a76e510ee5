"""Training: the packed cohort, the loop (`train.fit`), the choice of score and thresholds.

`train.train` is the way in.
"""
