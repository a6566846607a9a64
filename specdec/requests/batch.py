"""The rows of one round, as drafters and acceptance rules read them."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from specdec.requests.rows import Row, Rows
from specdec.sampling.draws import highest
from specdec.sampling.noise import RoundNoise, noise_of_rows
from specdec.sampling.processors import as_scores
from specdec.sampling.warped import Warped, warp_lazily
from specdec.sampling.warpers import largest_after

Path = Callable[[int, int], Tensor]


class Batch:
    """The A rows of `rows` that take part in one round.

    In a captured round these are all slots, and `members` is empty, since nothing may depend on host values. In an
    eager round `members` are the host's copies of the rows. `outputs` holds the `wanted` ones of "scores" and "logits",
    float32 `[A, E + 1, V]`, of which each emitted token was chosen, once the target has verified the draft.
    `most_new`: tokens that a round may add and a draft model's cache may lack; a captured round runs them again.
    """

    def __init__(self, rows: Rows, members: Sequence[Row] | None = None, wanted: Sequence[str] = (),
                 most_new: int = 1):  # fmt: skip
        self.rows, self.captured, self.members = rows, members is None, tuple(members or ())
        slots = [row.slot for row in self.members]
        whole = self.captured or slots == list(range(rows.size))
        self.index = None if whole else torch.tensor(slots).to(rows.tokens.device, non_blocking=True)
        self.faults: list[tuple[Tensor, str]] = []
        self.wanted = wanted
        self.outputs: dict[str, Tensor] = {}
        self.most_new = most_new
        self._lengths = self._of(rows.lengths)
        self._noise: RoundNoise | None = None

    def _of(self, x: Tensor) -> Tensor:
        return x if self.index is None else x.index_select(0, self.index)

    @property
    def size(self) -> int:
        """A."""
        return len(self._lengths)

    def noise(self) -> RoundNoise:
        """The random numbers of this round."""
        if self._noise is None:
            ahead = 64 if self.captured else 0  # a few launches for all streams, where launches count
            self._noise = noise_of_rows(self._of(self.rows.keys), self._of(self.rows.rounds), ahead)
        return self._noise

    def last_tokens(self) -> Tensor:
        """`[A, 1]`: the last accepted token of each row."""
        return self._of(self.rows.tokens).gather(1, self._lengths[:, None] - 1)

    def recent(self, count: int) -> Tensor:
        """`[A, count]`: the last accepted tokens of each row."""
        place = self._lengths[:, None] + torch.arange(-count, 0, device=self._lengths.device)
        return self._of(self.rows.tokens).gather(1, place.clamp(min=0))

    def text(self) -> tuple[Tensor, Tensor]:
        """`[A, L]`: the tokens of each row, padded, and `[A, 1]`: how many are valid."""
        tokens = self._of(self.rows.tokens)
        if not self.captured:
            tokens = tokens[:, : max(row.length for row in self.members)]
        return tokens, self._lengths[:, None]

    @property
    def features(self) -> Tensor | None:
        """`[A, W]`: the features wanted, at the node that each row's last token was drawn from; None in round one."""
        features = self.rows.features
        return None if features is None or not self.rows.features_valid else self._of(features)

    def report_fault(self, about: Tensor, what: str) -> None:
        """Report broken rows without waiting for the device; the loop raises ValueError with the message `what`.

        `about` is either `[A]` bool, the broken rows, or numbers `[A, n]`: a row with one that is not finite is broken.
        """
        self.faults.append((about, what))

    def scores(self, logits: Tensor, prefix: Callable[[int], Tensor] | None = None,
               wanted: Sequence[bool] | None = None) -> Tensor:  # fmt: skip
        """Process `logits [A, n, V]` -> scores `[A, n, V]`; see `Processors.__call__`."""
        processors, (count, nodes, _) = self.rows.processors, logits.shape
        if processors.need_prefix:
            each = [row.number for row in self.members for _ in range(nodes)]
            return processors(logits.flatten(0, 1), each, prefix, wanted).unflatten(0, (count, nodes))
        scores = processors.warp(as_scores(logits).flatten(0, 1), self._numbers(nodes))
        return scores.unflatten(0, (count, nodes))

    def unwritten(self, logits: Tensor) -> Warped | None:
        """The scores of `logits [A, n, V]`, not written out; None where they must be."""
        warpers = self.rows.processors.warpers
        return None if warpers is None else warp_lazily(warpers, self._numbers(logits.shape[1]), logits)

    def _numbers(self, nodes: int) -> Tensor:
        """`[P, A * nodes]`: the numbers of the processors at every node of each row."""
        numbers = self.rows.numbers if self.index is None else self.rows.numbers.index_select(1, self.index)
        return numbers[:, :, None].expand(-1, -1, nodes).flatten(1)

    def highest_known(self, of_logits: Tensor) -> Tensor | None:
        """The highest scores `[A, n]` where they follow from the highest logits `[A, n]`; else None."""
        warpers, wide = self.rows.processors.warpers, torch.promote_types(of_logits.dtype, torch.float32)
        if warpers is None:
            return None
        found = largest_after(warpers, self._numbers(of_logits.shape[1]), of_logits.to(wide).flatten())
        return None if found is None else found.view(of_logits.shape)

    def process_unwritten(self, logits: Tensor, whose: str) -> Warped | None:
        """The same as `process`, not written out; None where scores must be."""
        scores = self.unwritten(logits)
        if scores is not None:
            self.report_fault(highest(logits), f"the {whose} model produced NaN or infinite logits")
            self._report_scores(scores.largest(), whose)
        return scores

    def process(self, logits: Tensor, path: Path, whose: str, going: Tensor | None = None) -> Tensor:
        """Process the draft model's `logits [A, n, V]` at n nodes per row -> scores `[A, n, V]`.

        path: `path(a, i) [d]`, the drafted tokens down to node i of row a.
        whose: the model's name, under which NaN or infinite logits and scores are reported as faults.
        going [A, n] bool: nodes after which a text can go on (None: all); see `Processors.may_follow`.

        Processors that look at the text do not run at other nodes or past a row's limit; scores there are -inf. Where
        the processors forbid every token, all scores are -inf and nothing can be drafted."""
        of_logits = highest(logits)
        self.report_fault(of_logits, f"the {whose} model produced NaN or infinite logits")
        nodes, wanted = logits.shape[1], None
        if self.rows.processors.need_prefix:
            room = [row.limit - row.length for row in self.members]
            wanted = [len(path(a, i)) < room[a] for a in range(self.size) for i in range(nodes)]
            if going is not None:
                wanted = [a and b for a, b in zip(wanted, going.flatten().tolist(), strict=True)]
        scores = self.scores(logits, lambda m: self.prefix(*divmod(m, nodes), path), wanted)
        if self.rows.processors.change_scores:
            known = self.highest_known(of_logits)
            self._report_scores(highest(scores) if known is None else known, whose)
        return scores

    def _report_scores(self, largest: Tensor, whose: str) -> None:
        # -inf is no fault here: nothing is drafted then
        self.report_fault(torch.where(largest == float("-inf"), 0.0, largest), no_finite_score(whose))

    def prefix(self, a: int, node: int, path: Path) -> Tensor:
        """`[1, L]`: the text of row a, then the drafted tokens down to `node`."""
        row = self.members[a]
        return torch.cat([self.rows.tokens[row.slot, : row.length], path(a, node)])[None]


def no_finite_score(whose: str) -> str:
    """The message for a row whose scores are all -inf, NaN or infinite."""
    return f"the logits processors (or the temperature) left the {whose} model no finite score"
