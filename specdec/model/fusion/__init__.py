"""Products, norms, rotations and gates of a model with kernels of their own."""
