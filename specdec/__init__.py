"""Exact speculative decoding for transformers models: generators, drafters, acceptance rules, metrics."""

from specdec._guard import DISTRIBUTION, refuse_foreign_packages

refuse_foreign_packages()

from importlib.metadata import PackageNotFoundError, version

from specdec.acceptance import Acceptance, AcceptanceRule, Typical, greedy, lossless, rejection
from specdec.auditing.audit import audit
from specdec.drafters import (
    Drafter,
    DrafterTraits,
    DraftSession,
    DynamicTreeDrafter,
    EarlyExitDrafter,
    MergedDrafter,
    ModelDrafter,
    PromptLookupDrafter,
    QuantisedSelfDrafter,
    StatelessSession,
    SuffixDrafter,
    SuffixMemory,
    SyntheticDrafter,
    TranslatedDrafter,
)
from specdec.drafters.check import check_drafter
from specdec.drafters.loading import load_drafter
from specdec.engine import Engine, Handle
from specdec.generation.custom_generate import custom_generate
from specdec.generation.generators import AutoregressiveGenerator, GenerationOutput, SpeculativeGenerator
from specdec.loading import load_model
from specdec.model.runner import ModelRunner, RunnerOutput
from specdec.model.streaming import stream_layers
from specdec.planning.costs import measure_costs
from specdec.planning.theory import optimal_length
from specdec.planning.tree_search import optimal_tree
from specdec.report.stats import GenerationStats, RoundStats
from specdec.requests.batch import Batch
from specdec.requests.rows import Rows
from specdec.tiny_pair import TinyPair, load_tiny_pair
from specdec.trees.draft import Draft
from specdec.trees.tree import TokenTree

try:
    __version__ = version(DISTRIBUTION)
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"

__all__ = [
    "Acceptance", "AcceptanceRule", "AutoregressiveGenerator", "Batch", "Draft", "DraftSession", "Drafter",
    "DrafterTraits", "DynamicTreeDrafter", "EarlyExitDrafter", "Engine", "GenerationOutput", "GenerationStats",
    "Handle", "MergedDrafter", "ModelDrafter", "ModelRunner", "PromptLookupDrafter", "QuantisedSelfDrafter",
    "RoundStats", "Rows", "RunnerOutput", "SpeculativeGenerator", "StatelessSession", "SuffixDrafter", "SuffixMemory",
    "SyntheticDrafter", "TinyPair", "TokenTree", "TranslatedDrafter", "Typical", "audit", "check_drafter",
    "custom_generate", "greedy", "load_drafter", "load_model", "load_tiny_pair", "lossless", "measure_costs",
    "optimal_length", "optimal_tree", "rejection", "stream_layers",
]  # fmt: skip
