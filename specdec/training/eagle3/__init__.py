"""Training EAGLE-3 drafters by training-time test."""
