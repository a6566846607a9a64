"""One forward of the target that verifies the drafts of several batches, with chunks of prompts beside them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from attention.gpu import to_device
from specdec.drafters.base import readers_of, take_in
from specdec.model.features import Features
from specdec.model.runner import ModelRunner, RunnerOutput
from specdec.requests.batch import Batch
from specdec.requests.rows import Row
from specdec.rounds.records import Call
from specdec.trees.draft import Draft
from specdec.trees.tensors import TreeMask


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next `tokens [n]` of a prompt: those of `row`, one of `call`."""

    call: Call
    row: Row
    tokens: Tensor


def verify_together(target: ModelRunner, drafts: Sequence[tuple[Batch, Draft]], features: Features | None = None,
                    chunks: Sequence[Chunk] = ()) -> tuple[list[RunnerOutput], list[list[Tensor]]]:  # fmt: skip
    """Run the target over drafts -> logits `[A, N, V]` and features `[A, N, W]` for each of them.

    Each row's tokens that its sequence lacks run before its draft; with "prompt" features theirs, `[n, W]` of each row,
    are the second result, and those of `chunks`, which run too, go to the states that read them. Raises
    `attention.OutOfPages` before anything is appended."""
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
        tokens = torch.cat([*pieces, *(chunk.tokens for chunk in chunks)])
        keep = to_device(torch.tensor(kept, dtype=torch.int64), tokens.device)
        live = live + [chunk.row.sequence for chunk in chunks]
        counts = counts + [len(chunk.tokens) for chunk in chunks]
        masks += [(TreeMask(), len(chunks))] if chunks else []
    out = target.forward(live, tokens, counts, TreeMask.join(masks), keep, features, capture=not chunks)
    of_texts: list[list[Tensor]] = [[] for _ in drafts]
    if features is not None and features.tokens == "prompt" and out.features is not None:
        pieces_of = out.features.split(counts)
        give_features(chunks, pieces_of[len(sizes) :])
        before = [piece[:-size] for piece, size in zip(pieces_of, sizes, strict=False)]
        starts = [0, *accumulate(batch.size for batch, _ in drafts)]
        of_texts = [before[a:b] for a, b in pairwise(starts)]
        out = out if keep is None else RunnerOutput(out.logits, out.features[keep])
    cuts = list(accumulate((batch.size * draft.tree.size for batch, draft in drafts), initial=0))
    part = lambda a, b, count: out.map(lambda x: x[a:b].unflatten(0, (count, -1)))
    return [part(a, b, batch.size) for (batch, _), a, b in zip(drafts, cuts, cuts[1:], strict=False)], of_texts


def run_chunks(target: ModelRunner, chunks: Sequence[Chunk]) -> None:
    """Run the target over chunks of prompts alone. Does not wait for the device.

    Where forwards are captured, several run one after the other, each as large as a graph may be."""
    features = next((chunk.call.features for chunk in chunks if readers_of(chunk.call.session)), None)
    for some in within(chunks, target.prompt_tokens):
        tokens = [chunk.tokens for chunk in some]
        counts = [len(chunk) for chunk in tokens]
        keep = to_device(torch.tensor([sum(counts) - 1]), target.device)  # of some token there must be logits
        given = [chunk.row.sequence for chunk in some], torch.cat(tokens), counts
        out = target.forward(*given, keep=keep, features=features, prompts=True)
        if out.features is not None:
            give_features(some, out.features.split(counts))


def within(chunks: Sequence[Chunk], most: int | None) -> list[list[Chunk]]:
    """Chunks in their order, cut and grouped so that each group but the last has `most` tokens; None: one group."""
    if most is None:
        return [list(chunks)]
    groups, room = list[list[Chunk]](), 0
    for chunk in chunks:
        tokens = chunk.tokens
        while len(tokens):
            if not room:
                groups.append([])
                room = most
            groups[-1].append(replace(chunk, tokens=tokens[:room]))
            tokens, room = tokens[room:], room - len(groups[-1][-1].tokens)
    return groups


def give_features(chunks: Sequence[Chunk], features: Sequence[Tensor]) -> None:
    """Give those of each chunk, `[n, W]`, to the session of its call."""
    calls = {id(chunk.call): chunk.call for chunk in chunks}
    for key, call in calls.items():
        mine = [(chunk.row, x) for chunk, x in zip(chunks, features, strict=True) if id(chunk.call) == key]
        take_in(call.session, call.rows, *zip(*mine, strict=True))


def _unseen(target: ModelRunner, batch: Batch) -> list[Tensor]:
    """Each row's tokens that its sequence lacks, without the last one, which is the draft's root."""
    rows, cache = batch.rows, target.cache
    return [rows.tokens[row.slot, cache.length(row.sequence) : row.length - 1] for row in batch.members]
