"""Fused operations of a model and their kernels."""
