"""Recurrent states of a cache: checkpoints, rollback, commit by replay, forks, and what is refused."""

import pytest
import torch

from attention import OutOfPages, PagedKVCache, build_batch
from attention.kv.layout import KeyValueLayer, LayerLayout, RecurrentLayer
from attention.paged.batch import ancestor_bits
from attention.paged.device_batch import DeviceSequences
from attention.recurrent.layer import run_recurrent
from tests.attention.recurrent.problems import KINDS, PARENTS, by_tokens, problem

every_kind = pytest.mark.parametrize("kind", KINDS)
DEPTHS = [0]
for parent in PARENTS[1:]:
    DEPTHS.append(DEPTHS[parent] + 1)


class Texts:
    """A cache with two equal recurrent layers, and the random inputs of each sequence's tokens, by position."""

    def __init__(self, kind, cells=None, page_size=4):
        self.name, self.state, *_, self.constants = problem(kind, 1)
        self.kind, self.given = kind, {}
        _, _, inputs, _, constants = problem(kind, 1)
        kept = tuple(tuple(x.shape[2:]) for x in inputs)
        of_rule = tuple(tuple(x.shape[1:]) for x in constants) if kind == "selective scan" else ()
        layer = RecurrentLayer(self.name, tuple(self.state.shape[1:]), kept, of_rule)
        layout = LayerLayout((KeyValueLayer(1, 1, 1),), (layer, layer))
        self.cache = PagedKVCache.for_layout(layout, 80, page_size, cells=cells)
        self.states = self.cache.states

    def run(self, sequences, inputs, tree=False):
        """Append `inputs [n tokens]` of each sequence, run both layers over them -> outputs of each sequence."""
        counts = [len(each[0][0]) for each in inputs]
        self.cache.append(sequences, counts)
        trees = [(DEPTHS, ancestor_bits(PARENTS))] * len(sequences) if tree else None
        batch = build_batch(self.cache, sequences, counts, trees).recurrent
        batch.begin(2)
        packed, reads = (tuple(map(torch.cat, zip(*(each[i] for each in inputs), strict=True))) for i in (0, 1))
        constants = tuple(x[0] for x in self.constants) if self.kind == "selective scan" else self.constants
        outs = [run_recurrent(batch, layer, packed, reads, constants) for layer in (0, 1)]
        batch.finish()
        assert outs[0].equal(outs[1])
        return outs[0].split(counts)

    def expected(self, inputs, parents=None):
        """Outputs and states of one text of `inputs` from its begin."""
        batched = tuple(tuple(x[None] for x in part) for part in inputs)
        outs, states = by_tokens(self.name, torch.zeros_like(self.state[:1]), *batched, self.constants, parents)
        return outs[0], states[0]

    def state_of(self, sequence):
        """The state of `sequence` after all its tokens, kept ones replayed on a copy."""
        twin = self.cache.fork(sequence)
        length = self.cache.length(twin)
        self.cache.commit([twin], [length], [[]])
        pool = self.states.pools[0]
        state = pool.states[:, self.states.checkpoint(twin).cell].clone()
        self.cache.free(twin)
        assert state[0].equal(state[1])
        return state[0]


def tokens(kind, count, seed):
    _, _, inputs, reads, _ = problem(kind, count, rows=1, seed=seed)
    return tuple(x[0] for x in inputs), tuple(x[0] for x in reads)


def joined(*parts):
    return tuple(tuple(map(torch.cat, zip(*some, strict=True))) for some in zip(*parts, strict=True))


def at(part, index):
    return tuple(tuple(x[index] for x in some) for some in part)


