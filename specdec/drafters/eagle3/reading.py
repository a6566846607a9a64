"""What the file of an EAGLE-3 drafter says in any format: norms of its features, its embeddings and output layer."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from specdec.drafters.files.reading import TargetShape


def feature_norm(where: str, each: bool, whole: bool) -> str:
    """Which norm the features have, as `Eagle3Config.feature_norm`. Raises ValueError for both at once."""
    if each and whole:
        raise ValueError(f"{where}: fc_norm and norm_before_fc exclude each other, got both true")
    return "each" if each else "whole" if whole else "none"


def own_parts(weights: Mapping[str, Tensor], hidden: int, full: bool, tied: bool,
              target: TargetShape) -> tuple[dict[str, Any], list[str]]:  # fmt: skip
    """Which of embeddings and output layer the file has, as fields of `Eagle3Config`, and notes.

    full: whether it drafts all tokens. tied: whether an absent output layer is the embeddings.
    Raises ValueError naming both widths where what it lacks cannot be the target's."""
    own = "embed_tokens.weight" in weights
    width = weights["embed_tokens.weight"].shape[-1] if own else target.embedding_size
    first = weights.get("layers.0.self_attn.q_proj.weight")
    read = hidden if first is None or first.ndim != 2 else first.shape[1] - hidden
    if width != read:
        whose = (
            "embed_tokens.weight has"
            if own
            else f"there is no embed_tokens.weight, and embeddings of {target.name} have"
        )
        raise ValueError(f"{whose} width {width} where the drafter's first layer reads embeddings of width {read}")
    notes = [f"embeddings: {'its own' if own else 'the target' + chr(39) + 's'}, width {width}"]
    if "lm_head.weight" in weights:
        output = "own"
    elif tied:
        output = "embeddings"
    elif not full:
        raise ValueError(
            "lm_head.weight is missing, and the output layer of a reduced vocabulary cannot be the target's"
        )
    elif target.output_size != hidden:
        raise ValueError(
            f"lm_head.weight is missing, and the output layer of {target.name} reads width {target.output_size} where "
            f"the drafter's hidden_size is {hidden}"
        )
    else:
        output = "target"
    if output != "own":
        notes.append(f"output layer: {'the target' + chr(39) + 's' if output == 'target' else 'its embeddings'}")
    return dict(embedding_size=width, own_embeddings=own, output=output), notes
