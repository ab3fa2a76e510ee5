"""A cohort through a model: every case detected, recorded as finished, and written as tables or as
BIDS derivatives."""
