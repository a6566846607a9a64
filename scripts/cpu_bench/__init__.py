"""Parts of `scripts.bench_cpu`."""
