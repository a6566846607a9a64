"""Medusa heads: several output heads on one backbone that guess the next tokens at once (Cai et al. 2024)."""

from medusa.calibration import calibrated_tree, head_ranks, load_tree
from medusa.config import MedusaConfig
from medusa.drafter import MedusaDrafter, MedusaGenerator
from medusa.heads import MedusaHeads
from medusa.losses import medusa_loss
from medusa.settings import TrainingSettings
from medusa.training import train_medusa

__all__ = [
    "MedusaConfig",
    "MedusaDrafter",
    "MedusaGenerator",
    "MedusaHeads",
    "TrainingSettings",
    "calibrated_tree",
    "head_ranks",
    "load_tree",
    "medusa_loss",
    "train_medusa",
]
