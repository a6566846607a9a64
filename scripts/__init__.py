"""Command-line entry points: training of the shipped pair and benchmarks. No algorithm lives here."""
