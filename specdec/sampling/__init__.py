"""Logits processors, draws from distributions, and their random numbers."""
