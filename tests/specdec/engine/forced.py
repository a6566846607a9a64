"""Policies whose shapes a test chooses."""

import random

from specdec.planning.load import LoadPolicy
from specdec.planning.policy import PLAIN


class Forced(LoadPolicy):
    """The shapes of rounds on the host come from `choose(row)`, those of captured ones from `choose(None)`."""

    def __init__(self, policy, choose):
        super().__init__(policy.fit, policy.shapes, policy.max_tokens)
        self._choose_for = choose

    def look(self, rows):
        super().look(rows)
        self._shape = self._choose_for(None)

    def _choose(self):
        pass

    def enter(self, place):
        self._place = place

    def of_rows(self, rows):
        return [self._choose_for(row) for row in rows]


def force(engine, choose):
    """Let `choose(row, shapes)` take one of a drafter's shapes, or plain, in all groups of an engine to come."""
    planned = engine._groups._planner.policy

    def policy(request):
        its = planned(request)
        return Forced(its, lambda row: choose(row, its.shapes)) if isinstance(its, LoadPolicy) else its

    engine._groups._planner.policy = policy


def at_random(seed):
    """Plain rounds and all shapes in turn, at random."""
    draws = random.Random(seed)
    return lambda row, shapes: draws.choice([PLAIN, *shapes])
