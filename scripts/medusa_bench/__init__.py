"""The parts of `scripts.bench_medusa`."""
