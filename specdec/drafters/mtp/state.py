"""The rows of a drafter with one MTP module a depth: level d of a draft is the work of module d alone.

Module d predicts the children of the nodes at depth d from steps over all nodes down to there, each of which reads what
module d - 1 gave for its parent. Steps of module d before these are whole only up to the token before the last d ones
(`mtp.steps`), so nodes take the places of the rest. Nothing of a round stays: the next one begins with steps of all
modules over what was accepted, and over the last D - 1 steps before it, with the target's states."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from specdec.drafters.base import FeatureReader
from specdec.drafters.feature_state import FeatureState
from specdec.drafters.mtp.steps import MtpModules
from specdec.model.feature_runner import FeatureRunner
from specdec.requests.batch import Batch
from specdec.requests.rows import Row, Rows
from specdec.trees.tensors import Tree


class ModulesState:
    """A `DraftState` over a `FeatureState`, for drafts of at most as many levels as there are modules.

    Drafts may append `max_tokens` nodes to a row. D: modules; h: width of their states."""

    reader: FeatureReader | None

    def __init__(self, runner: FeatureRunner, rows: Rows, max_tokens: int):
        self._text = text = FeatureState(runner, rows, max_tokens)
        self._count = len(cast(MtpModules, runner.source).depths)
        self.runner, self.draft_room, self.reader = runner, text.draft_room, text
        self.pages_wanted, self.with_pages, self.release = text.pages_wanted, text.with_pages, text.release
        self.admit, self.truncate, self.prefix_sequence = text.admit, text.truncate, text.prefix_sequence
        self._roots: Tensor | None = None  # [A, D, h]: what each module gave for the step of the last token
        self._nodes: Tensor | None = None  # [A, N, h]: what the last module gave for the nodes so far
        self._tokens: Tensor | None = None  # [A, N]
        self._above: Tensor | None = None  # [A, N]: places of parents, 0 for the root
        self._level = 0
        self._last = 0  # the place of the first node of the last run, the root's being 0

    def catch_up(self, batch: Batch) -> Tensor:
        """See `DraftState.catch_up`; all modules run over the text."""
        count = self._count
        output, hidden = self._text.run_text(batch, last=count)
        depth = torch.arange(count, device=hidden.device)
        self._roots, self._level = hidden[:, count - 1 - depth, depth], 0
        self._last = 0
        self._tokens = batch.last_tokens()[:, :0]
        self._above, self._nodes = self._tokens, self._roots[:, :0]
        return self.runner.logits(output[:, -1])

    def run(self, batch: Batch, tokens: Tensor, tree: Tree = None, above: Tensor | None = None) -> Tensor:
        """See `DraftState.run`; the next module runs over all nodes so far."""
        assert self._tokens is not None and self._above is not None and above is not None
        assert self._roots is not None and self._nodes is not None
        before = torch.cat([self._roots[:, self._level, None], self._nodes], 1)
        self._level = level = self._level + 1
        above = above.expand(len(tokens), -1) + self._last  # among the nodes of the last run
        self._last = 1 + self._tokens.shape[1]
        self._tokens = torch.cat([self._tokens, tokens], 1)
        self._above = torch.cat([self._above, above], 1)
        states = before.gather(1, self._above[..., None].expand(-1, -1, before.shape[2]))
        rows, count = self._tokens.shape
        if batch.captured:
            memory = batch.rows.memory(self.runner, self.draft_room)
            torch.sub(batch.rows.lengths, 1 + level, out=memory.lengths)
            over = self.runner.appended_rows(memory, count, tree)
        else:
            self._text.truncate_steps(batch.members, [row.length - 1 - level for row in batch.members])
            over = self.runner.appended(self._text.sequences(batch.members), [count] * rows, tree)
        given = self._tokens.flatten(), states.flatten(0, 1), over
        output, hidden = self.runner.run(lambda model: cast(MtpModules, model).deeper(level, *given))
        self._nodes = hidden.unflatten(0, (rows, count))
        output = output.unflatten(0, (rows, count))[:, count - tokens.shape[1] :]
        logits = self.runner.run(lambda model: cast(MtpModules, model).logits(output.flatten(0, 1), level))
        return logits.unflatten(0, tokens.shape)

    def see(self, rows: Rows, members: Sequence[Row]) -> None:
        """Do nothing: the sequences never fall behind."""

    def end_proposal(self, batch: Batch) -> None:
        """Forget the nodes' states; their steps stay until `truncate`."""
        self._roots = self._nodes = self._tokens = self._above = None
