"""The weights of a drafter's file in its network, and what the network lacks, which its target lends."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from specdec.drafters.files.reading import TargetShape
from specdec.model.runner import ModelRunner

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHOWN = 6  # names in a message


def fill(model: nn.Module, weights: Mapping[str, Tensor], draft_tokens: Tensor | None) -> None:
    """Give a network on the device "meta" exactly these weights, and its buffer `draft_tokens`.

    Raises ValueError naming weights that are missing, left over, of another shape or quantised."""
    expected = {name: value for name, value in model.state_dict().items() if name != "draft_tokens"}
    given = dict(weights)
    if missing := sorted(expected.keys() - given.keys()):
        raise ValueError(f"{len(missing)} weights are missing: {_some(missing)}")
    if left := sorted(given.keys() - expected.keys()):
        raise ValueError(f"{len(left)} weights are left over, which the config has no place for: {_some(left)}")
    for name, weight in given.items():
        if weight.dtype not in FLOATS:
            raise ValueError(f"weight {name} is {weight.dtype}: quantised weights are not read")
    wrong = [f"{name} is {list(given[name].shape)}, not {list(value.shape)}" for name, value in expected.items()
             if given[name].shape != value.shape]  # fmt: skip
    if wrong:
        raise ValueError(f"{len(wrong)} weights have another shape than the config says: {_some(wrong)}")
    tokens = {} if draft_tokens is None else {"draft_tokens": draft_tokens}
    model.load_state_dict(given | tokens, assign=True)


def lent(target: ModelRunner, embeddings: bool, output: bool) -> tuple[nn.Module | None, nn.Module | None]:
    """The embeddings and the output layer of a target, where they are wanted.

    Raises ValueError for those without a plain weight on the device."""
    found: list[Any] = [
        target.model.get_input_embeddings() if embeddings else None,
        target.model.get_output_embeddings() if output else None,
    ]
    for what, module in zip(("embeddings", "output layer"), found, strict=True):
        if module is not None and getattr(module, "weight", None) is None:
            raise ValueError(f"the drafter reads the target's {what}, a {type(module).__name__} without a plain weight")
        if module is not None and module.weight.is_meta:
            raise ValueError(f"the drafter reads the target's {what}, whose weights are offloaded")
    return found[0], found[1]


def target_shape(target: ModelRunner) -> TargetShape:
    """What a drafter's file is compared with."""
    model: Any = target.model
    config = model.config.get_text_config()
    return TargetShape(
        name=str(getattr(model.config, "_name_or_path", "")) or f"an unnamed {type(model).__name__}",
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        vocab_size=target.vocab_size,
        embedding_size=int(model.get_input_embeddings().weight.shape[-1]),
        output_size=model.get_output_embeddings().weight.shape[-1],
    )


def require_sizes(hidden_size: int, vocab_size: int, target: TargetShape) -> None:
    """Raise ValueError, naming both values, for a drafter that was made for a target of other sizes."""
    for what, ours, theirs in (
        ("hidden size (target_hidden_size)", hidden_size, target.hidden_size),
        ("vocabulary (vocab_size)", vocab_size, target.vocab_size),
    ):
        if ours != theirs:
            raise ValueError(f"it was made for another target: {what} is {ours} for it and {theirs} for {target.name}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (" …" if len(names) > SHOWN else "")
