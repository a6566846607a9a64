"""A draft model grows its own tree for every row and round, deeper where it is confident.

Expansion: at each depth the `width` best nodes of the level before, by the product of draft probabilities along their
path, get their `width` most likely children. Reranking: of all nodes seen, the `num_tokens` with the largest products
form the tree. A child's product never exceeds its parent's, so a node's parent is in the tree too. The tree is a
deterministic function of the text, so with sampling `tree_exact` verifies it without draft probabilities. Source: Li et
al. 2024 (EAGLE-2), section 4."""

from collections.abc import Sequence

import torch
from torch import Tensor

from attention.kv.window import KeyWindow
from specdec.drafters.base import DrafterTraits, DraftState
from specdec.drafters.expansion import Expansion
from specdec.drafters.model_state import ModelState, require_draft_model
from specdec.drafters.reach import propose_within
from specdec.model.runner import ModelRunner
from specdec.requests.batch import Batch
from specdec.requests.rows import Row, Rows
from specdec.sampling.draws import top_log_probs
from specdec.sampling.processors import may_follow
from specdec.trees.draft import Draft
from specdec.trees.tree import TokenTree, require_width


class DynamicTreeDrafter:
    """Drafts trees of `num_tokens` nodes with the causal language model `draft`.

    Trees are at most `depth` deep, expand `width` nodes per level, and are chosen on the device, one per row. The draft
    model may differ from the target as in `ModelDrafter`. Raises ValueError for numbers below 1, for more nodes than
    the expansion sees and, in `validate`, for a target of another vocabulary."""

    def __init__(self, draft, num_tokens: int = 16, depth: int = 5, width: int = 4, kv_dtype: str | None = None,
                 window: int | None = None, sinks: int = 0):  # fmt: skip
        require_expansion(num_tokens, depth, width)
        self.runner = ModelRunner(draft, kv_dtype=kv_dtype, mode="eager", sees=KeyWindow.of(window, sinks))
        longest = self.runner.max_positions
        self.traits = DrafterTraits(num_tokens, captured=True, own_depth=depth, max_length=longest,
                                    own_tokens=depth * width)  # fmt: skip
        self.depth, self.width = depth, width

    def validate(self, target: ModelRunner) -> None:
        """Raise ValueError unless the draft model fits `target`."""
        require_draft_model(self.runner, target)
        require_width(TokenTree.from_widths((self.width,)), min(self.runner.vocab_size, target.vocab_size))

    def start(self, rows: Rows, max_tokens: int) -> "DynamicTreeSession":
        """Begin to draft; the draft model's cache gets room for all expanded nodes, not only the proposed ones."""
        state = ModelState(self.runner, rows, self.traits.own_tokens)
        return DynamicTreeSession(state, self.traits.max_tokens, self.depth, self.width, self.traits.max_length)


def require_expansion(num_tokens: int, depth: int, width: int) -> None:
    """Raise ValueError for numbers below 1, and more nodes than the expansion sees."""
    if min(num_tokens, depth, width) < 1:
        raise ValueError(f"num_tokens, depth and width must be at least 1, got {num_tokens}, {depth} and {width}")
    if num_tokens > (seen := width + (depth - 1) * width * width):
        raise ValueError(f"width {width} and depth {depth} give {seen} nodes to choose {num_tokens} from")


class DynamicTreeSession:
    """One call of a `DynamicTreeDrafter`; the expanded ("run") nodes are the root and W = width per level.

    ids [V']: the target's ids of the tokens that the logits of `state` are over (None: they are the target's)."""

    def __init__(self, state: DraftState, num_tokens: int, depth: int, width: int, max_length: int | None = None,
                 ids: Tensor | None = None):  # fmt: skip
        self._ids = ids
        self.states, self._state, self._num_tokens = (state,), state, num_tokens
        self._depth, self._width, self._max_length = depth, width, max_length
        self.reads = () if state.reader is None else state.reader.reads

    def min_length(self, tree: TokenTree | None) -> int:
        """See `DraftSession.min_length`: a captured round runs the whole accepted path again."""
        reader = self._state.reader
        return self._depth + 1 if reader is None else reader.min_length

    def propose(self, batch: Batch, tree: TokenTree | None = None) -> Draft:
        """A tree for every row whose text is not too long; nothing before there are the features that it reads."""
        if self._state.reader is not None and batch.features is None:
            return Draft(TokenTree.chain(0), batch.last_tokens())
        least = 1 if self._state.reader is None else self._state.reader.shortest
        return propose_within(batch, self._max_length, self._grow, least)

    def _grow(self, batch: Batch) -> Draft:
        """Expand level by level, then keep the best nodes."""
        processors, logits = batch.rows.processors, self._state.catch_up(batch)[:, None]
        tree = Expansion(batch.last_tokens(), self._depth, self._width, self._ids)
        # the tokens down to the last level's nodes, and after which of them a text can go on (None: all)
        path, going = logits.new_empty(batch.size, 1, 0, dtype=torch.int64), None
        while True:
            unwritten = None if processors.need_prefix else batch.unwritten(logits)
            scores = batch.process(logits, path.contiguous, "draft", going) if unwritten is None else unwritten
            likelihoods, likely = top_log_probs(scores, self._width)  # [A, W, W]
            if unwritten is not None:
                batch.report_logits(likelihoods[..., 0], "draft")
            chosen = tree.expand(likelihoods, likely)
            if chosen is None:
                return tree.best(self._num_tokens + 1)
            if unwritten is None:
                before = path.gather(1, chosen.above[..., None].expand(-1, -1, path.shape[2]))
                path = torch.cat([before, chosen.tokens[..., None]], 2)
            if processors.need_prefix:
                going = may_follow(chosen.tokens, tree.run.value, batch.ends[:, None])
            logits = self._state.run(batch, chosen.tokens, tree.run.mask, chosen.above)

    def admit(self, rows: Rows, joining: Sequence[Row]) -> None:
        """See `DraftSession.admit`."""
        self._state.admit(rows, joining)

    def commit(self, batch: Batch, paths: Sequence[Sequence[int]]) -> None:
        """Drop all expanded nodes; accepted tokens run again in the next round's first forward."""
        self._state.truncate(batch.members, [row.length_before for row in batch.members])

    def release(self, rows: Sequence[Row]) -> None:
        """Give the rows' pages back."""
        self._state.release(rows)
