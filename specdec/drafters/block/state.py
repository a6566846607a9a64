"""The rows of a block drafter: their context in its cache, and what one pass over each row's block gives.

Slot i of a sequence holds the context's keys and values of token i, made of the target's features of that token alone.
A text of L tokens, of which the target has run all but the last one, so has L - 1 slots, as many as the sequences of a
`FeatureState`, which keeps them; the last token is the anchor of the next block. The nodes of a block follow, until the
round drops them."""

from collections.abc import Callable, Sequence
from typing import cast

from torch import Tensor

from attention.paged.batch import build_batch
from specdec.drafters.base import FeatureReader
from specdec.drafters.block.slots import Factors
from specdec.drafters.block.steps import BlockSteps
from specdec.drafters.feature_state import FeatureState
from specdec.model.feature_runner import FeatureRunner
from specdec.requests.batch import Batch
from specdec.requests.rows import Row, Rows
from specdec.trees.tensors import Tree


class BlockState:
    """A `SlotState`: one pass a proposal, whose slots are the levels of a draft.

    Given the tokens before, a slot's logits are its own and what the head says of the token before, or of all those in
    the block; without a head all nodes of a level have one distribution. K: slots; h, r as in `BlockModel`."""

    reader: FeatureReader | None

    def __init__(self, runner: FeatureRunner, rows: Rows):
        self.network = network = cast(BlockSteps, runner.source).network
        room = 2 * network.config.block_size
        self._context = context = FeatureState(runner, rows, room)
        self.runner, self.draft_room, self.reader = runner, context.draft_room, context
        self.pages_wanted, self.with_pages = context.pages_wanted, context.with_pages
        self._hidden: Tensor | None = None  # [A, K, h]
        self._unary: Tensor | None = None  # [A, K, V_draft]
        self._start: Tensor | None = None  # [A, 1, r]: the recurrent head's state before the block
        self._levels: list[Tensor] = []  # of each level [A, n, r]: and after the nodes that `conditional` was given
        self._level = 0

    def admit(self, rows: Rows, joining: Sequence[Row]) -> None:
        """See `DraftSession.admit`."""
        self._context.admit(rows, joining)

    @property
    def ids(self) -> Tensor | None:
        """See `SlotState.ids`."""
        return self.network.draft_tokens

    def slots(self, batch: Batch) -> Tensor:
        """See `SlotState.slots`."""
        context = self._context
        if not batch.captured:
            context.truncate(batch.members, [row.length for row in batch.members])
        context.keep_up(batch)
        tokens = self.network.block_tokens(batch.last_tokens()[:, 0])
        places = self._pass(batch, tokens)
        self._hidden = hidden = self.network.slots(places)
        self._unary = self.runner.run(lambda model: cast(BlockSteps, model).network.logits(hidden))
        memory = self.network.memory(places, tokens[:, 0])
        self._level, self._levels = 0, []
        self._start = None if memory is None else memory[:, None]
        return self._unary

    def conditional(self, level: int, tokens: Tensor, among: Tensor | None = None,
                    above: Tensor | None = None) -> Tensor:  # fmt: skip
        """See `SlotState.conditional`. Raises ValueError without `above` where the head reads all tokens before."""
        assert self._unary is not None and self._hidden is not None
        head, unary = self.network.head, self._unary[:, level, None]
        unary = unary if among is None else unary.gather(2, among[:, None])
        hidden = self._hidden[:, level, None].expand(-1, tokens.shape[1], -1)
        if self._start is not None:
            if level > 0 and (above is None or len(self._levels) < level):
                kind = self.network.config.markov
                raise ValueError(f"a head {kind!r} depends on all tokens before: level {level} needs the nodes above")
            memory = self._start if above is None else below(self._levels[level - 1], above)
            logits, memory = self.network.follow(level, unary, tokens, hidden, memory, among)
            self._levels[level:] = [memory]
            return logits
        return unary if head is None else unary + head.added(head.said(tokens, hidden), among)

    def factors(self, level: int, tokens: Tensor) -> Factors | None:
        """See `SlotState.factors`."""
        head = self.network.head
        if head is None:
            return None
        assert self._unary is not None and self._hidden is not None
        hidden = self._hidden[:, level, None].expand(-1, tokens.shape[1], -1)
        return Factors(self._unary[:, level], *head.vectors(tokens, hidden), head.weight)

    def catch_up(self, batch: Batch) -> Tensor:
        """See `DraftState.catch_up`; the block's pass runs too."""
        self.slots(batch)
        return self._follow(batch.last_tokens())[:, 0]

    def run(self, batch: Batch, tokens: Tensor, tree: Tree = None, above: Tensor | None = None) -> Tensor:
        """The logits of the next level's slot after each of `tokens [A, n]`, `[A, n, V]`; see `DraftState.run`."""
        self._level += 1
        return self._follow(tokens, None if above is None else above.expand(len(tokens), -1))

    def confident(self, threshold: float) -> Callable[[Tensor], Tensor]:
        """See `ModelDraftSession`'s `goes_on`: whether the next token is accepted with a probability of `threshold`."""

        def goes_on(tokens: Tensor) -> Tensor:
            assert self._hidden is not None
            return self.network.accepted(self._hidden[:, self._level, None], tokens)[:, 0].sigmoid() >= threshold

        return goes_on

    def _pass(self, batch: Batch, tokens: Tensor) -> Tensor:
        """Append each row's block `tokens [A, B]` twice, see `steps`, and run it -> `[A, B, h]`."""
        rows, size = tokens.shape
        depths, bits = tokens.new_zeros(1, 2 * size), tokens.new_zeros(1, 2 * size, -(-2 * size // 64))
        if batch.captured:
            memory = batch.rows.memory(self.runner, self.draft_room)
            held, queries = memory.append(size), memory.append(size, (depths, bits))
        else:
            sequences, counts = self._context.sequences(batch.members), [size] * rows
            self.runner.cache.append(sequences, counts)
            held = build_batch(self.runner.cache, sequences, counts)
            self.runner.cache.append(sequences, counts)
            trees = depths.expand(rows, -1), bits.expand(rows, -1, -1)
            queries = build_batch(self.runner.cache, sequences, counts, trees)
        return self.runner.run(lambda model: cast(BlockSteps, model).block(tokens, held, queries))

    def _follow(self, tokens: Tensor, above: Tensor | None = None) -> Tensor:
        """The logits of the present level's slot after each of `tokens [A, n]`, over the target's vocabulary."""
        logits = self.network.over_target(self.conditional(self._level, tokens, None, above))
        return logits.repeat(1, tokens.shape[1] // logits.shape[1], 1)

    def see(self, rows: Rows, members: Sequence[Row]) -> None:
        """Do nothing: the sequences never fall behind."""

    def end_proposal(self, batch: Batch) -> None:
        """Forget the slots; the block's nodes stay in the cache until `truncate`."""
        self._hidden = self._unary = self._start = None
        self._levels = []

    def truncate(self, rows: Sequence[Row], lengths: Sequence[int]) -> None:
        """See `DraftState.truncate`."""
        self._context.truncate(rows, lengths)

    def prefix_sequence(self, row: Row) -> int | None:
        """See `DraftState.prefix_sequence`."""
        return self._context.prefix_sequence(row)

    def release(self, rows: Sequence[Row]) -> None:
        """See `DraftState.release`."""
        self._context.release(rows)


def below(memory: Tensor, above: Tensor) -> Tensor:
    """`memory [A, R, r]` of the nodes `above [A, n]`, `[A, n, r]`."""
    return memory.gather(1, above[..., None].expand(-1, -1, memory.shape[2]))
