"""The scores of a level's children: logits of a block's slots after the logits processors, of all or some tokens."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specdec.drafters.block.children import likeliest_among
from specdec.drafters.block.slots import SlotState
from specdec.drafters.network.parts import over_target
from specdec.requests.batch import Batch, Path
from specdec.sampling.draws import top_log_probs


@dataclass(frozen=True, slots=True)
class SlotScores:
    """What the columns X of a level's scores stand for, and the scores.

    among [A, K, M]: draft tokens, in which case X is M; None: X is V', the drafter's vocabulary.
    spread: scores are over the target's vocabulary instead: X is V.
    first: the logits of slot 0 after the last tokens, `[A, 1, V' or M]`.
    by_name: whether processors name tokens, or look at the text.
    """

    batch: Batch
    state: SlotState
    among: Tensor | None
    spread: bool
    first: Tensor
    by_name: bool

    @classmethod
    def of(cls, batch: Batch, state: SlotState, depth: int, candidates: int | None = None,
           spread: bool = False) -> "SlotScores":  # fmt: skip
        """Run the block. Raises ValueError for a `depth` of more levels than it has slots.

        Where processors name tokens, `candidates` are not used and scores are always over the target's vocabulary."""
        unary, processors = state.slots(batch), batch.rows.processors
        if unary.shape[1] < depth:
            raise ValueError(f"a tree of {depth} levels needs as many slots, and the drafter has {unary.shape[1]}")
        by_name = processors.name_tokens
        first, spread = state.conditional(0, batch.last_tokens()), spread or by_name
        if candidates is None or spread or candidates >= unary.shape[2]:
            return cls(batch, state, None, spread, first, by_name)
        among = torch.cat([first, unary[:, 1:depth]], 1).topk(candidates, sorted=False).indices
        return cls(batch, state, among, False, first.gather(2, among[:, :1]), by_name)

    def whole(self) -> "SlotScores":
        """The same block's scores over the target's vocabulary."""
        first = self.first if self.among is None else self.state.conditional(0, self.batch.last_tokens())
        return replace(self, among=None, spread=True, first=first)

    def __call__(self, level: int, nodes: Tensor, above: Tensor | None, path: Path,
                 going: Tensor | None) -> Tensor:  # fmt: skip
        """The scores of the children of `nodes [A, n]`, at depth `level`, `[A, n or 1, X]`: 1 for n times the same.

        above [A, n]: see `SlotState.conditional`; path: `path() [A, n, level]`, the tokens down to them; going: see
        `Batch.process`.

        Without processors these are the logits, whose faults are the caller's to report."""
        among = None if self.among is None else self.among[:, level]
        logits = self.first if level == 0 else self.state.conditional(level, nodes, among, above)
        if self.spread:
            logits = over_target(logits, self.state.ids, self.batch.rows.target.vocab_size)
        if self.by_name:
            logits = logits.expand(-1, nodes.shape[1], -1)
        if not self.batch.rows.processors.change_scores:
            return logits
        return self.batch.process(logits, path, "draft", going)

    def likeliest(self, level: int, nodes: Tensor, above: Tensor | None, path: Path, going: Tensor | None,
                  count: int) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The log-probabilities of the likeliest children of `nodes [A, n]`, `[A, n or 1, C]`, and their columns.

        C: `count`, or X if that is less; other arguments: see `__call__`."""
        if level > 0 and self.among is not None and not self.batch.rows.processors.change_scores:
            factors, among = self.state.factors(level, nodes), self.among[:, level]
            if factors is not None:
                return likeliest_among(factors, among, min(count, among.shape[1]))
        scores = self(level, nodes, above, path, going)
        return top_log_probs(scores, min(count, scores.shape[2]))

    def names(self, level: int) -> tuple[Tensor | None, Tensor | None]:
        """What a level's columns stand for: drafted tokens `[A, M]` (None: the columns themselves), and of all drafted
        tokens the target's ids `[V']` (None: the drafted tokens themselves)."""
        if self.spread:
            return None, None
        return None if self.among is None else self.among[:, level], self.state.ids

    def tokens(self, level: int, columns: Tensor) -> Tensor:
        """The target's tokens of `columns [A, m]` of a level's scores."""
        among, ids = self.names(level)
        drafted = columns if among is None else among.gather(1, columns)
        return drafted if ids is None else ids[drafted]
