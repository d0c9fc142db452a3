"""The number of workers of a running model."""
