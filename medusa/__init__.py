"""Medusa heads: several output heads on one backbone that guess the next tokens at once (Cai et al. 2024).

The heads, their training and their drafter are not here yet; this release lays the floors they stand on.
"""

__all__: list[str] = []
