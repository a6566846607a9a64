"""The generators, and the same for transformers' own `generate`."""
