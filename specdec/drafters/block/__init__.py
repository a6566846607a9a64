"""Block drafters: one pass over a block of mask tokens, fed with the target's hidden states (DFlash, DSpark)."""
