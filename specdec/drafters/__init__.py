"""Drafters: whatever proposes tokens for the target to check."""

from specdec.drafters.base import Drafter, DrafterTraits, DraftSession, StatelessSession, require_drafter
from specdec.drafters.dynamic import DynamicTreeDrafter
from specdec.drafters.early_exit import EarlyExitDrafter
from specdec.drafters.lookup import PromptLookupDrafter
from specdec.drafters.merged import MergedDrafter
from specdec.drafters.model import ModelDrafter
from specdec.drafters.quantised_self import QuantisedSelfDrafter
from specdec.drafters.suffix import SuffixDrafter
from specdec.drafters.suffix_memory import SuffixMemory
from specdec.drafters.synthetic import SyntheticDrafter
from specdec.drafters.translated import TranslatedDrafter

__all__ = [
    "DraftSession", "Drafter", "DrafterTraits", "DynamicTreeDrafter", "EarlyExitDrafter", "MergedDrafter",
    "ModelDrafter", "PromptLookupDrafter", "QuantisedSelfDrafter", "StatelessSession", "SuffixDrafter",
    "SuffixMemory", "SyntheticDrafter", "TranslatedDrafter", "require_drafter",
]  # fmt: skip
