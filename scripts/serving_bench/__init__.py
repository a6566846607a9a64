"""Parts of `scripts.bench_serving`."""
