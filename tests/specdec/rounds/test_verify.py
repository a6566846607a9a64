"""What the end of a round keeps and says."""

from types import SimpleNamespace

import pytest
import torch

from specdec.acceptance import Acceptance, greedy, rejection
from specdec.requests.batch import Batch
from specdec.requests.rows import Row, Rows
from specdec.rounds.verify import _beyond, checked, require_fit, verify
from specdec.trees.draft import Draft
from specdec.trees.tensors import TreeBatch
from specdec.trees.tree import TokenTree

TREE = TokenTree.from_widths((2, 1))  # the root, its children 1 and 2, below them 3 and 4
TOKENS = [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
LIKELY = [
    [2, 5, 4, 5, 6],
    [5, 5, 5, 5, 5],
    [1, 5, 5, 5, 5],
]  # after each node: down to node 4, not beyond the root, down to node 1
ENDS = [4, 0, 1]


class Unchanged:
    """Processors that leave scores alone, but for a node of row 0 that they leave none."""

    change_scores, need_prefix, node_by_node, leading, warpers, warper_numbers = True, False, False, (), None, 0

    def __init__(self, spoiled):
        self.spoiled = spoiled

    def warp(self, scores, numbers):
        scores = scores.clone()
        if self.spoiled is not None:
            scores[self.spoiled] = float("-inf")
        return scores


def batch_of(count=3, processors=None, texts=None, vocab_size=8):
    """A batch of the last `count` rows of as many `texts` (one token each) with a limit of 20."""
    texts = [[0]] * count if texts is None else texts
    rows = Rows(SimpleNamespace(device=torch.device("cpu"), vocab_size=vocab_size), len(texts), 24)
    rows.processors = processors or SimpleNamespace(change_scores=False, need_prefix=False)
    rows.members = [Row(i, i, len(text), 20, -1) for i, text in enumerate(texts)]
    for row, text in zip(rows.members, texts, strict=True):
        rows.tokens[row.slot, : row.length], rows.lengths[row.slot] = torch.tensor(text), row.length
    rows.limits.fill_(20)
    rows.ends.fill_(-1)
    return Batch(rows, rows.members[-count:])


def end_of_round(batch):
    logits = torch.nn.functional.one_hot(torch.tensor(LIKELY), 8).float()
    features = torch.arange(15.0).view(3, 5, 1).expand(3, 5, 2)  # 5 row + node
    _, emitted, packed, layout = verify(batch, greedy, Draft(TREE, torch.tensor(TOKENS)), logits, features)
    return emitted, list(map(layout.read, packed.tolist(), batch.members))


@pytest.mark.parametrize("change_scores", [False, True])
def test_the_hidden_state_that_is_kept_is_that_of_the_last_accepted_node(change_scores):
    batch = batch_of(processors=Unchanged(None) if change_scores else None)
    _, heard = end_of_round(batch)
    assert batch.features.tolist() == [[5 * row + end] * 2 for row, end in enumerate(ENDS)]
    assert [row.path for row in heard] == [[2, 4], [], [1]] and [row.emitted for row in heard] == [
        [2, 4, 6],
        [5],
        [1, 5],
    ]
    assert [(list(row.children), list(row.ranks)) for row in heard] == [
        ([2, 1, 0], [0, 1, 0]),
        ([2], [0]),
        ([2, 1], [0, 0]),
    ]
    assert all(row.levels == [2, 2] for row in heard)


def test_one_row_alone_keeps_the_state_where_it_ends():
    batch, likely = batch_of(1), torch.nn.functional.one_hot(torch.tensor(LIKELY[:1]), 8).float()
    draft, features = Draft(TREE, torch.tensor(TOKENS[:1])), torch.arange(5.0).view(1, 5, 1)
    verify(batch, greedy, draft, likely, features)
    assert batch.features.tolist() == [[ENDS[0]]]


def test_a_draft_of_one_token_keeps_the_state_behind_it_where_it_was_right():
    batch, likely = batch_of(2), torch.nn.functional.one_hot(torch.tensor([[3, 6], [5, 6]]), 8).float()
    _, _, answer, layout = verify(
        batch,
        greedy,
        Draft(TokenTree.chain(1), torch.tensor([[0, 3], [0, 3]])),
        likely,
        torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]]),
    )
    assert batch.features.tolist() == [[2], [3]]
    heard = list(map(layout.read, answer.tolist(), batch.members))
    assert [(row.levels, row.children, row.ranks) for row in heard] == [([1], [1, 0], [0, 0]), ([1], [1], [0])]


