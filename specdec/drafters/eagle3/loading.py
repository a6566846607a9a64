"""EAGLE-3 drafters from files: in the format of the speculators library, or with a flat Llama config (SGLang's)."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from specdec.drafters.base import Drafter
from specdec.drafters.eagle3.config import Eagle3Config
from specdec.drafters.eagle3.drafter import Eagle3Drafter
from specdec.drafters.eagle3.flat_format import read_flat
from specdec.drafters.eagle3.module import Eagle3Model
from specdec.drafters.eagle3.speculators_format import KINDS, read_speculators
from specdec.drafters.files.loading import read_drafter
from specdec.drafters.files.reading import Reading, TargetShape
from specdec.drafters.files.weights import fill, lent, require_sizes, target_shape
from specdec.model.runner import ModelRunner


def is_eagle3(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of an EAGLE-3 or P-EAGLE drafter."""
    if "speculators_model_type" in config:
        return config["speculators_model_type"] in KINDS
    named = any("eagle3" in str(name).lower() for name in config.get("architectures") or ())
    return named or "draft_vocab_size" in config or "eagle_config" in config


def load_eagle3(target: ModelRunner, name: str | Path, read: Mapping[str, Any] | None = None,
                ignore: Collection[str] = (),
                dtype: torch.dtype | None = None) -> tuple[Eagle3Model, Reading[Eagle3Config]]:  # fmt: skip
    """The network in a folder or on the hub, on the target's device, and what its file says.

    read: fields of `Eagle3Config` that the format reads wrongly, as `specdec.check_drafter` finds out.
    ignore: fields of config.json that may be unknown.
    dtype: of the weights (None: the target's).

    Raises FileNotFoundError for missing files, ValueError naming the field or weight that is missing, left over, of
    another shape or quantised, and for a drafter of another target."""
    shape = target_shape(target)

    def build_for(reading: Reading[Eagle3Config]) -> Eagle3Model:
        require_target(reading.config, shape)
        return build(reading)

    model, reading = read_drafter(name, shape, read_speculators, read_flat, build_for, ignore)
    model.about = "\n".join([f"EAGLE-3 drafter {name}", *reading.notes])
    dtype = target.dtype if dtype is None else dtype
    model.spare = {name: weight.to(dtype).to(target.device) for name, weight in reading.spare.items()}
    borrow(model, target)
    model = model.to(dtype).to(target.device).eval()
    if read:
        model = model.read_as(**read)
        require_target(model.config, shape)
    return model, reading


def make_eagle3(target: ModelRunner, path: str | None, num_tokens: int | None = None, nodes: int | None = None,
                depth: int = 6, width: int = 10, read: Mapping[str, Any] | None = None, ignore: Collection[str] = (),
                **options: Any) -> Drafter:  # fmt: skip
    """The drafter in a folder or on the hub: a chain of `num_tokens` (None: what its file says, or 5), or trees.

    nodes: of trees that grow where it is sure, as deep as `depth` and expanding `width` nodes a level.
    read, ignore: see `load_eagle3`; options: of `Eagle3Drafter`."""
    if path is None:
        raise ValueError("an EAGLE-3 drafter needs its folder or hub id: eagle3:path=DIR")
    model, reading = load_eagle3(target, path, read, ignore)
    count = num_tokens or reading.num_tokens or 5
    if nodes is not None:
        options["dynamic"] = (nodes, depth, width)
    return Eagle3Drafter(model, count, **options)


def build(reading: Reading[Eagle3Config]) -> Eagle3Model:
    """The network of a reading, with exactly its weights. Raises ValueError naming those that do not fit."""
    with torch.device("meta"):
        model = Eagle3Model(reading.config, reading.draft_tokens)
    given = dict(reading.weights)
    if "mask_hidden" in given and given["mask_hidden"].numel() == reading.config.feature_size:
        given["mask_hidden"] = given["mask_hidden"].reshape(1, 1, -1)
    fill(model, given, reading.draft_tokens)
    return model


def borrow(model: Eagle3Model, target: ModelRunner) -> None:
    """Let a drafter read the embeddings and the output layer of its target, where it has none of its own."""
    model.borrow(*lent(target, not model.config.own_embeddings, model.config.output == "target"))


def require_target(config: Eagle3Config, target: TargetShape) -> None:
    """Raise ValueError, naming both values, for a drafter of another target."""
    require_sizes(config.target_hidden_size, config.target_vocab_size, target)
    if max(config.target_layers) > target.num_layers:
        raise ValueError(
            f"it reads the states {config.target_layers} of {target.name}, which has {target.num_layers} layers"
        )
