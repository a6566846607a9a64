"""The rows' sequences in the cache of a draft model that reads the target's features.

Slot i of a sequence holds the step of token i + 1: its embedding with the target's features of token i. A text of L
tokens, of which the target has run all but the last one, so has L - 1 steps, and the last of them drafts token L. Steps
of drafted nodes follow, with what the draft model gave for the node above instead of features; a round drops them all,
and those of accepted tokens run again with the target's features (Li et al. 2025, EAGLE-3: never stale).

A step that reads more than one token (`FeatureTraits.tokens_ahead`, D) does so of the D tokens after that of its
features. The last D - 1 steps of a text lack some of these; they run again when more of the text is known.

See `FeatureReader` for how the sequences keep up. What they lack between rounds are at most the last steps, whose
features are in `Rows.features`. A captured round, which cannot know how many these are, runs all of those again."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from attention import OutOfPages
from attention.gpu import to_device
from specdec.drafters.own_sequences import OwnSequences
from specdec.model.feature_runner import FeatureRunner
from specdec.requests.batch import Batch
from specdec.requests.rows import Row, Rows
from specdec.trees.tensors import Tree

Ahead = tuple[Tensor, Tensor]
"""Tokens `[n]` and features `[n, F]` of steps after a text whose tokens nobody knows yet."""


class FeatureState:
    """A `DraftState` and `FeatureReader` over the own cache of `runner`; drafts may append `max_tokens` nodes to a row.

    Logits are over the target's vocabulary, or those of its `own` tokens alone (`FeatureModel.ids`)."""

    def __init__(self, runner: FeatureRunner, rows: Rows, max_tokens: int, own: bool = False):
        self.runner, self.draft_room, self.reader, self._kept = runner, max_tokens, self, rows.feature_room
        self._ahead = runner.source.traits.tokens_ahead
        self._first = dict[Row, int]()  # steps that a sequence began with, of a prefix: whole, without features here
        held = OwnSequences(runner, lambda length: max_tokens + length)
        self._own, self.sequences, self._own_logits = held, held.of, own
        self.pages_wanted, self.with_pages = held.pages_wanted, held.with_pages
        runner.match_mode(rows.target)
        self._hidden: Tensor | None = None  # [A, n, h]: of the nodes of the last run in this proposal
        self.admit(rows, rows.members)

    @property
    def reads(self) -> tuple[int, ...]:
        """See `DraftSession.reads`."""
        return self.runner.reads

    @property
    def min_length(self) -> int:
        """See `FeatureReader.min_length`: the last token has no features yet."""
        return self._kept + 1

    @property
    def shortest(self) -> int:
        """See `FeatureReader.shortest`: with a whole step of the text."""
        return self._ahead + 1

    def admit(self, rows: Rows, joining: Sequence[Row]) -> None:
        """See `DraftSession.admit`."""
        self._own.add(joining)

    def release(self, rows: Sequence[Row]) -> None:
        """See `DraftState.release`."""
        self._own.release(rows)
        for row in rows:
            self._first.pop(row, None)

    def take_in(self, rows: Rows, members: Sequence[Row], features: Sequence[Tensor]) -> None:
        """See `FeatureReader.take_in`."""
        given = [(row, x) for row, x in zip(members, features, strict=True) if len(x)]
        if not given:
            return
        members, cache = [row for row, _ in given], self.runner.cache
        sequences, starts = self.sequences(members), [self._start(row) for row in members]
        again = [cache.length(sequence) - start for sequence, start in zip(sequences, starts, strict=True)]
        counts, parts, texts = list[int](), list[Tensor](), list[Tensor]()
        for (row, x), start, count in zip(given, starts, again, strict=True):
            before = rows.features[row.slot, self._kept - count :] if count and rows.features is not None else x[:0]
            counts.append(count + len(x))
            parts += [before, x]
            texts.append(self._tokens(rows, row, start, counts[-1]))
        self._own.truncate(members, starts)
        try:
            self.runner.forward(sequences, torch.cat(texts), torch.cat(parts), True, counts)
        except OutOfPages:
            cache.append(sequences, again)  # lengths say which features come next
            raise

    def keep_up(self, batch: Batch) -> None:
        """See `FeatureReader.keep_up`."""
        if batch.captured:
            self._run_all_kept(batch)
            return
        lacking = [row for row in batch.members if self._lacking(batch, row) > 0]
        if lacking:
            self._run_last(batch, lacking, [row.length - 1 - self._start(row) for row in lacking])

    def catch_up(self, batch: Batch) -> Tensor:
        """See `DraftState.catch_up`."""
        output, self._hidden = self.run_text(batch)
        return self.runner.logits(output[:, 0], self._own_logits)

    def run_text(self, batch: Batch, ahead: Ahead | None = None, last: int = 1) -> tuple[Tensor, Tensor]:
        """Run the steps of the text that are lacking, and n more ones `ahead` of it for each row, in one forward.

        Returns output and hidden `[A, last + n, h]` of the text's last steps and of those ahead."""
        more = last if ahead is None else last + len(ahead[0])
        if batch.captured:
            output, hidden = self._run_all_kept(batch, ahead)
            return output[:, -more:], hidden[:, -more:]
        counts = [row.length - 1 - self._start(row, row.length - 2) for row in batch.members]
        output, hidden = self._run_last(batch, batch.members, counts, ahead)
        ends = torch.tensor([*accumulate(count + more - last for count in counts)])[:, None] + torch.arange(-more, 0)
        ends = to_device(ends, self.runner.device)
        return output[ends], hidden[ends]

    def _lacking(self, batch: Batch, row: Row) -> int:
        """How many steps a row's sequence lacks of those whose features the target has given."""
        known = min(row.length - 1, batch.rows.target.cache.length(row.sequence))
        return known - self.runner.cache.length(self.sequences([row])[0])

    def _start(self, row: Row, most: int | None = None) -> int:
        """The first step to run next, at most step `most`: of those that lack a token, or that were not run yet."""
        held = self.runner.cache.length(self.sequences([row])[0])
        first = self._first.setdefault(row, held)
        return max(min(first, held), (held if most is None else min(held, most)) - (self._ahead - 1))

    def _tokens(self, rows: Rows, row: Row, start: int, count: int) -> Tensor:
        """What `count` steps from `start` on read, `[count]` or `[count, D]`; any token for those after the text."""
        text = rows.tokens[row.slot]
        if self._ahead == 1:
            return text[start + 1 : start + 1 + count]
        place = start + 1 + torch.arange(count)[:, None] + torch.arange(self._ahead)
        return text[to_device(place.clamp(max=len(text) - 1), text.device)]

    def _run_last(self, batch: Batch, members: Sequence[Row], counts: Sequence[int],
                  ahead: Ahead | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Run the last `counts` steps of rows, and those `ahead` of each, in place of what they hold -> `[T, h]`."""
        rows, pairs = batch.rows, [*zip(members, counts, strict=True)]
        assert rows.features is not None
        self._own.truncate(members, [row.length - 1 - count for row, count in pairs])
        tokens = [self._tokens(rows, row, row.length - 1 - count, count) for row, count in pairs]
        features = [rows.features[row.slot, self._kept - count :] for row, count in pairs]
        if ahead is not None:
            tokens = [part for text in tokens for part in (text, ahead[0])]
            features = [part for states in features for part in (states, ahead[1].to(states.dtype))]
            counts = [count + len(ahead[0]) for count in counts]
        return self.runner.forward(self.sequences(members), torch.cat(tokens), torch.cat(features), True, counts)

    def _run_all_kept(self, batch: Batch, ahead: Ahead | None = None) -> tuple[Tensor, Tensor]:
        """In a captured round, run the last steps of all rows again, and those `ahead` -> `[B, K + n, h]`."""
        rows, features, tokens = batch.rows, batch.rows.features, batch.recent(self._kept)
        assert features is not None
        if self._ahead > 1:
            place = torch.arange(self._kept)[:, None] + torch.arange(self._ahead)
            tokens = tokens[:, to_device(place.clamp(max=self._kept - 1), tokens.device)]
        if ahead is not None:
            more, states = ahead
            tokens = torch.cat([tokens, more.expand(len(tokens), -1)], 1)
            features = torch.cat([features, states.to(features.dtype).expand(len(features), -1, -1)], 1)
        memory = rows.memory(self.runner, self.draft_room)
        torch.sub(rows.lengths, 1 + self._kept, out=memory.lengths)
        return self.runner.forward_rows(memory, tokens, features, True)

    def see(self, rows: Rows, members: Sequence[Row]) -> None:
        """Do nothing: the sequences never fall behind."""

    def run(self, batch: Batch, tokens: Tensor, tree: Tree = None, above: Tensor | None = None) -> Tensor:
        """See `DraftState.run`."""
        assert self._hidden is not None and above is not None
        if above.ndim == 1:
            states = self._hidden.index_select(1, above)
        else:
            states = self._hidden.gather(1, above[..., None].expand(-1, -1, self._hidden.shape[2]))
        if batch.captured:
            memory = batch.rows.memory(self.runner, self.draft_room)
            output, self._hidden = self.runner.forward_rows(memory, tokens, states, False, tree)
        else:
            given, counts = (tokens.flatten(), states.flatten(0, 1)), [tokens.shape[1]] * len(tokens)
            packed = self.runner.forward(self.sequences(batch.members), *given, False, counts, tree)
            output, self._hidden = (x.unflatten(0, tokens.shape) for x in packed)
        return self.runner.logits(output, self._own_logits)

    def end_proposal(self, batch: Batch) -> None:
        """Forget the nodes' states; their steps stay until `truncate`."""
        self._hidden = None

    def truncate(self, rows: Sequence[Row], lengths: Sequence[int]) -> None:
        """See `DraftState.truncate`; steps before those that `Rows.features` can bring back stay in any case."""
        kept, pairs = self._kept - (self._ahead - 1), zip(rows, lengths, strict=True)
        self._own.truncate(rows, [max(length, row.length - kept, 1) - 1 for row, length in pairs])

    def truncate_steps(self, rows: Sequence[Row], counts: Sequence[int]) -> None:
        """Keep at most the first `counts` steps of each row, whatever `Rows.features` can bring back."""
        self._own.truncate(rows, counts)

    def prefix_sequence(self, row: Row) -> int | None:
        """See `DraftState.prefix_sequence`."""
        return self.sequences([row])[0]
