"""Block drafters from files: in the format of the speculators library, or with a flat config (z-lab, SpecForge, …)."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from specdec.drafters.base import Drafter
from specdec.drafters.block.config import BlockConfig
from specdec.drafters.block.drafter import BlockDrafter
from specdec.drafters.block.flat_format import read_flat
from specdec.drafters.block.flat_kinds import FROM_ANCHOR
from specdec.drafters.block.growth import Growth
from specdec.drafters.block.module import BlockModel
from specdec.drafters.block.speculators_format import KINDS, read_speculators
from specdec.drafters.files.loading import read_drafter
from specdec.drafters.files.reading import Reading
from specdec.drafters.files.weights import fill, lent, require_sizes, target_shape
from specdec.model.runner import ModelRunner


def is_block(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a block drafter."""
    if "speculators_model_type" in config:
        return config["speculators_model_type"] in KINDS
    return "dflash_config" in config or any(name in FROM_ANCHOR for name in config.get("architectures") or ())


def load_block(target: ModelRunner, name: str | Path, ignore: Collection[str] = (),
               dtype: torch.dtype | None = None) -> tuple[BlockModel, Reading[BlockConfig]]:  # fmt: skip
    """The network in a folder or on the hub, on the target's device, and what its file says.

    ignore: fields of config.json that may be unknown.
    dtype: of the weights (None: the target's).

    Raises FileNotFoundError for missing files, ValueError naming the field or weight that is missing, left over, of
    another shape or quantised, and for a drafter of another target."""
    shape = target_shape(target)

    def build(reading: Reading[BlockConfig]) -> BlockModel:
        require_sizes(reading.config.hidden_size, reading.config.target_vocab_size, shape)
        with torch.device("meta"):
            model = BlockModel(reading.config, reading.draft_tokens)
        fill(model, reading.weights, reading.draft_tokens)
        return model

    model, reading = read_drafter(name, shape, read_speculators, read_flat, build, ignore)
    model.about = "\n".join([f"block drafter {name}", *reading.notes])
    model.borrow(*lent(target, not reading.config.own_embeddings, reading.config.output == "target"))
    return model.to(target.dtype if dtype is None else dtype).to(target.device).eval(), reading


def make_block(target: ModelRunner, path: str | None, num_tokens: int | None = None, nodes: int | None = None,
               depth: int | None = None, width: int | None = None, children: int | None = None,
               candidates: int | None = None, ignore: Collection[str] = (), **options: Any) -> Drafter:  # fmt: skip
    """The drafter in a folder or on the hub: a chain of `num_tokens` (None: what its file says, or all), or trees.

    nodes: in place of a chain, of best-first trees, as deep as `depth` (None: a block), with `width`, `children` and
        `candidates` as in `Growth`; with none of these as in `Growth.fast`. JetSpec's trees have `children` alone.
    options: see `BlockDrafter`.

    Raises ValueError without a path, and for numbers of a tree without nodes."""
    if path is None:
        raise ValueError("a block drafter needs its folder or hub id")
    limits = width, children, candidates
    if nodes is None and (depth, *limits) != (None,) * 4:
        raise ValueError(
            f"depth, width, children and candidates are those of a tree of some nodes, got {(depth, *limits)} without"
        )
    model, reading = load_block(target, path, ignore)
    slots = model.config.num_slots
    if nodes is None:
        return BlockDrafter(model, num_tokens or min(reading.num_tokens or slots, slots), **options)
    deep = slots if depth is None else depth
    growth = Growth.fast(nodes, deep) if limits == (None,) * 3 else Growth(nodes, deep, *limits)
    return BlockDrafter(model, growth=growth, **options)