def test_a_round_without_a_draft_keeps_the_roots_state_and_says_that_it_has_no_children():
    batch, likely = batch_of(2), torch.nn.functional.one_hot(torch.tensor([[3], [5]]), 8).float()
    _, emitted, answer, layout = verify(
        batch,
        greedy,
        Draft(TokenTree.chain(0), torch.zeros(2, 1, dtype=torch.int64)),
        likely,
        torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]]),
    )
    assert batch.features.tolist() == [[1, 2], [3, 4]] and emitted.tolist() == [[3], [5]]
    for row, heard in enumerate(map(layout.read, answer.tolist(), batch.members)):
        assert (
            heard.path == []
            and heard.emitted == [[3], [5]][row]
            and [*heard.levels] == []
            and [*heard.children] == [*heard.ranks] == [0]
        )


@pytest.mark.parametrize(("spoiled", "refused"), [(4, True), (3, False)])
def test_a_row_without_a_finite_score_is_complained_about_where_it_ends(spoiled, refused):
    """Node 4 is where row 0 ends; what processors leave at a node that was not accepted matters to nobody."""
    batch = batch_of(processors=Unchanged(spoiled))
    if refused:
        with pytest.raises(ValueError, match="left the target model no finite score in row 0 after 1 tokens"):
            end_of_round(batch)
    else:
        end_of_round(batch)


def shape_of(parents, nodes):
    """Nodes at each depth, and along `nodes` the number of children and the rank, of a tree as a dictionary from node
    to parent.
    """
    depth = {0: 0}
    for node, parent in parents.items():
        depth[node] = depth[parent] + 1
    below = lambda node: [other for other, parent in parents.items() if parent == node]
    return (
        [list(depth.values()).count(d) for d in (1, 2)],
        [len(below(n)) for n in nodes],
        [below(parents[n]).index(n) if n else 0 for n in nodes],
    )


@pytest.mark.parametrize("as_batch", [False, True])
def test_rows_with_trees_of_their_own_say_what_shape_they_have(as_batch):
    """Rows that lack nodes: of a tree for all, or as parents of their own."""
    rows = [({1: 0, 2: 0, 4: 2}, [0, 2, 4]), ({1: 0, 3: 1}, [0]), ({1: 0, 2: 0, 3: 1, 4: 2}, [0, 1])]
    batch, tokens = batch_of(), torch.tensor(TOKENS)
    if as_batch:
        parents = torch.tensor([[row.get(node, -1) for node in range(5)] for row, _ in rows])
        draft = Draft(TreeBatch(parents, 2, 2), tokens)
    else:
        draft = Draft(
            TREE, tokens, valid=torch.tensor([[node == 0 or node in row for node in range(5)] for row, _ in rows])
        )
    scores = torch.nn.functional.one_hot(torch.tensor(LIKELY), 8).float()
    _, _, answer, layout = verify(batch, greedy, draft, scores, None)
    for heard, (parents, nodes) in zip(map(layout.read, answer.tolist(), batch.members), rows, strict=True):
        levels, children, ranks = shape_of(parents, nodes)
        assert heard.path == nodes[1:] and heard.levels == levels
        assert (
            heard.children[: len(nodes)] == children and heard.ranks[1 : len(nodes)] == ranks[1:]
        )  # the root has no siblings


def complaints_about(draft, size=4):
    """The draft after `checked` against a vocabulary of `size` tokens, and which rows each complaint is about."""
    batch = batch_of(len(draft.tokens), vocab_size=size)
    found = checked(batch, draft)
    return found, [about.tolist() for about, what in batch.faults if "node 0" not in what]


def test_tokens_outside_the_vocabulary_are_complained_about_and_replaced():
    found, (about,) = complaints_about(Draft(TokenTree.chain(1), torch.tensor([[0, 3], [0, 4], [0, -1]])))
    assert [any(row) for row in about] == [False, True, True] and found.tokens.tolist() == [[0, 3], [0, 3], [0, 0]]


