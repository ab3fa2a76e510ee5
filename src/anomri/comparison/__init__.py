"""Methods and settings side by side: jobs that train and evaluate them, and their report."""
