"""Prompts go into the cache in chunks, so that one forward never holds too many tokens.

Both functions take a `specdec.model.runner.ModelRunner`, whose PREFILL_CHUNK limits the tokens of one sequence in a
forward and whose PREFILL_TOKENS limits those of all sequences."""

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from attention.gpu import to_device
from specdec.model.features import Features

SHORT_PROMPT = 16  # prompts up to this long use a captured forward, although only the last logits are needed


Give = Callable[[Sequence[int], Sequence[Tensor]], None]


def extend(runner, sequences: Sequence[int], tokens: Sequence[Tensor], features: Features | None = None,
           give: Give | None = None) -> Tensor:  # fmt: skip
    """Append each sequence's own `tokens [n]`, n >= 1, in chunks -> logits `[B, V]` after each sequence's last token.

    give: called after each chunk with its sequences, as indices into `sequences`, and the `features [n, W]`, "prompt"
        ones, of the tokens that each has got.

    Raises `attention.OutOfPages` before the chunk that does not fit.
    """
    lengths, chunk = [len(t) for t in tokens], runner.PREFILL_CHUNK
    if give is None and runner.mode != "eager" and max(lengths) <= SHORT_PROMPT and len(set(lengths)) == 1:
        return runner.forward(sequences, torch.cat(list(tokens)), lengths).logits[lengths[0] - 1 :: lengths[0]]
    logits: dict[int, Tensor] = {}
    for start in range(0, max(lengths), chunk):
        unfinished = [i for i, length in enumerate(lengths) if length > start]
        longest = min(chunk, max(lengths[i] - start for i in unfinished))
        at_once = max(1, runner.PREFILL_TOKENS // longest)
        for first in range(0, len(unfinished), at_once):
            group = unfinished[first : first + at_once]
            pieces = [tokens[i][start : start + chunk] for i in group]
            counts = [len(piece) for piece in pieces]
            last = {i: end - 1 for i, end in zip(group, accumulate(counts), strict=True) if lengths[i] <= start + chunk}
            keep = to_device(torch.tensor(list(last.values()), dtype=torch.int64), runner.device)
            packed = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
            some = [sequences[i] for i in group]
            out = runner.forward(some, packed, counts, keep=keep, features=features, prompts=True)
            if give is not None:
                give(group, out.features.split(counts))
            logits.update(zip(last, out.logits, strict=True))
    return torch.stack([logits[i] for i in range(len(lengths))])


def prefill_long_prompts(runner, sequences: Sequence[int], prompts: Sequence[Tensor],
                         features: Features | None = None, give: Give | None = None) -> None:  # fmt: skip
    """Put all but the last chunk of each long prompt `[n]` into the cache.

    The last chunk is left for the forward that verifies the first draft. Where these last chunks together exceed
    PREFILL_TOKENS, only the last token of each prompt is left. `features` and `give` are those of `extend`.
    """
    chunk = runner.PREFILL_CHUNK
    if sum(min(len(prompt), chunk) for prompt in prompts) > runner.PREFILL_TOKENS:
        chunk = 1
    long = [i for i, prompt in enumerate(prompts) if len(prompt) > chunk]
    if long:
        begins = [prompts[i][: (len(prompts[i]) - 1) // chunk * chunk] for i in long]
        of_all = None if give is None else lambda group, given: give([long[i] for i in group], given)
        extend(runner, [sequences[i] for i in long], begins, features, of_all)
