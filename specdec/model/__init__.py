"""A transformers model bound to a cache: the runner, its CUDA graphs, and the fusions that it applies."""
