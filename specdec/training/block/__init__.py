"""Training block drafters: DFlash and DSpark."""
