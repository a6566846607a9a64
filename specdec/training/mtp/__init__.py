"""Training MTP modules of a target."""
