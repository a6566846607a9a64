"""Kinds of drafters and of trainers that commands find by name; packages add theirs by entry points.

A package lists in its metadata, under `specdec.drafters`, `NAME = "module:VALUE"` with a `DrafterKind`, and under
`specdec.trainers` the same with a `TrainerKind`."""

import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any

from transformers import PretrainedConfig

from specdec.cli.command import Command
from specdec.drafters import (
    Drafter,
    DynamicTreeDrafter,
    EarlyExitDrafter,
    ModelDrafter,
    PromptLookupDrafter,
    QuantisedSelfDrafter,
)
from specdec.drafters.base import require_drafter
from specdec.loading import load_model, local_folder
from specdec.model.runner import ModelRunner

SPEC = re.compile(r"(?P<place>.+?)(?::(?P<options>[\w-]+=[^,]*(?:,[\w-]+=[^,]*)*))?")


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


@dataclass(frozen=True, slots=True)
class TrainerKind:
    """A kind of drafter that can be trained: the commands, with `about` in one line.

    calibrate: measures what was trained, and what follows for decoding (None: there is nothing to calibrate).
    """

    about: str
    train: Command
    calibrate: Command | None = None


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
    "lookup": DrafterKind(
        "what followed the last tokens earlier in the text",
        _alone(lambda target, **options: PromptLookupDrafter(**options)),
        {"length": int, "candidates": int, "max_ngram": int, "min_ngram": int, "num_tokens": int},
    ),
    "early-exit": DrafterKind(
        "the target's first layers",
        _alone(lambda target, layers, **options: EarlyExitDrafter(target, layers, **options)),
        {"layers": int, "num_tokens": int},
    ),
    "quantised-self": DrafterKind(
        "the target's own weights, rounded to 4 or 8 bits",
        _alone(lambda target, **options: QuantisedSelfDrafter(target, **options)),
        {"bits": int, "group": int, "num_tokens": int},
    ),
}  # fmt: skip


def drafter_kinds() -> dict[str, DrafterKind]:
    """All kinds of drafters by name: the built-in ones and those of installed packages."""
    return BUILT_IN | _installed("specdec.drafters", DrafterKind)


def trainer_kinds() -> dict[str, TrainerKind]:
    """All kinds of trainers of installed packages by name."""
    return _installed("specdec.trainers", TrainerKind)


def _installed(group: str, kind: type) -> dict[str, Any]:
    found = {}
    for point in entry_points(group=group):
        found[point.name] = point.load()
        if not isinstance(found[point.name], kind):
            raise TypeError(f"the entry point {point.value} of {group} must be a {kind.__name__}")
    return found


def describe_drafters() -> str:
    """The kinds with their options, for a command's help."""
    shown = [
        f"  {name}{':' if kind.options else ''}{','.join(f'{option}=N' for option in kind.options)}\n      {kind.about}"
        for name, kind in drafter_kinds().items()
    ]
    places = "a folder or hub id, KIND[:option=value,…] or MODULE:FUNCTION, which gets the target's ModelRunner"
    return f"A drafter is {places}. Every kind with a model takes path=FOLDER too. Kinds:\n" + "\n".join(shown)


def make_drafter(spec: str, target: ModelRunner, **defaults: Any) -> Drafter:
    """The drafter that `spec` names: a folder or hub id, `KIND[:option=value,…]`, or `MODULE:FUNCTION`.

    `defaults` are options for kinds that have them. Raises ValueError naming what cannot be used."""
    match = SPEC.fullmatch(spec)
    if match is None:
        raise ValueError("a drafter must be named, got ''")
    place = match["place"]
    options: dict[str, Any] = dict(pair.split("=", 1) for pair in (match["options"] or "").split(",") if pair)
    kinds, path = drafter_kinds(), options.pop("path", None)
    module, colon, function = place.partition(":")
    if place not in kinds and colon and re.fullmatch(r"[\w.]+", module) and function.isidentifier():
        return _from_function(spec, module, function, target, options)
    if place not in kinds and path is not None:
        raise ValueError(f"--drafter {spec}: there is no kind {place}; there are {', '.join(kinds)}")
    if place not in kinds and "/" not in place and local_folder(place) is None:
        hub = f"a hub id without an owner is model:path={place}"
        raise ValueError(f"--drafter {spec}: there is no folder and no kind {place}; kinds: {', '.join(kinds)}; {hub}")
    if place not in kinds:
        place, path = _kind_of(place, kinds), place
    kind = kinds[place]
    for name, text in options.items():
        if name not in kind.options:
            known = ", ".join(kind.options) or "none"
            raise ValueError(f"--drafter {spec}: {place} has no option {name}; there are {known}")
        try:
            options[name] = kind.options[name](text)
        except ValueError:
            raise ValueError(
                f"--drafter {spec}: {name} must be of type {kind.options[name].__name__}, got {text!r}"
            ) from None
    fitting = {name: value for name, value in defaults.items() if name in kind.options and value is not None}
    try:
        return kind.make(target, path, **fitting | options)
    except TypeError as error:
        raise ValueError(f"--drafter {spec}: {error}") from error


def _kind_of(place: str, kinds: Mapping[str, DrafterKind]) -> str:
    """The kind whose files are in the folder or repository `place`; a draft model unless another recognises it."""
    try:
        config, _ = PretrainedConfig.get_config_dict(place)
    except (OSError, ValueError):
        config = {}  # loading it says what is wrong
    return next((name for name, kind in kinds.items() if kind.recognises(config)), "model")


def _from_function(spec: str, module: str, function: str, target: ModelRunner, options: dict) -> Drafter:
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--drafter {spec}: {error}") from error
    drafter = make(target, **options)
    require_drafter(drafter)
    return drafter
