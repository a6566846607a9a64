"""Attention over dense and packed tensors, forward and backward, for training and prefill."""
