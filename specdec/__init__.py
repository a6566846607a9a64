"""Exact speculative decoding for transformers models: generators, drafters, acceptance rules, metrics."""

from specdec._guard import refuse_foreign_packages

refuse_foreign_packages()

from specdec.acceptance import Acceptance, AcceptanceRule, Typical, greedy, lossless, rejection
from specdec.costs import measure_costs
from specdec.draft import Draft
from specdec.drafters import (
    DialDrafter,
    DraftContext,
    Drafter,
    DraftSession,
    DynamicTreeDrafter,
    EarlyExitDrafter,
    MergedDrafter,
    ModelDrafter,
    PromptLookupDrafter,
    TranslatedDrafter,
)
from specdec.generators import AutoregressiveGenerator, GenerationOutput, SpeculativeGenerator
from specdec.hf import custom_generate
from specdec.loading import load_model
from specdec.runner import ModelRunner, RunnerOutput
from specdec.stats import GenerationStats, RoundStats
from specdec.theory import optimal_length
from specdec.tiny_pair import TinyPair, load_tiny_pair
from specdec.tree import TokenTree
from specdec.tree_search import optimal_tree

__all__ = [
    "Acceptance", "AcceptanceRule", "AutoregressiveGenerator", "DialDrafter", "Draft", "DraftContext", "DraftSession", "Drafter",
    "DynamicTreeDrafter", "EarlyExitDrafter", "GenerationOutput", "GenerationStats", "MergedDrafter", "ModelDrafter", "ModelRunner", "PromptLookupDrafter",
    "RoundStats", "RunnerOutput", "SpeculativeGenerator", "TinyPair", "TokenTree", "TranslatedDrafter", "Typical", "custom_generate",
    "greedy", "load_model", "load_tiny_pair", "lossless", "measure_costs",
    "optimal_length", "optimal_tree", "rejection",
]  # fmt: skip
