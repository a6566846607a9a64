"""Policies whose shapes a test chooses."""

import random

from specdec.planning.load import LoadPolicy
from specdec.planning.policy import PLAIN, Shape


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


def by_rounds(engine, lengths_of, three_of):
    """How long the next draft of a row is by how many rounds it has had, and a chooser of shapes for that.

    lengths_of: gives a handle's lengths, which begin anew after their end: 3, 0 (the planner says none) or None (the
        drafter is asked and is to find none).
    three_of: gives a handle's shape of 3 levels; of None: any of them."""

    handle_of = lambda row: engine._groups.holding(row).handle(row)

    def length(row):
        handle = handle_of(row)
        lengths = lengths_of(handle)
        return lengths[len(handle.record.shapes) % len(lengths)]

    def choose(row, shapes):
        three = three_of(None if row is None else handle_of(row))
        wanted = 3 if row is None else length(row)
        return {3: three, 0: PLAIN, None: Shape("none found", three.tree)}[wanted]

    return length, choose


def make_room(engine, handle):
    """Preempt a request that runs, as a step does that is out of pages."""
    engine._preempt(handle)
    engine._scheduler.running.remove(handle)
    engine._scheduler.submit(handle)
