"""Medusa heads: several output heads on one backbone that guess the next tokens at once (Cai et al. 2024).

Heads, their checkpoints, loss, calibration, drafter and generator are here; the training loop comes next.
"""

from medusa.calibration import calibrated_tree, head_accuracies
from medusa.drafter import MedusaDrafter, MedusaGenerator
from medusa.heads import MedusaConfig, MedusaHeads
from medusa.losses import medusa_loss

__all__ = ["MedusaConfig", "MedusaDrafter", "MedusaGenerator", "MedusaHeads", "calibrated_tree", "head_accuracies", "medusa_loss"]
