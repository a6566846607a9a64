"""What the end of a round keeps and says, on a context that only writes down."""

from types import SimpleNamespace

import pytest
import torch

from specdec.acceptance import greedy
from specdec.draft import Draft
from specdec.tree import TokenTree
from specdec.verdict import judge

TREE = TokenTree.from_widths((2, 1))  # the root, its children 1 and 2, below them 3 and 4
TOKENS = [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
LIKELY = [[2, 5, 4, 5, 6], [5, 5, 5, 5, 5], [1, 5, 5, 5, 5]]  # after each node: down to node 4, not beyond the root, down to node 1
ENDS = [4, 0, 1]


class Context:
    """Stands in for a call: no processors, or ones that leave the scores as they are."""

    def __init__(self, change_scores=False, spoiled=None):
        self.complaints, self.kept, self.tokens, self.lengths = [], None, torch.zeros(3, 1, dtype=torch.int64), [1, 1, 1]
        self.processors = SimpleNamespace(change_scores=change_scores, need_prefix=False)
        if change_scores:
            self.processors = Unchanged(spoiled)

    def complain(self, about, what):
        self.complaints.append((about, what))

    def keep_hidden(self, hidden, rows):
        self.kept = hidden


class Unchanged:
    """Processors that leave scores alone, but for a node of row 0 that they leave none."""

    change_scores, need_prefix = True, False

    def __init__(self, spoiled):
        self.spoiled = spoiled

    def __call__(self, logits, rows, prefixes):
        scores = logits.clone()
        if self.spoiled is not None:
            scores[self.spoiled] = float("-inf")
        return scores


def end_of_round(context):
    logits = torch.nn.functional.one_hot(torch.tensor(LIKELY), 8).float()
    hidden = torch.arange(15.0).view(3, 5, 1).expand(3, 5, 2)  # 5 row + node
    _, emitted, answer, layout = judge(context, greedy, Draft(TREE, torch.tensor(TOKENS)), logits, hidden, [0, 1, 2])
    return emitted, list(layout.read(answer.tolist(), [0, 1, 2], [1, 1, 1])) if context.complaints == [] else None


@pytest.mark.parametrize("change_scores", [False, True])
def test_the_hidden_state_that_is_kept_is_that_of_the_last_accepted_node(change_scores):
    context = Context(change_scores)
    _, heard = end_of_round(context)
    assert context.kept.tolist() == [[5 * row + end] * 2 for row, end in enumerate(ENDS)]
    assert [row.path for row in heard] == [[2, 4], [], [1]] and [row.emitted for row in heard] == [[2, 4, 6], [5], [1, 5]]
    assert [(list(row.children), list(row.ranks)) for row in heard] == [([2, 1, 0], [0, 1, 0]), ([2], [0]), ([2, 1], [0, 0])]
    assert all(row.levels == [2, 2] for row in heard)


@pytest.mark.parametrize(("spoiled", "refused"), [(4, True), (3, False)])
def test_a_row_without_a_finite_score_is_complained_about_where_it_ends(spoiled, refused):
    """Node 4 is where row 0 ends; what processors leave at a node that was not accepted matters to nobody."""
    context = Context(True, spoiled)
    if refused:
        with pytest.raises(ValueError, match="left the target model no finite score in row 0 after 1 tokens"):
            end_of_round(context)
    else:
        end_of_round(context)
