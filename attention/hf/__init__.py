"""The seam to transformers."""
