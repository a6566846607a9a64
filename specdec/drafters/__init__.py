"""Drafters: everything that proposes tokens."""

from specdec.drafters.base import Drafter, DraftContext, DraftSession
from specdec.drafters.model import ModelDrafter

__all__ = ["DraftContext", "DraftSession", "Drafter", "ModelDrafter"]
