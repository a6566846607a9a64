"""One forward of the target that verifies the drafts of several batches, with chunks of prompts beside them."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from attention.gpu import to_device
from specdec.model.features import Features
from specdec.model.runner import ModelRunner, RunnerOutput
from specdec.requests.batch import Batch
from specdec.trees.draft import Draft
from specdec.trees.tensors import TreeMask

Chunk = tuple[int, Tensor]  # a sequence and the tokens [n] that it gets


def verify_together(target: ModelRunner, drafts: Sequence[tuple[Batch, Draft]], features: Features | None = None,
                    chunks: Sequence[Chunk] = ()) -> list[RunnerOutput]:  # fmt: skip
    """Run the target over drafts -> logits `[A, N, V]` and features `[A, N, W]` for each of them.

    Each row's tokens that its sequence lacks run before its draft. Of `chunks`, which run too, nothing is returned.
    Raises `attention.OutOfPages` before anything is appended."""
    live = [row.sequence for batch, _ in drafts for row in batch.members]
    unseen = [_unseen(target, batch) for batch, _ in drafts]
    pieces = [
        piece
        for (_, draft), texts in zip(drafts, unseen, strict=True)
        for text, nodes in zip(texts, draft.tokens, strict=True)
        for piece in (text, nodes)
    ]
    sizes = [draft.tree.size for batch, draft in drafts for _ in batch.members]
    counts = [a + n for a, n in zip((len(text) for texts in unseen for text in texts), sizes, strict=True)]
    masks = [(TreeMask.of(draft.tree), batch.size) for batch, draft in drafts]
    if not chunks and counts == sizes and len(set(sizes)) == 1:
        tokens, keep = torch.cat([draft.tokens.flatten() for _, draft in drafts]), None
    else:
        ends = list(accumulate(counts))
        kept = [place for end, size in zip(ends, sizes, strict=True) for place in range(end - size, end)]
        tokens = torch.cat([*pieces, *(chunk for _, chunk in chunks)])
        keep = to_device(torch.tensor(kept, dtype=torch.int64), tokens.device)
        live, counts = live + [sequence for sequence, _ in chunks], counts + [len(chunk) for _, chunk in chunks]
        masks += [(TreeMask(), len(chunks))] if chunks else []
    out = target.forward(live, tokens, counts, TreeMask.join(masks), keep, features, capture=not chunks)
    cuts = list(accumulate((batch.size * draft.tree.size for batch, draft in drafts), initial=0))
    part = lambda a, b, count: out.map(lambda x: x[a:b].unflatten(0, (count, -1)))
    return [part(a, b, batch.size) for (batch, _), a, b in zip(drafts, cuts, cuts[1:], strict=False)]


def run_chunks(target: ModelRunner, chunks: Sequence[Chunk]) -> None:
    """Run the target over chunks of prompts alone. Does not wait for the device.

    Where forwards are captured, several run one after the other, each as large as a graph may be."""
    for some in within(chunks, target.prompt_tokens):
        sequences, tokens = zip(*some, strict=True)
        counts = [len(chunk) for chunk in tokens]
        keep = to_device(torch.tensor([sum(counts) - 1]), target.device)  # of some token there must be logits
        target.forward(sequences, torch.cat(tokens), counts, keep=keep, prompts=True)


def within(chunks: Sequence[Chunk], most: int | None) -> list[list[Chunk]]:
    """Chunks in their order, cut and grouped so that each group but the last has `most` tokens; None: one group.

    >>> [[(s, len(t)) for s, t in group] for group in within([(0, torch.zeros(5)), (1, torch.zeros(2))], 4)]
    [[(0, 4)], [(0, 1), (1, 2)]]
    """
    if most is None:
        return [list(chunks)]
    groups, room = list[list[Chunk]](), 0
    for sequence, tokens in chunks:
        while len(tokens):
            if not room:
                groups.append([])
                room = most
            groups[-1].append((sequence, tokens[:room]))
            tokens, room = tokens[room:], room - len(groups[-1][-1][1])
    return groups


def _unseen(target: ModelRunner, batch: Batch) -> list[Tensor]:
    """Each row's tokens that its sequence lacks, without the last one, which is the draft's root."""
    rows, cache = batch.rows, target.cache
    return [rows.tokens[row.slot, cache.length(row.sequence) : row.length - 1] for row in batch.members]
