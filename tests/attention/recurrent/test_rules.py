"""Each update rule against a loop over single tokens: chains, trees and padded folds."""

import pytest
import torch

from attention.recurrent.rules import RULES
from tests.attention.recurrent.problems import KINDS, PARENTS, by_tokens, problem, sees

every_kind = pytest.mark.parametrize("kind", KINDS)


def close(ours, expected):
    return torch.allclose(ours, expected, rtol=1e-4, atol=1e-5)


@every_kind
def test_a_chain_equals_its_tokens_one_after_the_other(kind):
    name, state, inputs, reads, constants = problem(kind, 11)
    expected, states = by_tokens(name, state, inputs, reads, constants)
    assert close(RULES[name].run(state, inputs, reads, None, constants), expected)
    assert close(RULES[name].fold(state, inputs, torch.tensor([11, 11]), constants), states[:, -1])
    lower = torch.ones(2, 11, 11, dtype=torch.bool).tril()
    assert close(RULES[name].run(state, inputs, reads, lower, constants), expected), "a tree that is a chain"


@every_kind
def test_a_node_starts_from_its_parents_state(kind):
    name, state, inputs, reads, constants = problem(kind, len(PARENTS))
    expected, _ = by_tokens(name, state, inputs, reads, constants, PARENTS)
    ours = RULES[name].run(state, inputs, reads, sees().expand(2, -1, -1), constants)
    assert close(ours, expected)
    wrong = (*PARENTS[:10], 3, *PARENTS[11:])  # one node below another parent
    other = RULES[name].run(state, inputs, reads, sees(wrong).expand(2, -1, -1), constants)
    assert close(other[:, :10], expected[:, :10]) and not close(other[:, 10], expected[:, 10])


@every_kind
def test_zeros_after_the_last_token_change_no_state(kind):
    name, state, inputs, reads, constants = problem(kind, 7)
    counts = torch.tensor([5, 7])
    cut = tuple(x.masked_fill((torch.arange(7) >= counts[:, None]).view(2, 7, *[1] * (x.ndim - 2)), 0) for x in inputs)
    _, states = by_tokens(name, state, inputs, reads, constants)
    folded = RULES[name].fold(state, cut, counts, constants)
    assert close(folded[0], states[0, 4]) and close(folded[1], states[1, 6])


def test_strong_decays_stay_finite():
    """Sums of decays are subtracted before the exponential, never the other way round."""
    name, state, inputs, reads, constants = problem("delta rule", 60)
    inputs = (*inputs[:2], inputs[2] * 400, inputs[3])
    expected, states = by_tokens(name, state, inputs, reads, constants)
    assert close(RULES[name].run(state, inputs, reads, None, constants), expected)
    assert close(RULES[name].fold(state, inputs, torch.tensor([60, 60]), constants), states[:, -1])
