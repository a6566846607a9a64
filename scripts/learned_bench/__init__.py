"""The parts of `scripts.bench_learned`."""
