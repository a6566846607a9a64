"""The rows of one round, as drafters and acceptance rules read them."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from attention.gpu import to_device
from specdec.requests.kept import recent
from specdec.requests.rows import Row, Rows
from specdec.sampling.draws import highest
from specdec.sampling.noise import RoundNoise, noise_of_rows
from specdec.sampling.prefixes import Prefixes
from specdec.sampling.processors import as_scores
from specdec.sampling.warped import Warped, warp_lazily
from specdec.sampling.warpers import largest_after

Path = Callable[[], Tensor]


class Batch:
    """The A rows of `rows` that take part in one round.

    In a captured round these are all slots, and `members` is empty, since nothing may depend on host values. In an
    eager round `members` are the host's copies of the rows. `outputs` holds the `wanted` ones of "scores" and "logits",
    float32 `[A, E + 1, V]`, of which each emitted token was chosen, and "logprobs" `[A, E + 1]`, the natural logarithms
    of its probability before the processors, once the target has verified the draft.
    `nodes`: of the trees that a drafter is asked for which grows them itself, without the root (None: its own number).
    `most_new`: tokens that a round may add and a draft model's cache may lack; a captured round runs them again.
    """

    def __init__(self, rows: Rows, members: Sequence[Row] | None = None, wanted: Sequence[str] = (),
                 most_new: int = 1):  # fmt: skip
        self.rows, self.captured, self.members = rows, members is None, tuple(members or ())
        slots = [row.slot for row in self.members]
        whole = self.captured or slots == list(range(rows.size))
        self.index = None if whole else to_device(torch.tensor(slots), rows.tokens.device)
        self.faults: list[tuple[Tensor, str]] = []
        self.wanted = wanted
        self.outputs: dict[str, Tensor] = {}
        self.most_new = most_new
        self.nodes: int | None = None
        self._lengths = self._of(rows.lengths)
        self._noise: RoundNoise | None = None

    def _of(self, x: Tensor) -> Tensor:
        return x if self.index is None else x.index_select(0, self.index)

    @property
    def size(self) -> int:
        """A."""
        return len(self._lengths)

    @property
    def device(self) -> torch.device:
        """That of the target, where all tensors of a batch and of its draft lie."""
        return self.rows.target.device

    def noise(self) -> RoundNoise:
        """The random numbers of this round."""
        if self._noise is None:
            ahead = 64 if self.captured else 0  # a few launches for all streams, where launches count
            self._noise = noise_of_rows(self._of(self.rows.keys), self._lengths, ahead)
        return self._noise

    def last_tokens(self) -> Tensor:
        """`[A, 1]`: the last accepted token of each row."""
        return self.recent(1)

    def recent(self, count: int) -> Tensor:
        """`[A, count]`: the last accepted tokens of each row."""
        return recent(self._of(self.rows.tokens), self._lengths, count)

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
        return None if features is None or not self.rows.features_valid else self._of(features)[:, -1]

    def report_fault(self, about: Tensor, what: str) -> None:
        """Report broken rows without waiting for the device; the loop raises ValueError with the message `what`.

        `about` is either bool, `[A]` or `[A, n]`, of which any breaks a row, or numbers `[A, n]`: a row with one that
        is not finite is broken.
        """
        self.faults.append((about, what))

    def report_logits(self, highest: Tensor, whose: str) -> None:
        """Report rows of whose model's logits, or log-probabilities, the `highest [A, n]` are not finite."""
        self.report_fault(highest, f"the {whose} model produced NaN or infinite logits")

    @property
    def ends(self) -> Tensor:
        """`[A, K]`: tokens that end each row, filled up with -1."""
        return self._of(self.rows.ends)

    @property
    def room(self) -> Tensor:
        """`[A]`: how many more tokens each row may get."""
        return self._of(self.rows.limits) - self._lengths

    def scores(self, logits: Tensor, paths: Callable[[], tuple[Tensor, Tensor | None]]) -> Tensor:
        """Process `logits [A, n, V]` -> scores `[A, n, V]`; not for processors that run node by node.

        paths: gives the drafted tokens down to each node, and their depths, as `Prefixes.of` takes them."""
        processors, (count, nodes, _) = self.rows.processors, logits.shape
        if processors.leading:
            prefixes = Prefixes.of(self.text()[0], self._lengths, *paths())
            logits = processors.lead(logits, self._all_numbers(), prefixes)
        scores = processors.warp(as_scores(logits).flatten(0, 1), self._numbers(nodes))
        return scores.unflatten(0, (count, nodes))

    def unwritten(self, logits: Tensor) -> Warped | None:
        """The scores of `logits [A, n, V]`, not written out; None where they must be."""
        warpers, leading = self.rows.processors.warpers, self.rows.processors.leading
        if warpers is None or leading:
            return None
        return warp_lazily(warpers, self._numbers(logits.shape[1]), logits)

    def _all_numbers(self) -> Tensor:
        return self.rows.numbers if self.index is None else self.rows.numbers.index_select(1, self.index)

    def _numbers(self, nodes: int) -> Tensor:
        """`[P, A * nodes]`: the numbers of the warpers at every node of each row."""
        numbers = self._all_numbers()[: self.rows.processors.warper_numbers]
        return numbers[:, :, None].expand(-1, -1, nodes).flatten(1)

    def highest_known(self, of_logits: Tensor) -> Tensor | None:
        """The highest scores `[A, n]` where they follow from the highest logits `[A, n]`; else None."""
        warpers, wide = self.rows.processors.warpers, torch.promote_types(of_logits.dtype, torch.float32)
        if warpers is None or self.rows.processors.leading:
            return None
        found = largest_after(warpers, self._numbers(of_logits.shape[1]), of_logits.to(wide).flatten())
        return None if found is None else found.view(of_logits.shape)

    def process_unwritten(self, logits: Tensor, whose: str) -> Warped | None:
        """The same as `process`, not written out; None where scores must be."""
        scores = self.unwritten(logits)
        if scores is not None:
            self.report_logits(highest(logits), whose)
            self._report_scores(scores.largest(), whose)
        return scores

    def process(self, logits: Tensor, path: Path, whose: str, going: Tensor | None = None) -> Tensor:
        """Process the draft model's `logits [A, n, V]` at n nodes per row -> scores `[A, n, V]`.

        path: `path() [A, n, d]`, the drafted tokens down to the nodes, all at depth d; called if they matter.
        whose: the model's name, under which NaN or infinite logits and scores are reported as faults.
        going [A, n] bool: nodes after which a text can go on (None: all); see `processors.may_follow`.

        Processors that look at the text do not run at other nodes or past a row's limit; scores there are -inf. Where
        the processors forbid every token, all scores are -inf and nothing can be drafted."""
        of_logits, processors = highest(logits), self.rows.processors
        self.report_logits(of_logits, whose)
        if processors.node_by_node:
            scores = self._one_by_one(logits, path(), going)
        else:
            scores = self.scores(logits, lambda: (path(), None))
            if processors.need_prefix:
                wanted = (path().shape[2] < self.room)[:, None]
                wanted = wanted if going is None else wanted & going
                scores.masked_fill_(~wanted[..., None], float("-inf"))
        if processors.change_scores:
            known = self.highest_known(of_logits)
            self._report_scores(highest(scores) if known is None else known, whose)
        return scores

    def _report_scores(self, largest: Tensor, whose: str) -> None:
        # -inf is no fault here: nothing is drafted then
        self.report_fault(torch.where(largest == float("-inf"), 0.0, largest), no_finite_score(whose))

    def _one_by_one(self, logits: Tensor, path: Tensor, going: Tensor | None) -> Tensor:
        """`process` on the host."""
        count, nodes, _ = logits.shape
        inside = [row.length + path.shape[2] < row.limit for row in self.members for _ in range(nodes)]
        if going is not None:
            inside = [a and b for a, b in zip(inside, going.flatten().tolist(), strict=True)]
        each, prefix = [row.number for row in self.members for _ in range(nodes)], path.flatten(0, 1)
        scores = self.rows.processors(logits.flatten(0, 1), each, lambda m: self.prefix(m // nodes, prefix[m]), inside)
        return scores.unflatten(0, (count, nodes))

    def prefix(self, a: int, path: Tensor) -> Tensor:
        """`[1, L]`: the text of row a, then the drafted tokens `path [d]`."""
        row = self.members[a]
        return torch.cat([self.rows.tokens[row.slot, : row.length], path])[None]


def no_finite_score(whose: str) -> str:
    """The message for a row whose scores are all -inf, NaN or infinite."""
    return f"the logits processors (or the temperature) left the {whose} model no finite score"
