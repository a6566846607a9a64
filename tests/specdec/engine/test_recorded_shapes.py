"""Recorded shapes of rounds: with those of its handle a seed repeats a text, and the planner learns from them."""

import pytest

from tests.specdec.engine.forced import at_random, force, make_room
from tests.specdec.engine.test_captured import require_replay
from tests.specdec.engine.test_engine import KINDS, engine_of, prompts_of, submit_all


@pytest.mark.parametrize("name", ["chain", "tree", "dynamic tree", "Medusa heads", "early exit", "prompt lookup"])
def test_texts_and_acceptance_are_those_of_the_recorded_shapes(name):
    """Each row has its own shape in each round; half of the requests, sampled ones too, make room after some rounds."""
    engine = engine_of(name, tree="auto")
    force(engine, at_random(7))
    given = submit_all(engine, prompts_of(8), KINDS[:4])
    while not engine.idle:
        engine.step()
        for handle, *_ in given[:4]:
            if handle.row is not None and len(handle.shapes) > 1 and not handle.preemptions:
                make_room(engine, handle)
    assert all(handle.preemptions for handle, *_ in given[:4])
    assert len({shape for handle, *_ in given for shape in handle.shapes}) > 1
    for handle, prompt, options in given:
        require_replay(name, handle, prompt, options)


def test_the_planner_learns_what_each_request_accepts():
    """From rounds on the host: by each request's own tokens, those beside the target's."""
    engine = engine_of("chain", tree="auto")
    force(engine, lambda row, shapes: shapes[0])
    handles = [engine.submit(prompt, max_new_tokens=40, eos_token_id=[]) for prompt in prompts_of(3)]
    while not all(len(handle.tokens) > 12 for handle in handles):
        engine.step()
    (group,) = engine._groups
    for handle in handles:
        learned = group.call.policy._accepted[handle.row]
        assert learned.expected > 0 and learned.accepted == sum(handle.stats.emitted) - len(handle.stats.emitted)
