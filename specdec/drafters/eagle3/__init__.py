"""EAGLE-3: a drafter with a cache of its own that reads the target's hidden states."""
