"""Moves rows of the cache in place, in every layer at once: what commits an accepted path and copies forked pages.

Moves come in segments, one a sequence (or one a page copy). Within a segment they act as if done one after the other,
and a row may be read by one move and overwritten by a later one; what a move writes, no later move of its segment
reads. That holds for every path through a token tree, whose targets 0, 1, 2 … never pass its increasing sources. No
segment touches a row that another one writes."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from attention.dispatch import resolve
from attention.recording import current


def move_rows(
    tensors: Sequence[Tensor], sources: Tensor, targets: Tensor, cu_moves: Tensor, impl: str | None = None
) -> None:
    """Copy row `sources[m]` to row `targets[m]` in every layer of `tensors`, in place and in one launch.

    tensors: one to four `[layers, rows, width]`
    sources, targets: `[M]`, int64 on the tensors' device, so that a commit needs no synchronisation
    cu_moves: `[S + 1]`, int64, where the segments begin and end; the module says what a segment may hold

    A move with a negative source or target, or with both equal, does nothing. Raises ValueError for other shapes, or an
    `impl` that cannot run."""
    if not 1 <= len(tensors) <= 4 or any(
        t.ndim != 3 or t.stride(2) != 1 or t.shape[:2] != tensors[0].shape[:2] for t in tensors
    ):
        raise ValueError(
            "tensors must be one to four [layers, rows, width] with contiguous rows, got "
            f"{[(list(t.shape), t.stride()) for t in tensors]}"
        )
    if sources.ndim != 1 or sources.shape != targets.shape or cu_moves.ndim != 1 or len(cu_moves) < 1:
        raise ValueError(
            f"sources [M], targets [M] and cu_moves [S + 1] do not fit: {list(sources.shape)}, {list(targets.shape)}, "
            f"{list(cu_moves.shape)}"
        )
    if (recorder := current()) is not None:
        return recorder.leaf(partial(_move_rows, tensors, sources, targets, cu_moves, impl))
    torch.ops.specdec.move_rows(tensors, sources, targets, cu_moves, impl)


def move_rows_reference(tensors: Sequence[Tensor], sources: Tensor, targets: Tensor) -> None:
    """The specification: every source is read before the first target is written.

    For the segments that the module allows this equals one move after the other."""
    moves = (sources >= 0) & (targets >= 0)
    if not moves.all():
        sources, targets = sources[moves], targets[moves]
    for tensor in tensors:
        tensor.index_copy_(1, targets, tensor.index_select(1, sources))


def _as_words(tensors: Sequence[Tensor]) -> list[Tensor]:
    """View rows as integers, the widest up to 32 bits that divide every row: a move does not depend on the dtype."""
    for word in (torch.int32, torch.int16, torch.uint8):
        if all(
            n * t.element_size() % word.itemsize == 0
            for t in tensors
            for n in (t.shape[2], t.stride(0), t.stride(1), t.storage_offset())
        ):
            break
    if all(t.element_size() >= word.itemsize for t in tensors):
        return [t.view(word) for t in tensors]
    return [t.view(torch.uint8).view(word) for t in tensors]


def _move_rows(tensors: Sequence[Tensor], sources: Tensor, targets: Tensor, cu_moves: Tensor, impl: str | None) -> None:
    words = _as_words(tensors)
    if resolve(impl, sources.device) == "reference":
        return move_rows_reference(words, sources, targets)
    from attention.kv.move_kernel import launch_move_rows

    return launch_move_rows(words, sources, targets, cu_moves)


torch.library.define(
    "specdec::move_rows", "(Tensor(a!)[] tensors, Tensor sources, Tensor targets, Tensor cu_moves, str? impl) -> ()"
)
torch.library.impl("specdec::move_rows", "CompositeExplicitAutograd", _move_rows)
torch.library.register_fake("specdec::move_rows", lambda tensors, sources, targets, cu_moves, impl: None)
