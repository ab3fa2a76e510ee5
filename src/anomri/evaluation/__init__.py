"""How well anomaly maps agree with lesion labels, by patient and pooled, with intervals.

`evaluate.evaluate` is the way in; shards are joined by `merge.merge`.
"""
