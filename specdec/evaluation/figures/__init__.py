"""Figures of results: what each shows, from the numbers in result files alone."""
