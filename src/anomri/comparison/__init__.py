"""Methods and settings side by side: the jobs that train and evaluate them, and the report of their differences."""
