"""How good a model's predictions on held-out text are, over the pages that decoding reads."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import specdec
from scripts.common.tiny_models import rows_of

ROWS = 4  # windows in one forward


@dataclass(frozen=True, slots=True)
class Predictions:
    """Of windows `[N, S]`: the mean next-token `loss` in nats, and the token that is `likeliest [N, S]` after each."""

    loss: float
    likeliest: Tensor

    def agreement(self, other: "Predictions") -> float:
        """The share of positions after which both models find the same token likeliest."""
        return (self.likeliest == other.likeliest).double().mean().item()


def held_out_windows(stream: np.ndarray, count: int, length: int) -> Tensor:
    """`[count, length]`: windows of a token stream, evenly spread over it.

    Raises ValueError for a stream that is too short."""
    if len(stream) < count * length:
        raise ValueError(f"{count} windows of {length} tokens are wanted, the held-out text has {len(stream)}")
    return rows_of(stream, [i * (len(stream) // count) for i in range(count)], length, "cpu")


@torch.inference_mode()
def predict(model, windows: Tensor, kv_dtype: str | None = None) -> Predictions:
    """What `model` predicts after every token of `windows [N, S]`, given those before (teacher forcing).

    Keys and values are written to pages, in 8 bits with `kv_dtype`, and read from them, as in decoding."""
    runner, losses, likeliest = specdec.ModelRunner(model, kv_dtype=kv_dtype, mode="eager"), [], []
    for rows in windows.split(ROWS):
        count, length = rows.shape
        runner.reserve([length] * count)
        sequences = [runner.cache.add() for _ in range(count)]
        logits = runner.forward(sequences, rows.flatten(), [length] * count).logits.float().unflatten(0, (count, -1))
        for sequence in sequences:
            runner.cache.free(sequence)
        wanted = rows[:, 1:].flatten()
        losses.append(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), wanted, reduction="none"))
        likeliest.append(logits.argmax(-1))
    return Predictions(torch.cat(losses).double().mean().item(), torch.cat(likeliest))
