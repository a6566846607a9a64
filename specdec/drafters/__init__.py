"""Drafters: everything that proposes tokens."""

from specdec.drafters.base import DraftContext, Drafter, DraftSession
from specdec.drafters.model import ModelDrafter

__all__ = ["DraftContext", "DraftSession", "Drafter", "ModelDrafter"]
