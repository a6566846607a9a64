"""Block drafters (DFlash, DSpark): one pass predicts all slots ahead, out of which chains and trees grow."""