def assert_close(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@every_kind
def test_ragged_pieces_equal_each_text_alone(kind):
    """Pieces of 1 to 100 tokens, some of which go into the state and some of which are kept."""
    texts, whole = Texts(kind), [tokens(kind, 150, 1), tokens(kind, 40, 2), tokens(kind, 19, 3)]
    sequences = [texts.cache.add() for _ in whole]
    cuts = [(0, 100, 101, 105, 150), (0, 3, 17, 30, 40), (0, 16, 17, 18, 19)]
    got = [[] for _ in whole]
    for i in range(4):
        pieces = [at(each, slice(cut[i], cut[i + 1])) for each, cut in zip(whole, cuts, strict=True)]
        for mine, out in zip(got, texts.run(sequences, pieces), strict=True):
            mine.append(out)
    for sequence, mine, each in zip(sequences, got, whole, strict=True):
        outs, states = texts.expected(each)
        assert_close(torch.cat(mine), outs)
        assert_close(texts.state_of(sequence), states[-1])


@every_kind
def test_a_tree_and_its_committed_path(kind):
    """Rounds of trees with different paths, a wholly rejected one among them: the state is that of the text alone."""
    texts, text = Texts(kind), tokens(kind, 21, 1)
    other = texts.cache.add()
    sequence = texts.cache.add()
    texts.run([sequence, other], [text, tokens(kind, 5, 9)])
    for round, path in enumerate(([0, 1, 3, 6], [0], [0, 2, 5], [0, 1, 4, 10, 11])):
        tree = tokens(kind, len(PARENTS), 10 + round)
        outs = texts.run([sequence, other], [tree, tokens(kind, len(PARENTS), 30 + round)], tree=True)[0]
        before = texts.expected(text)[1][-1:]
        batched = tuple(tuple(x[None] for x in part) for part in tree)
        assert_close(outs, by_tokens(texts.name, before, *batched, texts.constants, PARENTS)[0][0])
        length = texts.cache.length(sequence) - len(PARENTS)
        rest = texts.cache.length(other) - len(PARENTS)
        texts.cache.commit([sequence, other], [length, rest], [path, [0]])
        text = joined(text, at(tree, path))
        assert texts.cache.length(sequence) == len(text[0][0])
        assert_close(texts.state_of(sequence), texts.expected(text)[1][-1])


@every_kind
def test_rejected_tokens_leave_no_trace(kind):
    """Truncation within the kept tokens costs nothing; before the checkpoint, the text has to be run again."""
    texts, text = Texts(kind), tokens(kind, 60, 1)
    sequence = texts.cache.add()
    texts.run([sequence], [text])
    texts.cache.truncate(sequence, 60 - texts.states.rollback)
    kept = at(text, slice(0, 60 - texts.states.rollback))
    assert texts.cache.length(sequence) == len(kept[0][0])
    more = tokens(kind, 3, 2)
    outs = texts.run([sequence], [more])[0]
    assert_close(outs, texts.expected(joined(kept, more))[0][-3:])
    texts.cache.truncate(sequence, 20)
    assert texts.cache.length(sequence) == 0 and not texts.states.held(sequence)
    assert_close(texts.run([sequence], [text])[0], texts.expected(text)[0])


def test_forks_go_apart():
    texts, text = Texts("delta rule"), tokens("delta rule", 70, 1)
    first = texts.cache.add()
    texts.run([first], [text])
    second, more = texts.cache.fork(first), tokens("delta rule", 4, 2)
    texts.run([first], [tokens("delta rule", 6, 3)])
    assert_close(texts.run([second], [more])[0], texts.expected(joined(text, more))[0][-4:])


def test_fixed_cells_run_out_and_come_back():
    texts, one = Texts("delta rule", cells=1), tokens("delta rule", 5, 1)
    first, second = texts.cache.add(), texts.cache.add()
    texts.run([first], [one])
    free = texts.cache.free_pages
    with pytest.raises(OutOfPages, match="1 recurrent states are needed, but 0 of 1"):
        texts.cache.append([second], [3])
    with pytest.raises(OutOfPages, match="all 1 are in use"):
        texts.cache.fork(first)
    assert texts.cache.length(second) == 0 and texts.cache.free_pages == free
    texts.cache.free(first)
    assert_close(texts.run([second], [one])[0], texts.expected(one)[0])


def test_pages_that_run_out_leave_no_state():
    texts = Texts("delta rule", cells=2)
    sequence = texts.cache.add()
    with pytest.raises(OutOfPages):
        texts.cache.append([sequence], [4 * 80 + 1])
    assert not texts.states.held(sequence) and texts.states.free_cells == 2


def test_what_would_be_wrong_is_refused():
    texts = Texts("delta rule")
    sequence = texts.cache.add()
    texts.run([sequence], [tokens("delta rule", 5, 1)])
    texts.cache.commit([sequence], [0], [[0, 1, 2]])
    with pytest.raises(ValueError, match="seen 3 tokens, so a path cannot begin at 2"):
        texts.cache.commit([sequence], [2], [[0]])
    rows = DeviceSequences(texts.cache, 8, torch.ones(1, dtype=torch.bool))
    rows.load([sequence], [3])
    with pytest.raises(ValueError, match="a tree of 3 nodes over recurrent states runs at once, not 2"):
        rows.append(2, (torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 3, 1, dtype=torch.int64)))
    with pytest.raises(ValueError, match="30 tokens after a checkpoint are more than 24"):
        rows.append(30)
    other = texts.cache.add()
    texts.cache.table.append([other], [2])  # tokens from a shared prefix, say
    with pytest.raises(ValueError, match="holds 2 tokens without their recurrent state"):
        texts.cache.append([other], [1])


def test_more_rollback_and_larger_trees_find_room():
    texts, text = Texts("state space"), tokens("state space", 40, 1)
    sequence = texts.cache.add()
    texts.run([sequence], [text])
    texts.states.require_rollback(50)
    more = tokens("state space", 60, 2)
    texts.run([sequence], [more])
    texts.cache.truncate(sequence, 51)
    assert texts.cache.length(sequence) == 51
    kept = joined(text, at(more, slice(0, 11)))
    assert_close(texts.state_of(sequence), texts.expected(kept)[1][-1])
