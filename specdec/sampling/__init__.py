"""Logits processors, draws from distributions, and the random numbers behind them."""
