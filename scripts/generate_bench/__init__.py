"""Parts of `scripts.bench_generate`."""
