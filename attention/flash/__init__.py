"""Attention over dense tensors, forwards and backwards: training's."""
