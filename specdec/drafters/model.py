"""A smaller model drafts a chain or a static tree, level by level.

Source: Leviathan et al. 2023 and Chen et al. 2023 for chains; Chen et al. 2024 (Sequoia) for trees."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from attention.kv.window import KeyWindow
from specdec.cuda_graph import keep_alive
from specdec.drafters.base import DrafterTraits, DraftState
from specdec.drafters.model_state import ModelState, require_draft_model
from specdec.drafters.reach import propose_within
from specdec.model.runner import ModelRunner
from specdec.requests.batch import Batch
from specdec.requests.rows import Row, Rows
from specdec.sampling.draws import best, highest, sample_distinct, top
from specdec.sampling.noise import Stream
from specdec.sampling.processors import may_follow
from specdec.sampling.warped import Scores
from specdec.trees.draft import Draft
from specdec.trees.tree import TokenTree, require_width, tree_to_draft


class ModelDrafter:
    """Drafts a chain of `num_tokens`, or `tree`, with `draft`, a causal language model with the target's vocabulary.

    With sampling it draws from its own distribution after the target's processors, children of a node without
    replacement; with greedy decoding or `sample=False` it takes the most likely tokens. `confidence` ends a row's chain
    after the first token of smaller probability; that token is still proposed, since dropping it would favour likely
    tokens. In eager rounds `confidence` waits for the device once per token.

    The draft model may have another dtype, fewer positions (rows with a longer text go on in plain steps, beside rows
    that are drafted) and a table of tokens with other padding (`vocabulary.require_one_vocabulary`); `kv_dtype` "int8"
    or "fp8" quantises its own cache. With `window` it attends to the last `window` tokens and the first `sinks` ones
    only, which costs less for long texts. It may run on another device than the target: tokens then go there and logits
    come back at every level, and the host runs the rounds. The output stays exact, since tokens are still drawn from
    the reported distribution. Raises ValueError for num_tokens < 1, for a confidence outside (0, 1) or with a tree that
    is no chain and, in `validate`, for a target of another vocabulary."""

    def __init__(self, draft, num_tokens: int = 5, tree: TokenTree | None = None, sample: bool = True,
                 confidence: float | None = None, kv_dtype: str | None = None, window: int | None = None,
                 sinks: int = 0):  # fmt: skip
        if not isinstance(num_tokens, int) or num_tokens < 1:
            raise ValueError(f"num_tokens (the draft length γ) must be an integer of at least 1, got {num_tokens!r}")
        self.tree = tree_to_draft(num_tokens, tree)
        if confidence is not None and not (0 < confidence < 1 and self.tree.is_chain):
            raise ValueError(
                f"confidence must lie in (0, 1) and goes with a chain, got {confidence} and parents {self.tree.parents}"
            )
        self.runner = ModelRunner(draft, kv_dtype=kv_dtype, mode="eager", sees=KeyWindow.of(window, sinks))
        self.traits = DrafterTraits(
            self.tree.size - 1, "tree" if confidence is None else "chain", captured=True,
            own_depth=self.tree.max_depth, max_length=self.runner.max_positions, tree=self.tree,
        )  # fmt: skip
        self._sample, self._confidence = sample, confidence

    def validate(self, target: ModelRunner) -> None:
        """Raise ValueError unless the draft model fits `target`."""
        require_draft_model(self.runner, target)
        require_width(self.tree, min(self.runner.vocab_size, target.vocab_size))

    def start(self, rows: Rows, max_tokens: int) -> "ModelDraftSession":
        """Begin to draft; the draft model's cache gets room for every row."""
        state, sample = ModelState(self.runner, rows, max_tokens), self._sample and rows.do_sample
        return ModelDraftSession(state, self.tree, sample, self._confidence, max_length=self.traits.max_length)


