"""The update rules of recurrent layers, by the names that a layer layout gives them."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from attention.recurrent import convolution, delta_rule, selective_scan, state_space


@dataclass(frozen=True, slots=True)
class Rule:
    """How tokens change a state, and what they read of it. Both functions say in their modules what they take.

    run: outputs of tokens of a chain or a tree, which leave the state as it was.
    fold: the state after a chain.
    block: tokens of a chain that run at once.
    """

    run: Callable[..., Tensor]
    fold: Callable[..., Tensor]
    block: int


RULES = {
    "convolution": Rule(convolution.run, convolution.fold, convolution.BLOCK),
    "delta rule": Rule(delta_rule.run, delta_rule.fold, delta_rule.BLOCK),
    "state space": Rule(state_space.run, state_space.fold, state_space.BLOCK),
    "selective scan": Rule(selective_scan.run, selective_scan.fold, selective_scan.BLOCK),
}
