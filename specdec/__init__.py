"""Exact speculative decoding for transformers models: generators, drafters, acceptance rules, metrics."""

from specdec._guard import refuse_foreign_packages

refuse_foreign_packages()

from specdec.acceptance import Acceptance, AcceptanceRule, greedy, rejection
from specdec.draft import Draft
from specdec.drafters import DraftContext, Drafter, DraftSession, ModelDrafter
from specdec.generators import AutoregressiveGenerator, GenerationOutput, SpeculativeGenerator
from specdec.hf import custom_generate
from specdec.loading import load_model
from specdec.runner import ModelRunner, RunnerOutput
from specdec.stats import GenerationStats, RoundStats
from specdec.tiny_pair import TinyPair, load_tiny_pair
from specdec.tree import TokenTree

__all__ = [
    "Acceptance", "AcceptanceRule", "AutoregressiveGenerator", "Draft", "DraftContext", "DraftSession", "Drafter", "GenerationOutput",
    "GenerationStats", "ModelDrafter", "ModelRunner", "RoundStats", "RunnerOutput", "SpeculativeGenerator", "TinyPair", "TokenTree",
    "custom_generate", "greedy", "load_model", "load_tiny_pair", "rejection",
]  # fmt: skip
