"""Rounds without a draft keep drafters in step: what comes after them is what a drafter built anew would draft."""

from itertools import count

import pytest
import torch

from specdec.planning.policy import PLAIN
from specdec.requests.batch import Batch
from specdec.requests.request import build_request
from specdec.requests.rows import Rows
from tests.matrix import DRAFTERS
from tests.specdec.engine import test_engine
from tests.specdec.engine.forced import at_random, force
from tests.specdec.engine.test_captured import require_replay
from tests.specdec.engine.test_engine import KINDS, drafter_of, prompts_of, solo_generator, submit_all

GAPS = [(1, 0, 0, 0, 1), (1, 0, 1), (0, 1, 1, 0, 0, 1)]  # 1: a draft


def by_round(pattern):
    """A chooser of the first shape or none, round by round."""
    rounds = count()
    return lambda row, shapes: shapes[0] if pattern[next(rounds) % len(pattern)] else PLAIN


def drafted_anew(engine, name, batch, tree):
    """The draft of a new session of a new drafter over the texts of a batch."""
    target, rows = engine.target, batch.rows
    texts = [rows.tokens[row.slot, : row.length].tolist() for row in batch.members]
    drafter = drafter_of(name, engine.target.model)
    drafts = []
    for text, row in zip(texts, batch.members, strict=True):
        ids = torch.tensor([text])
        request = build_request(target, ids, torch.ones_like(ids), max_new_tokens=row.limit - row.length)
        fresh = Rows.of(target, request, 64)
        (mine,) = fresh.members
        mine.sequence = target.cache.add()
        fresh.keys[0], fresh.rounds[0] = rows.keys[row.slot], rows.rounds[row.slot]
        session = drafter.start(fresh, drafter.traits.max_tokens)
        if rows.features is not None:
            out = target.forward(
                [mine.sequence], torch.tensor(text[:-1]), [len(text) - 1], features=drafter.traits.features
            )
            fresh.keep_features(out.features[-1:], None)
        drafts.append(session.propose(Batch(fresh, [mine]), tree))
        session.release([mine])
        target.cache.free(mine.sequence)
    return drafts


@pytest.mark.parametrize("pattern", GAPS, ids=str)
@pytest.mark.parametrize("name", DRAFTERS)
def test_drafts_after_a_gap_are_those_of_a_drafter_built_anew(name, pattern, monkeypatch):
    """Greedy, two texts together, each with its own shapes."""
    engine, compared = test_engine.engine_of(name, tree="auto", pages=400), []
    force(engine, by_round(pattern))
    handles = [engine.submit(prompt, max_new_tokens=16, eos_token_id=[]) for prompt in prompts_of(2)]
    engine.step()
    (group,) = engine._groups
    session, inside = group.call.session, []
    propose = session.propose

    def compare(batch, tree):
        draft = propose(batch, tree)
        if not inside:
            inside.append(True)
            for a, fresh in enumerate(drafted_anew(engine, name, batch, tree)):
                if fresh.tokens.shape[1] == draft.tokens.shape[1]:
                    compared.append(a)
                    assert draft.tokens[a].equal(fresh.tokens[0])
                    if draft.probs is not None:
                        torch.testing.assert_close(draft.probs[a], fresh.probs[0], atol=1e-4, rtol=0)
            inside.pop()
        return draft

    object.__setattr__(session, "propose", compare)
    list(engine.run())
    assert compared and all(handle.error is None for handle in handles)
    plain = [
        solo_generator("none").generate(torch.tensor([h.prompt]), max_new_tokens=16, eos_token_id=[]) for h in handles
    ]
    assert [h.tokens for h in handles] == [
        out.sequences[0, len(h.prompt) :].tolist() for h, out in zip(handles, plain, strict=True)
    ]


@pytest.mark.parametrize("name", ["chain", "tree", "dynamic tree", "Medusa heads", "early exit", "prompt lookup"])
def test_texts_and_acceptance_are_those_of_the_recorded_shapes(name):
    """Each row has its own shape in each round."""
    engine = test_engine.engine_of(name, tree="auto")
    force(engine, at_random(7))
    given = submit_all(engine, prompts_of(6), KINDS[:4])
    list(engine.run())
    assert len({shape for handle, *_ in given for shape in handle.shapes}) > 1
    for handle, prompt, options in given:
        require_replay(name, handle, prompt, options)


def test_the_planner_learns_what_each_request_accepts():
    """From rounds on the host: by each request's own tokens, those beside the target's."""
    engine = test_engine.engine_of("chain", tree="auto")
    force(engine, lambda row, shapes: shapes[0])
    handles = [engine.submit(prompt, max_new_tokens=40, eos_token_id=[]) for prompt in prompts_of(3)]
    while not all(len(handle.tokens) > 12 for handle in handles):
        engine.step()
    (group,) = engine._groups
    for handle in handles:
        learned = group.call.policy._accepted[handle.row]
        assert learned.expected > 0 and learned.accepted == sum(handle.stats.emitted) - len(handle.stats.emitted)