def test_distributions_that_are_none_are_complained_about():
    good, nearly = [0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.2505]
    q = torch.tensor(
        [good, [*good[:3], 0.402], [*good[:3], 0.398], [0.5, -0.1, 0.3, 0.3], [float("nan"), *good[1:]], nearly]
    )
    q = torch.cat([q, torch.tensor([[0.0, 0.0, 0.0, 1.0]])])
    _, (_, about) = complaints_about(Draft(TokenTree.chain(1), torch.zeros(7, 2, dtype=torch.int64), q[:, None]))
    assert about == [False, True, True, True, True, False, False]
    two = torch.stack([q[:2], q[[0, 0]]], 1)  # one of a row's distributions is enough
    assert complaints_about(Draft(TokenTree.chain(2), torch.zeros(2, 3, dtype=torch.int64), two))[1][1] == [False, True]
    with pytest.raises(ValueError, match="over 4 tokens, the target's over 5"):
        complaints_about(Draft(TokenTree.chain(1), torch.zeros(7, 2, dtype=torch.int64), q[:, None]), 5)
    with pytest.raises(ValueError, match="over 4 tokens, the target's over 3"):
        complaints_about(Draft(TokenTree.chain(1), torch.zeros(7, 2, dtype=torch.int64), q[:, None]), 3)


def test_parents_that_are_no_tree_are_complained_about():
    parents = torch.tensor([[-1, 0, 1], [-1, 2, 0]])
    found, (_, about) = complaints_about(Draft(TreeBatch(parents, 2, 2), torch.zeros(2, 3, dtype=torch.int64)))
    assert about == [False, True] and found.tables.parent.tolist() == [[0, 0, 1], [0, 0, 0]]


def test_what_went_wrong_first_is_heard_first_and_complaints_of_one_kind_are_one():
    batch, logits = batch_of(texts=[[0] * 7, [0] * 8, [0] * 9]), torch.zeros(3, 1, 8)
    none, last = torch.tensor([False, False, False]), torch.tensor([False, False, True])
    for about, what in ((none, "one"), (torch.tensor([1.0, float("inf"), 0.0]), "number"), (last, "one")):
        batch.report_fault(about, what)
    logits[0, 0, 2] = float("nan")
    draft = Draft(TokenTree.chain(0), torch.zeros(3, 1, dtype=torch.int64))
    verdict, _, answer, layout = verify(batch, greedy, draft, logits, None)
    assert layout.faults[:2] == ("one", "number") and len(layout.faults) == 3
    for row, said in (
        (2, "one in row 2 after 9 tokens"),
        (1, "number in row 1 after 8"),
        (0, "NaN or infinite logits in row 0"),
    ):
        with pytest.raises(ValueError, match=said):
            layout.read(answer[row].tolist(), batch.members[row])
    assert verdict.counts.tolist() == [0, 0, 0]


@pytest.mark.parametrize("as_batch", [False, True])
def test_processors_see_each_nodes_own_prefix_in_its_own_row(as_batch):
    seen = []

    class Spy(Unchanged):
        need_prefix = node_by_node = True

        def __call__(self, logits, rows, prefixes=None, asked=None):
            seen.extend((row, prefixes(m).tolist()) for m, row in enumerate(rows))
            return logits

    batch = batch_of(2, Spy(None), [[9, 9], [5, 6], [7]])
    parents = torch.tensor([[-1, *TREE.parents[1:]]] * 2)
    draft = Draft(TreeBatch(parents, 2, 2) if as_batch else TREE, torch.tensor([[0, 1, 2, 3, 4], [0, 11, 12, 13, 14]]))
    verify(batch, greedy, draft, torch.zeros(2, 5, 16), None)
    first, second = (
        [[[5, 6, *way]] for way in ([], [1], [2], [1, 3], [2, 4])],
        [[[7, *way]] for way in ([], [11], [12], [11, 13], [12, 14])],
    )
    assert sorted(seen) == [*((1, prefix) for prefix in sorted(first)), *((2, prefix) for prefix in sorted(second))]


