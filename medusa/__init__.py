"""Medusa heads: several output heads on one backbone that guess the next tokens at once (Cai et al. 2024).

Heads, their checkpoints, the drafter and the generator are here; training and calibration come next.
"""

from medusa.drafter import MedusaDrafter, MedusaGenerator
from medusa.heads import MedusaConfig, MedusaHeads

__all__ = ["MedusaConfig", "MedusaDrafter", "MedusaGenerator", "MedusaHeads"]
