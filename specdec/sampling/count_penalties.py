"""Presence and frequency penalties, which transformers lacks: of generated tokens, as in OpenAI's API and in vLLM."""

import copy

import torch
from torch import Tensor
from transformers.generation import LogitsProcessor


class CountPenalties(LogitsProcessor):
    """Lowers the score of each token that has been generated c > 0 times by `presence` + `frequency` c.

    The first `prompt_length` tokens do not count; in a call it is set for each row.

    >>> penalties = CountPenalties(presence=0.5, frequency=1.0, prompt_length=1)
    >>> penalties(torch.tensor([[0, 1, 1, 2]]), torch.zeros(1, 4)).tolist()
    [[0.0, -2.5, -1.5, 0.0]]
    """

    def __init__(self, presence: float = 0.0, frequency: float = 0.0, prompt_length: int = 0):
        self.presence, self.frequency, self.prompt_length = float(presence), float(frequency), prompt_length

    def for_row(self, row: int, width: int) -> "CountPenalties":
        """The same after a prompt of `width` tokens."""
        mine = copy.copy(self)
        mine.prompt_length = width
        return mine

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Process `scores [B, V]` after the texts `input_ids [B, L]`."""
        said = input_ids[:, self.prompt_length :]
        times = torch.zeros_like(scores).scatter_add_(1, said, torch.ones_like(said, dtype=scores.dtype))
        return scores - (self.frequency * times + self.presence * (times > 0).to(scores.dtype))
