"""A demonstration without data: a synthetic cohort, and the whole method run on it."""
