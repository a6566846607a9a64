"""Attention over a paged cache: the batch that describes a forward, the reference and the kernels."""