def test_what_lies_behind_a_rows_end_or_limit_is_beyond():
    """Rows of one token: the limits of 1 + `room`, the end tokens of each row, and the path down a chain of three."""
    batch, tokens = batch_of(6), torch.tensor([[7, 1, 2, 3]] * 6)
    batch.rows.limits[:6] = 1 + torch.tensor([9, 2, 9, 9, 3, 9])
    batch.rows.ends = torch.full((6, 2), -1)
    batch.rows.ends[2], batch.rows.ends[3], batch.rows.ends[4] = (
        torch.tensor([2, 9]),
        torch.tensor([3, 7]),
        torch.tensor([7, 4]),
    )
    batch.rows.ends[5, 0] = 1
    verdict = Acceptance(torch.tensor([3] * 6), torch.tensor([[1, 2, 3]] * 6), torch.tensor([0] * 6))
    found = _beyond(batch, Draft(TokenTree.chain(3), tokens), verdict)
    assert found.int().tolist() == [[0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1], [0, 0, 0, 1], [0, 1, 1, 1]]


@pytest.mark.parametrize("rows", [1, 3])
def test_a_draft_of_other_rows_is_refused(rows):
    draft = Draft(TokenTree.chain(2), torch.zeros(rows, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=f"tokens for {rows} rows, the batch has 2"):
        require_fit(batch_of(2), draft, 4)


def test_a_draft_may_have_fewer_tokens_than_said_but_not_more():
    draft = Draft(TokenTree.chain(2), torch.zeros(2, 3, dtype=torch.int64))
    require_fit(batch_of(2), draft, 3)
    require_fit(batch_of(2), draft, 2)
    with pytest.raises(ValueError, match="the draft has 2 tokens, but max_tokens of its drafter is 1"):
        require_fit(batch_of(2), draft, 1)
    with pytest.raises(TypeError, match="got a list"):
        require_fit(batch_of(2), [], 1)


@pytest.mark.parametrize("captured", [False, True])
def test_a_root_that_is_not_the_last_token_is_complained_about_where_it_can_be(captured):
    batch = batch_of(texts=[[5], [5], [5]])
    batch.captured = captured
    checked(batch, Draft(TokenTree.chain(1), torch.tensor([[4, 0], [5, 0], [6, 0]])))
    found = [about.tolist() for about, what in batch.faults if "node 0" in what]
    assert found == ([] if captured else [[True, False, True]])


@pytest.mark.parametrize("shape", [(2, 1), ()])
def test_a_verdict_has_one_next_token_for_each_row(shape):
    wrong = lambda draft, scores, noise: Acceptance(
        torch.zeros(2, dtype=torch.int64), draft.tokens[:, :0], torch.zeros(shape, dtype=torch.int64)
    )
    draft = Draft(TokenTree.chain(0), torch.zeros(2, 1, dtype=torch.int64))
    batch = batch_of(2, Unchanged(None))
    with pytest.raises(TypeError, match=r"next_tokens \[B\], got \["):
        verify(batch, wrong, draft, torch.zeros(2, 1, 8), None)


@pytest.mark.parametrize("need_prefix", [False, True])
def test_a_rule_for_samples_gets_the_processed_scores_and_its_verdict_counts(need_prefix):
    """Node 4 of row 0 is left no score; row 0 does not pass it."""
    processors, given = Unchanged(4), []
    processors.need_prefix = need_prefix
    batch = batch_of(processors=processors)

    def rule(draft, scores, noise):
        given.append(scores)
        return Acceptance(torch.tensor([1, 0, 1]), torch.tensor([[2, 0], [0, 0], [1, 0]]), torch.tensor([7, 6, 5]))

    logits = torch.nn.functional.one_hot(torch.tensor(LIKELY), 8).float()
    _, emitted, packed, layout = verify(batch, rule, Draft(TREE, torch.tensor(TOKENS)), logits, None)
    assert given[0][0, 4].isinf().all() and given[0][:, :4].equal(logits[:, :4])
    heard = list(map(layout.read, packed.tolist(), batch.members))
    assert [row.emitted for row in heard] == [[2, 7], [6], [1, 5]]


def test_only_rules_that_read_them_are_given_scores_that_are_not_written(monkeypatch):
    asked = []
    monkeypatch.setattr(Batch, "unwritten", lambda batch, logits: asked.append(1))
    own = lambda draft, scores, noise: Acceptance.of_nothing(draft, torch.tensor([0, 0]))
    for rule, wanted, count in ((rejection, (), 1), (rejection, ("logits",), 0), (own, (), 0), (greedy, (), 0)):
        batch = batch_of(2, Unchanged(None))
        batch.wanted = wanted
        asked.clear()
        draft = Draft(TokenTree.chain(0), torch.zeros(2, 1, dtype=torch.int64))
        verify(batch, rule, draft, torch.zeros(2, 1, 8), None)
        assert len(asked) == count
        assert [*batch.outputs] == [*wanted]


@pytest.mark.parametrize(
    ("dtype", "wide"), [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)]
)
def test_node_by_node_nothing_is_asked_at_or_past_a_limit_and_logits_stay(dtype, wide):
    seen = []

    class Shift(Unchanged):
        need_prefix = node_by_node = True

        def __call__(self, logits, rows, prefixes=None, asked=None):
            assert logits.dtype == wide
            seen.extend((row, prefixes(m).tolist()[0]) for m, row in enumerate(rows))
            return logits + 1

    batch = batch_of(2, Shift(None), [[9, 9], [5, 6]])
    for row, limit in zip(batch.members, (3, 4), strict=True):
        row.limit = limit
    batch.rows.limits[:2] = torch.tensor([3, 4])
    draft, logits = Draft(TREE, torch.tensor([[9, 1, 2, 3, 4], [6, 1, 2, 3, 4]])), torch.zeros(2, 5, 16, dtype=dtype)
    verify(batch, greedy, draft, logits, None)
    assert sorted(seen) == [(0, [9, 9]), (1, [5, 6]), (1, [5, 6, 1]), (1, [5, 6, 2])]
    assert logits.equal(torch.zeros(2, 5, 16, dtype=dtype))