class ModelDraftSession:
    """One call of a model that drafts.

    adjust: changes the scores before tokens are drawn.
    lacks: whether `adjust` may forbid every token at a node.
    max_length: see `DrafterTraits`.
    goes_on: with a chain, tells from each row's token before `[A, 1]` whether the chain gets another, `[A]` (None: it
        does); it must not see the tokens that it is asked about.
    """

    def __init__(self, state: DraftState, tree: TokenTree, sample: bool, confidence: float | None = None,
                 adjust: Callable[[Tensor], Tensor] | None = None, lacks: bool = False,
                 max_length: int | None = None, goes_on: Callable[[Tensor], Tensor] | None = None):  # fmt: skip
        self.states, self._state, self._tree, self._sample, self._confidence = (state,), state, tree, sample, confidence
        self._adjust, self._lacks, self._max_length, self._goes_on = adjust, lacks, max_length, goes_on
        self._chains: set[Row] = set()  # rows whose last draft was a chain
        self.reads = () if state.reader is None else state.reader.reads

    def min_length(self, tree: TokenTree | None) -> int:
        """See `DraftSession.min_length`: the tokens that a round may add and the cache lacks.

        These are the last two after a chain, and the whole path after a tree, whose nodes the cache drops."""
        if self._state.reader is not None:
            return self._state.reader.min_length
        tree = tree or self._tree
        return 2 if tree.is_chain else tree.max_depth + 1

    def propose(self, batch: Batch, tree: TokenTree | None = None) -> Draft:
        """A draft of the shape `tree` (None: the drafter's own) for every row whose text is not too long or short.

        Nothing before there are the features that the state reads."""
        if self._state.reader is not None and batch.features is None:
            return Draft(TokenTree.chain(0), batch.last_tokens())
        tree = (tree or self._tree).by_level()
        least = 1 if self._state.reader is None else self._state.reader.shortest
        return propose_within(batch, self._max_length, lambda short: self._draft(short, tree), least)

    def _draft(self, batch: Batch, tree: TokenTree) -> Draft:
        """Draft level by level; the first forward also runs the accepted tokens that the cache lacks."""
        self._chains = self._chains | {*batch.members} if tree.is_chain else self._chains - {*batch.members}
        uniform = batch.noise().uniform(Stream.DRAFT, tree.size - 1) if self._sample else None
        tokens = batch.last_tokens().expand(-1, tree.size).clone()
        processors = batch.rows.processors
        open_ended = processors.need_prefix or self._lacks  # a node may have no token at all
        # or fewer tokens than children
        sparse = open_ended or not tree.is_chain and (self._sample or processors.change_scores)
        whole = self._confidence is None and self._goes_on is None and not sparse  # no node can be absent
        unwritten = self._sample and not processors.need_prefix and self._adjust is None and self._confidence is None
        valid, q, known = torch.ones_like(tokens, dtype=torch.bool), None, 0  # q of the first `known` internal nodes
        going = valid.clone() if processors.need_prefix else None  # nodes after which a text can go on
        logits, sure = self._state.catch_up(batch)[:, None], valid[:, 0]
        for level in keep_alive(level_plan(tree, tokens.device)):
            path = lambda level=level: tokens[:, level.paths]
            scores: Scores | None = batch.process_unwritten(logits, "draft") if unwritten else None
            if scores is None:
                open_nodes = None if going is None else going.index_select(1, level.inner)
                processed = batch.process(logits, path, "draft", open_nodes)
                scores = written = processed if self._adjust is None else self._adjust(processed)
                if open_ended and self._adjust is not None:
                    scores = torch.where(highest(processed)[..., None] > float("-inf"), written, float("-inf"))
            if self._sample and q is None:
                shape = batch.size, len(tree.internal), scores.shape[-1]
                q = logits.new_empty(shape, dtype=torch.promote_types(logits.dtype, torch.float32))
            of_level = None if q is None else q[:, known : known + len(level.nodes)]
            known += len(level.nodes)
            drawn, exists = choose_children(scores, level, uniform, of_level, sparse, open_ended)
            tokens[:, level.below] = drawn
            if not whole:
                valid[:, level.below] = exists & valid.index_select(1, level.parents)
            if self._goes_on is not None:
                valid[:, level.below] &= self._goes_on(tokens[:, level.inner])[:, None]
            if going is not None:  # not after a token that the processors forbid, which `adjust` may have drawn
                given = processed[torch.arange(batch.size, device=drawn.device)[:, None], level.pick[0], drawn]
                going[:, level.below] = valid[:, level.below] & may_follow(drawn, given, batch.ends[:, None])
            if self._confidence is not None:
                valid[:, level.below] &= sure[:, None]
                sure = sure & (written.softmax(-1)[:, 0].gather(1, drawn)[:, 0] >= self._confidence)
                ranks = batch.rows.target.ranks
                if not batch.captured and not ranks.decided(bool(sure.any())):  # every row has stopped
                    tree = TokenTree.chain(level.below.start)
                    break
            if level.run is not None:
                run = drawn if tree.is_chain else tokens.index_select(1, level.run)
                logits = self._state.run(batch, run, level.ran, level.above)
        self._state.end_proposal(batch)
        distinct, q = self._sample and not tree.is_chain, None if q is None else q[:, :known]
        return Draft(tree, tokens[:, : tree.size], q, distinct, None if whole else valid[:, : tree.size])

    def admit(self, rows: Rows, joining: Sequence[Row]) -> None:
        """See `DraftSession.admit`."""
        self._state.admit(rows, joining)

    def commit(self, batch: Batch, paths: Sequence[Sequence[int]]) -> None:
        """Drop what the target rejected, and all nodes of a tree: accepted ones run again in the next first forward."""
        # the last token of a chain never entered the cache, so full acceptance leaves it one short
        chains = self._chains if self._state.reader is None else set()  # features of accepted nodes are others
        kept = [len(path) if row in chains else 0 for row, path in zip(batch.members, paths, strict=True)]
        lengths = [row.length_before + n for row, n in zip(batch.members, kept, strict=True)]
        self._state.truncate(batch.members, lengths)

    def release(self, rows: Sequence[Row]) -> None:
        """Give the rows' pages back."""
        self._state.release(rows)
        self._chains -= {*rows}


