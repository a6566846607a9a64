"""Linear layers whose weights are stored in 8 or 4 bits: what they hold, and products of few rows with it."""
