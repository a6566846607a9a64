"""A wide model for experiments with quantised weights."""