@dataclass(frozen=True, slots=True)
class Level:
    """How the C children of one level's internal nodes are drafted.

    nodes, inner: the internal nodes, on the host and on the device.
    paths [len(nodes), d]: the nodes from depth 1 down to each of them.
    below: the children, which are consecutive.
    parents [C]: the parent of each child.
    pick [2, C]: (which of `nodes`, rank) of each child.
    numbers [K, len(nodes)]: the random number that draws the child of each rank.
    run: children with children of their own, which the model runs next (None: none).
    ran: the tree of all nodes that it has run then.
    above: the parents of those that it runs next, among `nodes`, which it has run last.
    """

    nodes: tuple[int, ...]
    inner: Tensor
    paths: Tensor
    below: slice
    parents: Tensor
    pick: Tensor
    numbers: Tensor
    run: Tensor | None
    ran: TokenTree
    above: Tensor | None


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def level_plan(tree: TokenTree, device: torch.device) -> tuple[Level, ...]:
    """The levels of a tree whose nodes are ordered by depth, with their index tensors on the device."""
    plan, on_device = [], lambda values: torch.tensor(values, dtype=torch.int64, device=device)
    for depth in range(tree.max_depth):
        nodes = tuple(node for node in tree.levels[depth] if tree.children[node])
        below = tree.levels[depth + 1]
        parents, run = [tree.above[node] for node in below], [node for node in below if tree.children[node]]
        children = [tree.children[node] for node in nodes]
        # nodes with fewer children draw again with the number of their last one; the result is ignored
        numbers = [[some[min(rank, len(some) - 1)] - 1 for some in children] for rank in range(max(map(len, children)))]
        ran = [node for node in tree.internal if tree.depths[node] <= depth + 1]
        above = [nodes.index(tree.above[node]) for node in run]
        level = Level(
            nodes=nodes,
            inner=on_device(nodes),
            paths=on_device([tree.path(node) for node in nodes]),
            below=slice(below[0], below[-1] + 1),
            parents=on_device(parents),
            pick=on_device([[nodes.index(parent) for parent in parents], [tree.ranks[node] for node in below]]),
            numbers=on_device(numbers),
            run=on_device(run) if run else None,
            above=on_device(above) if run else None,
            ran=TokenTree(tuple(ran.index(tree.above[node]) if node else None for node in ran)),
        )
        plan.append(level)
    return tuple(plan)


def choose_children(scores: Scores, level: Level, uniform: Tensor | None, probs: Tensor | None = None,
                    sparse: bool = True, open_ended: bool = False) -> tuple[Tensor, Tensor | bool]:  # fmt: skip
    """Choose the C children of a level from `scores [A, len(nodes), V]`.

    Returns the tokens `[A, C]` and which of them exist (True: all).

    uniform [A, N - 1]: child c is drawn with number c - 1, without its earlier siblings' tokens; children for which no
        token is left are absent. None: take the most likely tokens.
    probs [A, len(nodes), V]: where to put the distributions that they are drawn from.
    sparse: tokens at -inf are absent; otherwise there must be none.
    open_ended: a node may have no token at all; its distribution is then replaced by a uniform one."""
    widest = level.numbers.shape[0]
    if uniform is None:
        assert isinstance(scores, Tensor)
        if widest == len(level.nodes) == 1:
            token = best(scores)
            return token, not sparse or scores.gather(2, token[..., None])[..., 0] > float("-inf")
        values, tokens = (x[:, level.pick[0], level.pick[1]] for x in top(scores, widest))
        return tokens, not sparse or values > float("-inf")
    numbers = uniform.index_select(1, level.numbers.flatten()).unflatten(1, level.numbers.shape).transpose(1, 2)
    drawn, left = sample_distinct(scores, numbers, probs=probs)
    if open_ended and probs is not None:
        probs.copy_(torch.where(left[..., :1], probs, 1 / probs.shape[-1]))
    if widest == len(level.nodes) == 1:
        return drawn[:, :, 0], left[:, :, 0]
    tokens, exists = (x[:, level.pick[0], level.pick[1]] for x in (drawn, left))
    return tokens, exists
