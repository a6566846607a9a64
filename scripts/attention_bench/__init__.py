"""Parts of `scripts.bench_attention`."""
