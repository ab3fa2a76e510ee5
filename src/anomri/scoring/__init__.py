"""Pure functions from slices and reconstructions to anomaly scores, and from scores to metrics."""
