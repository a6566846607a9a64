"""The drafter that an option names, and kinds of trainers, which packages add by entry points.

A package lists in its metadata, under `specdec.trainers`, `NAME = "module:VALUE"` with a `TrainerKind`; kinds of
drafters are in `specdec.drafters.kinds`."""

import importlib
import re
from dataclasses import dataclass
from typing import Any

from specdec import acceptance
from specdec.acceptance import AcceptanceRule, Typical
from specdec.cli import train_block, train_eagle3, train_mtp
from specdec.cli.command import Command
from specdec.drafters.base import Drafter, require_drafter
from specdec.drafters.kinds import drafter_kinds, installed, kind_of
from specdec.loading import local_folder
from specdec.model.runner import ModelRunner

RULES: dict[str, AcceptanceRule] = {
    name: getattr(acceptance, name)
    for name in ("greedy", "lossless", "rejection", "block", "tree_iid", "tree_distinct", "tree_exact")
} | {"typical": Typical()}
SPEC = re.compile(r"(?P<place>.+?)(?::(?P<options>[\w-]+=[^,]*(?:,[\w-]+=[^,]*)*))?")


@dataclass(frozen=True, slots=True)
class TrainerKind:
    """A kind of drafter that can be trained: the commands, with `about` in one line.

    calibrate: measures what was trained, and what follows for decoding (None: there is nothing to calibrate).
    """

    about: str
    train: Command
    calibrate: Command | None = None


BUILT_IN = {
    "eagle3": TrainerKind("EAGLE-3 drafters", train_eagle3.COMMAND),
    "peagle": TrainerKind("P-EAGLE drafters, which predict a round's tokens in one pass", train_eagle3.PEAGLE),
    "mtp": TrainerKind("the target's own MTP modules, or a new one", train_mtp.COMMAND),
    "dflash": TrainerKind("DFlash drafters, which predict a block of tokens in one pass", train_block.DFLASH),
    "dspark": TrainerKind("DSpark drafters, the same with a Markov and a confidence head", train_block.DSPARK_COMMAND),
}


def trainer_kinds() -> dict[str, TrainerKind]:
    """All kinds of trainers by name: those that are built in, and those of installed packages."""
    return BUILT_IN | installed("specdec.trainers", TrainerKind)


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
        place, path = kind_of(place, kinds), place
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


def make_rule(name: str | None, option: str = "--rule") -> AcceptanceRule | None:
    """The acceptance rule of a name, or of `MODULE:NAME`; None for None. Raises ValueError naming what is none."""
    if name is None or name in RULES:
        return None if name is None else RULES[name]
    module, colon, function = name.partition(":")
    if not colon:
        raise ValueError(f"{option} must be one of {', '.join(RULES)}, or MODULE:NAME, got {name!r}")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{option} {name}: {error}") from error


def _from_function(spec: str, module: str, function: str, target: ModelRunner, options: dict) -> Drafter:
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--drafter {spec}: {error}") from error
    drafter = make(target, **options)
    require_drafter(drafter)
    return drafter
