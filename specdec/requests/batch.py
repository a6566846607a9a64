"""The rows that take part in one round, as drafters and acceptance read them."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from specdec.requests.rows import Row, Rows
from specdec.sampling.draws import highest
from specdec.sampling.noise import RoundNoise, noise_of_rows
from specdec.sampling.processors import as_scores

Path = Callable[[int, int], Tensor]


class Batch:
    """A rows of `rows` in one round.

    In a captured round these are all slots, and nothing may depend on what the host knows: `members` is empty. Else
    `members` are the host's copies of the rows, A of them.
    """

    def __init__(self, rows: Rows, members: Sequence[Row] | None = None):
        self.rows, self.captured, self.members = rows, members is None, tuple(members or ())
        slots = [row.slot for row in self.members]
        whole = self.captured or slots == list(range(rows.size))
        self.index = None if whole else torch.tensor(slots).to(rows.tokens.device, non_blocking=True)
        self.faults: list[tuple[Tensor, str]] = []
        self._lengths, self._noise = self._of(rows.lengths), None

    def _of(self, x: Tensor) -> Tensor:
        return x if self.index is None else x.index_select(0, self.index)

    @property
    def size(self) -> int:
        """A."""
        return len(self._lengths)

    def noise(self) -> RoundNoise:
        """The random numbers of this round."""
        if self._noise is None:
            ahead = {"ahead": 64} if self.captured else {}
            self._noise = noise_of_rows(self._of(self.rows.keys), self._of(self.rows.rounds), **ahead)
        return self._noise

    def last_tokens(self) -> Tensor:
        """`[A, 1]`: the last accepted token of each row."""
        return self.recent(1)

    def recent(self, count: int) -> Tensor:
        """`[A, count]`: the last accepted tokens of each row."""
        place = self._lengths[:, None] + torch.arange(-count, 0, device=self._lengths.device)
        return self._of(self.rows.tokens).gather(1, place.clamp(min=0))

    def text(self) -> tuple[Tensor, Tensor]:
        """`[A, L]`: the tokens of each row, which begin with those that are valid, and `[A, 1]`: how many these are."""
        tokens = self._of(self.rows.tokens)
        if not self.captured:
            tokens = tokens[:, : max(row.length for row in self.members)]
        return tokens, self._lengths[:, None]

    @property
    def features(self) -> Tensor | None:
        """`[A, W]`: the features that the drafter wants, at the node that each row's last token was drawn from; None in
        the first round."""
        return self._of(self.rows.features) if self.rows.features_valid else None

    def report_fault(self, about: Tensor, what: str) -> None:
        """Report, without waiting for the device, `about` which rows of this round are broken; the loop raises
        ValueError.

        Either which they are, `[A]` bool, or numbers `[A, n]` that break their row unless they are all finite.
        """
        self.faults.append((about, what))

    def scores(
        self, logits: Tensor, prefix: Callable[[int], Tensor] | None = None, asked: Sequence[bool] | None = None
    ) -> Tensor:
        """`logits [A, n, V]` through the processors -> scores `[A, n, V]`; see `Processors.__call__`."""
        processors, (count, nodes, _) = self.rows.processors, logits.shape
        if processors.need_prefix:
            each = [row.number for row in self.members for _ in range(nodes)]
            return processors(logits.flatten(0, 1), each, prefix, asked).unflatten(0, (count, nodes))
        numbers = self.rows.numbers if self.index is None else self.rows.numbers.index_select(1, self.index)
        numbers = numbers[:, :, None].expand(-1, -1, nodes).flatten(1)
        return processors.warp(as_scores(logits).flatten(0, 1), numbers).unflatten(0, (count, nodes))

    def process(self, logits: Tensor, path: Path, whose: str, going: Tensor | None = None) -> Tensor:
        """Scores `[A, n, V]` of n drafted nodes a row: `logits` through the processors; `path(a, i) [d]` are the
        drafted tokens down to node i of row a.

        `going [A, n]` bool: nodes after which a text can go on (None: all), see `Processors.may_follow`. Processors
        that look at the text are not asked about the others, nor past a row's limit: scores there are -inf. So is every
        score where the processors leave no token: nothing can be drafted there. Reports broken logits of `whose` model
        and scores that are NaN or infinite as faults.
        """
        self.report_fault(highest(logits), f"the {whose} model produced NaN or infinite logits")
        nodes, asked = logits.shape[1], None
        if self.rows.processors.need_prefix:
            room = [row.limit - row.length for row in self.members]
            asked = [len(path(a, i)) < room[a] for a in range(self.size) for i in range(nodes)]
            if going is not None:
                asked = [a and b for a, b in zip(asked, going.flatten().tolist(), strict=True)]
        scores = self.scores(logits, lambda m: self.prefix(*divmod(m, nodes), path), asked)
        if self.rows.processors.change_scores:
            largest = highest(scores)  # -inf is no fault: nothing is drafted there
            about = torch.where(largest == float("-inf"), 0.0, largest)
            self.report_fault(about, no_finite_score(whose))
        return scores

    def prefix(self, a: int, node: int, path: Path) -> Tensor:
        """`[1, L]`: the text of row a, then the drafted tokens down to `node`."""
        row = self.members[a]
        return torch.cat([self.rows.tokens[row.slot, : row.length], path(a, node)])[None]


def no_finite_score(whose: str) -> str:
    """What is said of a row whose scores are all -inf, NaN or infinite."""
    return f"the logits processors (or the temperature) left the {whose} model no finite score"
