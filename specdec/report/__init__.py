"""Statistics, plots, tables."""
