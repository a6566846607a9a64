"""The protocol of a drafter, and what it may read while it proposes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from specdec.draft import Draft
from specdec.noise import RoundNoise, round_noise
from specdec.runner import ModelRunner
from specdec.sampling import Processors


@dataclass(slots=True)
class DraftContext:
    """The state of one `generate` call, written by the loop and read by drafters. Row numbers are those of the user's batch.

    `tokens [B, capacity]` holds each row's prompt and accepted tokens; the first `lengths[row]` of them are valid. `limits[row]` is the
    length at which a row ends.
    """

    target: ModelRunner
    tokens: Tensor
    lengths: list[int]
    limits: list[int]
    rounds: list[int]
    processors: Processors
    do_sample: bool
    seed: int
    complaints: list[tuple[Tensor, str]] = field(default_factory=list)

    def noise(self, rows: Sequence[int]) -> RoundNoise:
        """The random numbers of the current round of `rows`."""
        return round_noise(self.seed, rows, [self.rounds[row] for row in rows], self.tokens.device)

    def last_tokens(self, rows: Sequence[int]) -> Tensor:
        """`[A, 1]`: the last accepted token of each row."""
        where = torch.tensor([[row, self.lengths[row] - 1] for row in rows], dtype=torch.int64).to(self.tokens.device, non_blocking=True)
        return self.tokens[where[:, 0], where[:, 1]][:, None]

    def complain(self, bad: Tensor, what: str) -> None:
        """Report, without waiting for the device, that `bad [A]` bool rows of this round are broken; the loop raises ValueError."""
        self.complaints.append((bad, what))


class DraftSession(Protocol):
    """A drafter at work on one `generate` call."""

    def propose(self, rows: Sequence[int]) -> Draft:
        """A draft for the active `rows`: node 0 of each is its last accepted token."""

    def commit(self, rows: Sequence[int], accepted: Sequence[int]) -> None:
        """Hear how many drafted tokens of each row of the last proposal stay."""

    def release(self, rows: Sequence[int]) -> None:
        """Forget rows that have ended; also called, with all rows left, when the call ends or fails."""


class Drafter(Protocol):
    """Anything that proposes. A drafter without state of its own may return itself from `start`."""

    max_tokens: int  # nodes of its largest tree, without the root

    def validate(self, target: ModelRunner) -> None:
        """Raise ValueError, naming the values, when this drafter cannot draft for `target`."""

    def start(self, context: DraftContext) -> DraftSession:
        """Begin to draft for one `generate` call."""
