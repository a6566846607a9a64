"""The generators, and an adapter for transformers' own `generate`."""
