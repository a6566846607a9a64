"""Kinds of drafters by name, and the drafter that a folder or repository holds; packages add kinds by entry points.

A package lists in its metadata, under `specdec.drafters`, `NAME = "module:VALUE"` with a `DrafterKind`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any

from transformers import PretrainedConfig

from specdec.drafters.assistant import MODEL_TYPES, make_assistant
from specdec.drafters.base import Drafter
from specdec.drafters.block.loading import is_block, make_block
from specdec.drafters.dynamic import DynamicTreeDrafter
from specdec.drafters.eagle3.loading import is_eagle3, make_eagle3
from specdec.drafters.early_exit import EarlyExitDrafter
from specdec.drafters.lookup import PromptLookupDrafter
from specdec.drafters.model import ModelDrafter
from specdec.drafters.mtp.drafter import make_mtp
from specdec.drafters.quantised_self import QuantisedSelfDrafter
from specdec.drafters.suffix import SuffixDrafter
from specdec.loading import load_model
from specdec.model.runner import ModelRunner


@dataclass(frozen=True, slots=True)
class DrafterKind:
    """A kind of drafter.

    about: one line of help.
    make: `make(target, path, **options)` returns the drafter; `path` is a folder or hub id, None where none was given.
    options: the names of its options, with the type of each.
    recognises: whether a folder or repository with this config.json holds such a drafter.
    """

    about: str
    make: Callable[..., Drafter]
    options: Mapping[str, type] = field(default_factory=dict)
    recognises: Callable[[Mapping[str, Any]], bool] = lambda config: False


def _with_model(make: Callable[..., Drafter]) -> Callable[..., Drafter]:
    def made(target: ModelRunner, path: str | None, **options) -> Drafter:
        if path is None:
            raise ValueError("a draft model needs its folder or hub id")
        return make(load_model(path, device=target.device), **options)

    return made


def _alone(make: Callable[..., Drafter]) -> Callable[..., Drafter]:
    def made(target: ModelRunner, path: str | None, **options) -> Drafter:
        if path is not None:
            raise ValueError(f"path={path} means nothing to a drafter without a model of its own")
        return make(target, **options)

    return made


BUILT_IN = {
    "model": DrafterKind("a draft model, in chains", _with_model(ModelDrafter), {"num_tokens": int}),
    "dynamic": DrafterKind(
        "a draft model, in trees that grow where it is sure", _with_model(DynamicTreeDrafter),
        {"num_tokens": int, "depth": int, "width": int},
    ),
    "block": DrafterKind(
        "a DFlash, DFlash2, DSpark, Domino or JetSpec drafter: chains, or with nodes=N best-first trees", make_block,
        {"num_tokens": int, "nodes": int, "depth": int, "width": int, "children": int, "candidates": int,
         "confidence": float}, is_block,
    ),
    "eagle3": DrafterKind(
        "an EAGLE-3 or P-EAGLE drafter: chains, or with nodes=N trees that grow where it is sure", make_eagle3,
        {"num_tokens": int, "nodes": int, "depth": int, "width": int}, is_eagle3,
    ),
    "lookup": DrafterKind(
        "what followed the last tokens earlier in the text",
        _alone(lambda target, **options: PromptLookupDrafter(**options)),
        {"length": int, "candidates": int, "max_ngram": int, "min_ngram": int, "num_tokens": int},
    ),
    "suffix": DrafterKind(
        "what followed the longest match of the text's end, weighed by counts",
        _alone(lambda target, **options: SuffixDrafter(**options)),
        {"num_tokens": int, "max_match": int, "factor": float, "min_probability": float, "occurrences": int},
    ),
    "early-exit": DrafterKind(
        "the target's first layers",
        _alone(lambda target, layers, **options: EarlyExitDrafter(target, layers, **options)),
        {"layers": int, "num_tokens": int},
    ),
    "mtp": DrafterKind(
        "the target's own layers for further tokens: of several one a depth, or with number=N that one at all depths",
        make_mtp, {"num_tokens": int, "number": int},
    ),
    "gemma4-assistant": DrafterKind(
        "Gemma 4's assistant, which reads the target's pages and has no cache", make_assistant, {"num_tokens": int},
        lambda config: config.get("model_type") in MODEL_TYPES,
    ),
    "quantised-self": DrafterKind(
        "the target's own weights, rounded to 4 or 8 bits",
        _alone(lambda target, **options: QuantisedSelfDrafter(target, **options)),
        {"bits": int, "group": int, "num_tokens": int},
    ),
}  # fmt: skip


def drafter_kinds() -> dict[str, DrafterKind]:
    """All kinds of drafters by name: the built-in ones and those of installed packages."""
    return BUILT_IN | installed("specdec.drafters", DrafterKind)


def installed(group: str, kind: type) -> dict[str, Any]:
    """The values of type `kind` that installed packages list under `group`, by name."""
    found = {}
    for point in entry_points(group=group):
        found[point.name] = point.load()
        if not isinstance(found[point.name], kind):
            raise TypeError(f"the entry point {point.value} of {group} must be a {kind.__name__}")
    return found


def kind_of(place: str, kinds: Mapping[str, DrafterKind]) -> str:
    """The kind whose files are in the folder or repository `place`; a draft model unless another recognises it."""
    try:
        config, _ = PretrainedConfig.get_config_dict(place)
    except (OSError, ValueError):
        config = {}  # loading it says what is wrong
    known = next((name for name, kind in kinds.items() if kind.recognises(config)), None)
    if known is None and "speculators_model_type" in config:
        raise ValueError(
            f"{place}: speculators_model_type is {config['speculators_model_type']!r}, which no kind of drafter here "
            f"reads; kinds: {', '.join(kinds)}"
        )
    return known or "model"
