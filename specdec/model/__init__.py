"""A transformers model bound to a cache, and what is done to it before it runs."""
