"""Where the greedy texts of two methods part, and whether rounding alone can have decided there."""

from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest

import torch
from torch import Tensor

from specdec import ModelRunner

REFERENCES = ("autoregressive-eager", "autoregressive-graph", "autoregressive-compile")  # the first that was measured


def compare(rows: Sequence[dict], references: Sequence[str] = REFERENCES) -> list[dict]:
    """How many texts of each row are `identical` to the reference's of its batch size, and where others first differ.

    The reference is the first of `references` that was measured. `tokens` there are those of the method and of the
    reference; None stands behind an end.
    """
    texts = {(row["method"], row["batch"]): row["tokens"] for row in rows if "tokens" in row}
    found = []
    for (method, batch), ours in texts.items():
        reference = next((name for name in references if (name, batch) in texts), None)
        if reference in (None, method):
            continue
        parted = []
        for row, pair in enumerate(zip(ours, texts[reference, batch], strict=True)):
            places = enumerate(zip_longest(*pair))
            position, tokens = next(((i, both) for i, both in places if both[0] != both[1]), (None, None))
            if position is not None:
                parted.append({"row": row, "position": position, "tokens": list(tokens)})
        found.append(
            {
                "method": method,
                "batch": batch,
                "reference": reference,
                "texts": len(ours),
                "identical": len(ours) - len(parted),
                "differences": parted,
            }
        )
    return found


@torch.inference_mode()
def explain(
    target, prompts_of: Callable[[int], Sequence[Tensor]], compared: Sequence[dict], texts: dict[str, list[list[int]]]
) -> Iterator[dict]:
    """`compared` with the target's logits at every difference; `texts[batch]` are those of the reference, and
    `prompts_of(batch)` the token ids `[S]` that they follow.

    The prefix is run twice: at once by transformers, and over pages with its last token by itself, as a step does. Both
    are right, so the largest difference between their logits is `noise`. `margins` are the distances of the two best
    tokens in each, `behind` how far each side's token lies behind the best. It is a `near_tie` where neither side's
    token is further behind, in either, than twice the noise."""
    runner, known = ModelRunner(target, mode="eager"), {}
    for entry in compared:
        prompts = prompts_of(entry["batch"])
        explained = []
        for one in entry["differences"]:
            row, position = one["row"], one["position"]
            key = entry["batch"], row, position
            if key not in known:
                prompt, text = prompts[row], texts[str(entry["batch"])][row][:position]
                known[key] = logits_twice(target, runner, torch.cat([prompt, prompt.new_tensor(text)]))
            explained.append(one | judge(known[key], one["tokens"]))
        yield entry | {"differences": explained}


def logits_twice(model, runner: ModelRunner, prefix: Tensor) -> Tensor:
    """`[2, V]` float32 after `prefix [n]`, n >= 2: run at once, and over pages with the last token by itself."""
    at_once = model(prefix[None], logits_to_keep=1).logits[0, -1].float()
    runner.reserve([len(prefix)])
    sequence = runner.cache.add()
    try:
        runner.extend([sequence], [prefix[:-1]])
        return torch.stack([at_once, runner.forward([sequence], prefix[-1:], [1]).logits[0].float()])
    finally:
        runner.cache.free(sequence)


def judge(logits: Tensor, tokens: Sequence[int | None]) -> dict:
    """What `explain` says of one difference.

    >>> judge(torch.tensor([[1.0, 0.99, 0.0], [1.0, 1.01, 0.0]]), [0, 1])["near_tie"]
    True
    >>> judge(torch.tensor([[1.0, 0.99, 0.0], [1.0, 1.01, 0.0]]), [0, 2])["near_tie"]
    False
    """
    best = logits.topk(2).values
    noise = (logits[0] - logits[1]).abs().max().item()
    behind = [None if token is None else (best[:, 0] - logits[:, token]).tolist() for token in tokens]
    near = all(side is not None and max(side) <= 2 * noise for side in behind)
    return {"margins": (best[:, 0] - best[:, 1]).tolist(), "behind": behind, "noise": noise, "near_tie": near}
