"""What the file of a block drafter says in any format: its weights by our names, what it lends from the target."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from specdec.drafters.files.reading import TargetShape


def require_widths(where: str, hidden: int, embeddings: bool, output: bool, target: TargetShape) -> None:
    """Raise ValueError, naming both widths, where the target cannot lend its embeddings or its output layer."""
    for what, wanted, width in (
        ("embeddings", embeddings, target.embedding_size),
        ("output layer", output, target.output_size),
    ):
        if wanted and width != hidden:
            raise ValueError(
                f"{where}: hidden_size is {hidden}, and the {what} of {target.name}, which it reads, has width {width}"
            )


def require_reads(where: str, layers: int, hidden: int, weights: Mapping[str, Tensor]) -> None:
    """Raise ValueError, naming both, where `fc` reads another width than so many states of the target."""
    fused = weights.get("fc.weight")
    if fused is not None and fused.ndim == 2 and fused.shape[1] != layers * hidden:
        raise ValueError(
            f"{where}: fc.weight reads width {fused.shape[1]}, and {layers} states of the target have {layers * hidden}"
        )


def heads_of(rank: int, kind: str, confident: bool, with_markov: bool) -> dict[str, Any]:
    """The heads as fields of `BlockConfig`; rank 0: no Markov head."""
    reads = "markov" if with_markov else "hidden"
    return dict(
        markov=kind if rank else "none", markov_rank=rank, confidence=reads if confident else "none"
    )  # fmt: skip


def selector_of(rank: int, candidates: int, taps: int, group: int) -> dict[str, Any]:
    """DFlash2's selector and convolutions as fields of `BlockConfig`."""
    return dict(
        markov="selector", markov_rank=rank, candidates=candidates, conv_taps=taps, conv_group=group, confidence="none"
    )


def heads_note(values: Mapping[str, Any]) -> str:
    """The heads, in words."""
    if values["markov"] == "domino":
        return (
            f"Domino head: a GRU of {values['memory_size']} over the tokens of a block, rank {values['markov_rank']}, "
            f"on all but the first {values['plain_slots']} predicted tokens"
        )
    markov = f"{values['markov']} of rank {values['markov_rank']}" if values["markov_rank"] else "none"
    return f"Markov head: {markov}; confidence head reads: {values['confidence']}"


def slots_note(block_size: int, from_anchor: bool, why: str) -> str:
    """Which places of a block predict, in words."""
    if from_anchor:
        return f"each of {block_size} places predicts the token after it ({why})"
    return f"each of {block_size - 1} mask tokens predicts the token at its own place ({why})"