def test_node_by_node_nothing_is_asked_behind_a_token_that_cannot_come():
    """Token 2 is forbidden; token 1 ends row 1; row 2 lacks node 3."""
    seen = []

    class Strict(Unchanged):
        need_prefix = node_by_node = True

        def __call__(self, logits, rows, prefixes=None, asked=None):
            seen.extend((row, prefixes(m).tolist()[0][1:]) for m, row in enumerate(rows))
            scores = logits.clone()
            scores[:, 2] = float("-inf")
            return scores

    for valid in (None, torch.tensor([[True] * 5, [True] * 5, [True, True, True, False, True]])):
        seen.clear()
        batch = batch_of(3, Strict(None))
        batch.rows.ends[1, 0] = 1
        verify(batch, greedy, Draft(TREE, torch.tensor(TOKENS), valid=valid), torch.zeros(3, 5, 16), None)
        last = [] if valid is not None else [(2, [1, 3])]
        assert sorted(seen) == [(0, []), (0, [1]), (0, [1, 3]), (1, []), (2, []), (2, [1]), *last]


@pytest.mark.parametrize("as_batch", [False, True])
def test_processors_on_the_device_get_the_tokens_down_to_each_node(as_batch, monkeypatch):
    given = []
    monkeypatch.setattr(Batch, "scores", lambda batch, logits, paths: given.append(paths()) or logits)
    tokens = torch.tensor([[0, 1, 2, 3, 4], [0, 5, 6, 7, 3]])
    tree = TreeBatch(torch.tensor([[-1, *TREE.parents[1:]]] * 2), 2, 2) if as_batch else TREE
    verify(batch_of(2, Unchanged(None)), greedy, Draft(tree, tokens), torch.zeros(2, 5, 8), None)
    ((paths, depth),) = given
    ways = [
        [path[:d] for path, d in zip(row, depths, strict=True)]
        for row, depths in zip(paths.tolist(), depth.expand(2, -1).tolist(), strict=True)
    ]
    assert ways == [[[], [1], [2], [1, 3], [2, 4]], [[], [5], [6], [5, 7], [6, 3]]]


def test_node_by_node_a_row_with_a_short_tree_waits_for_the_others():
    class Counting(Unchanged):
        need_prefix = node_by_node = True
        asked: list[list[int]] = []

        def __call__(self, logits, rows, prefixes=None, asked=None):
            self.asked.append(rows)
            return logits

    tree = TreeBatch(torch.tensor([[-1, 0, 1, 2], [-1, -1, -1, -1]]), 3, 1)
    draft = Draft(tree, torch.tensor([[0, 1, 2, 3], [0, 1, 2, 3]]))
    verify(batch_of(2, Counting(None)), greedy, draft, torch.zeros(2, 4, 8), None)
    assert Counting.asked == [[0, 1], [0], [0], [0]]
