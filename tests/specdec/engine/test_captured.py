"""Captured rounds in an engine: the same texts, also one round ahead of the host."""

import pytest
import torch

import specdec
from specdec.cuda_graph import CannotCapture, HostCopy
from specdec.drafters.base import runners_of
from specdec.drafters.model_state import ModelState
from specdec.engine import groups, lane
from specdec.engine.prefixes import SharedPrefixes
from specdec.model.graph_runner import GraphRunner
from specdec.planning.policy import PLAIN
from specdec.rounds import captured
from specdec.rounds.round import Round
from tests.families import noisy_copy
from tests.specdec.engine.forced import Forced, at_random, force
from tests.specdec.engine.test_engine import (
    KINDS,
    PAGE,
    drafter_of,
    model_of,
    prompts_of,
    require_empty,
    solo,
    solo_generator,
    submit_all,
)

NAMES = ("none", "chain", "tree", "Medusa heads", "early exit")


@pytest.fixture(params=[1, 2], ids=["read at once", "read one round late"])
def in_flight(request, monkeypatch):
    """Rounds that are launched before the first of them is read; on a CPU the next one would overwrite its outcome."""
    monkeypatch.setattr(lane, "rounds_in_flight", lambda rows: request.param)
    monkeypatch.setattr(captured, "HostCopy", lambda outcome: HostCopy(outcome.clone()))
    return request.param


def engine_of(name, pages=200, **options):
    runner = specdec.ModelRunner(model_of(), page_size=PAGE, mode="graph")
    drafter = drafter_of(name, model_of())
    own = [] if name == "early exit" else list(runners_of(drafter))
    memory = pages * sum(one.page_format.bytes for one in (runner, *own))
    return specdec.Engine(runner, drafter, memory=memory, **{"max_tokens_per_step": 64, "tree": None} | options)


@pytest.mark.covering(cases=2)
@pytest.mark.parametrize("pages", [200, 34], ids=["room for all", "some make room"])
@pytest.mark.parametrize("name", NAMES)
def test_texts_are_those_of_requests_alone(name, pages, in_flight):
    kinds = KINDS if name != "Medusa heads" or pages == 200 else ({}, dict(repetition_penalty=1.2))
    engine = engine_of(name, 30 if name == "early exit" and pages == 34 else pages)
    given = submit_all(engine, prompts_of(14), kinds)
    for _ in engine.run():
        for held in engine._memory.caches:
            held.table.check_integrity()
    for handle, prompt, options in given:
        assert handle.error is None and handle.tokens == solo(name, prompt, options), options
    assert pages == 200 or sum(handle.preemptions for handle, *_ in given) > 0
    assert engine._groups._captured._rounds.count > 0
    require_empty(engine)


def test_the_host_waits_for_no_round_before_a_steps_prompts_run(monkeypatch):
    """Neither while rows go on nor in the step in which nothing is left to launch for them."""
    monkeypatch.setattr(lane, "rounds_in_flight", lambda rows: 2)
    monkeypatch.setattr(captured, "HostCopy", lambda outcome: HostCopy(outcome.clone()))
    engine, done = engine_of("none", max_tokens_per_step=9), list[str]()
    forward, read = engine.target.forward, HostCopy.read
    monkeypatch.setattr(
        engine.target, "forward", lambda *args, **options: (done.append("run"), forward(*args, **options))[1]
    )
    monkeypatch.setattr(HostCopy, "read", lambda copy: (done.append("read"), read(copy))[1])
    short, long = engine.submit([5, 6, 7], max_new_tokens=5), engine.submit(list(range(3, 93)), max_new_tokens=4)
    steps = []
    while not short.finished:
        done.clear()
        engine.step()
        steps.append(list(done))
    assert not long.tokens and steps[-1] == ["run", "read"] and ["run", "read"] in steps[:-1], steps
    assert all(step in (["run"], ["run", "read"]) for step in steps), steps
    assert [len(handle.tokens) for handle in engine.run()] == [4]
    require_empty(engine)


@pytest.mark.covering
@pytest.mark.parametrize("name", NAMES[1:])
def test_rows_that_come_join_captured_rounds_without_one_of_the_host(name, in_flight, monkeypatch):
    """Draft models see their prompts beside rounds of others; heads alone wait for a first round's features."""
    shapes, take_turns = list[str](), groups.take_turns

    def noted(turns, *args, **options):
        shapes.extend(turn.shape.name for turn in turns)
        take_turns(turns, *args, **options)

    monkeypatch.setattr(groups, "take_turns", noted)
    engine = engine_of(name)
    prompts = [[(7 * row + 3 * n) % 90 + 5 for n in range(20 + row)] for row in range(8)]  # rounds need a few tokens
    given = submit_all(engine, prompts, ({},))
    list(engine.run())
    for handle, prompt, options in given:
        assert handle.error is None and handle.tokens == solo("none", prompt, options)
    assert set(shapes) == ({"plain"} if name == "Medusa heads" else set())
    require_empty(engine)


def test_prompts_of_all_lengths_share_few_graphs(monkeypatch):
    """As on a GPU, where launching the kernels of a short prompt takes longer than running them."""
    monkeypatch.setattr(GraphRunner, "captures_ragged", True)
    engine = engine_of("chain")
    texts = [[(11 * row + 3 * n) % 90 + 5 for n in range(2 + 5 * row)] for row in range(14)]
    for text in texts:
        (handle,) = engine.run([{"prompt": text, "max_new_tokens": 6}])
        assert handle.error is None and handle.tokens == solo("none", text, {"max_new_tokens": 6})
    assert engine.target.graphs_captured == 1
    handles = [engine.submit(text, max_new_tokens=6) for text in texts[:3] * 4]
    list(engine.run())
    assert [one.tokens for one in handles] == [solo("none", text, {"max_new_tokens": 6}) for text in texts[:3] * 4]
    require_empty(engine)


@pytest.mark.covering
@pytest.mark.parametrize("name", ["none", "chain"])
def test_rows_are_entered_as_if_each_round_entered_them(name, in_flight, monkeypatch):
    """Blocks of draft models too, which see a text late and not in plain rounds."""
    found = []
    for always in (False, True):
        if always:
            each = lambda self, group, rows: [self.enter(group.handle(row), group, row) for row in rows]
            monkeypatch.setattr(SharedPrefixes, "enter_new", each)
        engine = engine_of(name, tree="auto")
        force(engine, at_random(1))
        submit_all(engine, prompts_of(14), ({},))
        entered = []
        while not engine.idle:
            engine.step()
            entered.append([len(index) for index in engine._prefixes.indexes])
        found.append((entered, engine.stats()))
    assert found[0] == found[1] and max(max(each) for each in entered) > 8, found


def test_measured_shapes_leave_rows_as_they_are(in_flight, monkeypatch):
    """Also rows whose text the draft model has not seen, and beside rows that end in the rounds in flight."""
    measured = list[float]()
    monkeypatch.setattr(Forced, "enter", lambda policy, place: measured.append(place.seconds(policy.shapes[-1])))
    engine = engine_of("chain", tree="auto")
    force(engine, at_random(5))
    given = [
        submit_all(engine, [prompt], ({"max_new_tokens": 1 + 5 * n % 16},))[0]
        for n, prompt in enumerate(prompts_of(14))
    ]
    list(engine.run())
    assert len(measured) > 1 and max(measured) < 60
    for handle, prompt, options in given:
        assert handle.error is None and handle.tokens == solo("none", prompt, options)
    require_empty(engine)


def test_times_are_learned_of_captured_rounds_alone(monkeypatch):
    """Neither of one of the host, which a text that is too short has first, nor of one beside which a draft model sees
    a prompt: at one request at a time there may be no other, and its shape would look slow for good."""
    told, observe, see, take_turns = list(), Forced.observe, ModelState.see, groups.take_turns
    monkeypatch.setattr(
        Forced, "observe", lambda policy, *about: (told.append(about[1]), observe(policy, *about))[1], raising=False
    )
    monkeypatch.setattr(ModelState, "see", lambda state, *given: (told.append("see"), see(state, *given))[1])
    monkeypatch.setattr(
        groups, "take_turns", lambda *given, **options: (told.append("host"), take_turns(*given, **options))[1]
    )
    engine = engine_of("chain", tree="auto")
    force(engine, lambda row, shapes: shapes[0])
    for _ in range(3):  # from the third time on nothing is captured anew
        list(engine.run([{"prompt": [7], "max_new_tokens": 16, "do_sample": False}]))
    longest = engine.submit([9 + n for n in range(20)], max_new_tokens=60, do_sample=False)
    for first in range(3):
        engine.submit([30 + first + n for n in range(20)], max_new_tokens=8, do_sample=False)
        for _ in range(4):
            engine.step()
    assert not longest.finished and len(list(engine.run())) > 0
    after = [(one, told[at + 1]) for at, one in enumerate(told) if one in ("see", "host")]
    assert [name for name, _ in after].count("see") > 5 and ("host", None) in after, after
    assert not any(isinstance(seconds, float) for _, seconds in after), after
    assert any(isinstance(one, float) for one in told)


def test_a_draft_that_fails_in_the_first_round_ends_its_requests_only(monkeypatch):
    """Where the planner learns of rounds: of this one there is nothing to learn."""
    draft = Round.draft

    def broken(round, batch):
        if round.shape != PLAIN:
            raise ValueError("no draft today")
        return draft(round, batch)

    monkeypatch.setattr(Round, "draft", broken)
    engine = engine_of("chain", tree="auto")
    force(engine, lambda row, shapes: shapes[-1])
    given = submit_all(engine, prompts_of(2), ({},))
    assert len(list(engine.run())) == 2 and all(str(handle.error) == "no draft today" for handle, *_ in given)
    require_empty(engine)


def test_a_prompt_that_the_draft_model_cannot_read_ends_its_request_only(in_flight, monkeypatch):
    """While others, which it sees beside captured rounds, go on; nothing of the broken forward stays in its cache."""
    engine = engine_of("chain")
    runner = engine.drafter.runner
    extend = runner.extend

    def broken(sequences, tokens):
        if any(66 in text.tolist() for text in tokens):
            runner.cache.append(sequences, [len(text) for text in tokens])  # as a forward does before it computes
            raise ValueError("cannot read 66")
        return extend(sequences, tokens)

    monkeypatch.setattr(runner, "extend", broken)
    given = submit_all(engine, [[7 + n % 50 for n in range(9)], [9, 8, 7, 6, 5]], ({},))
    for _ in range(3):
        engine.step()
    bad = engine.submit([5, 66, 7, 8, 9, 10, 11], max_new_tokens=8)
    list(engine.run())
    assert str(bad.error) == "cannot read 66" and not bad.tokens
    for handle, prompt, options in given:
        assert handle.error is None and handle.tokens == solo("none", prompt, options)
    require_empty(engine)


@pytest.mark.filterwarnings("ignore:the draft model")
def test_rows_that_outgrow_the_draft_model_write_over_no_shared_block():
    """They start anew at the begin of their sequence, which others' drafts may read."""
    draft = noisy_copy("llama")
    draft.config.max_position_embeddings = 48
    runner, drafter = specdec.ModelRunner(model_of(), page_size=PAGE, mode="graph"), specdec.ModelDrafter(draft, 3)
    drafter.runner.page_size = PAGE
    engine = specdec.Engine(runner, drafter, memory=1 << 22, tree=None)
    prompt = [7 + number % 50 for number in range(30)]
    list(engine.run([{"prompt": prompt, "max_new_tokens": 6, "do_sample": False}]))
    cache, table = drafter.runner.cache, drafter.runner.cache.table
    kept = [page for page in range(table.num_pages) if table.is_registered(page)]
    keys = cache.key_pages[:, kept].clone()
    requests = [(prompt, 60), ([5, 6, 7], 45)]  # rounds still draft for the second one when the first is too long
    long, short = (engine.submit(text, max_new_tokens=count, do_sample=False) for text, count in requests)
    list(engine.run())
    assert short.error is None and len(long.tokens) == 60 and sum(long.record.proposed) > 0 == long.record.proposed[-1]
    assert len(kept) > 4 and all(map(table.is_registered, kept))
    assert cache.key_pages[:, kept].equal(keys)


@pytest.mark.covering(cases=2)
@pytest.mark.parametrize("name", NAMES[1:])
def test_shapes_that_change_with_rounds_in_flight(name, in_flight):
    """Texts and acceptance are those of the recorded shapes on the host."""
    engine = engine_of(name, tree="auto")
    force(engine, at_random(3))
    given = submit_all(engine, prompts_of(16, seed=3), KINDS[:4])
    list(engine.run())
    assert len({shape for handle, *_ in given for shape in handle.shapes}) > 1
    for handle, prompt, options in given:
        require_replay(name, handle, prompt, options)
    require_empty(engine)


def require_replay(name, handle, prompt, options):
    """A request alone, in rounds of the shapes that `handle` had, gets the same tokens with the same acceptance."""
    out = solo_generator(name).generate(torch.tensor([prompt]), max_new_tokens=16, shapes=handle.shapes, **options)
    assert handle.tokens == out.sequences[0, len(prompt) : len(prompt) + int(out.lengths[0])].tolist(), options
    ours, theirs = handle.stats, out.stats.rows[0]
    assert (ours.accepted, ours.proposed, ours.ranks) == (theirs.accepted, theirs.proposed, theirs.ranks)


def test_an_engine_says_why_rounds_are_not_captured(monkeypatch):
    """Of requests that are over and of those that run, each reason once; nothing where all rounds are captured."""
    engine = engine_of("chain")
    given = [engine.submit(prompt, max_new_tokens=4) for prompt in prompts_of(3)]
    list(engine.run())
    assert all(handle.finished for handle in given) and "on the host" not in engine.explain()
    for prompt in prompts_of(2):
        engine.submit(prompt, max_new_tokens=4, logits_processor=[double])
    list(engine.run())
    reason = "logits processors of a kind, or in an order, that needs the host: double"
    assert f"rounds on the host, of 0 requests that run and 2 before: {reason}" in engine.explain()
    engine.submit(prompts_of(1)[0], max_new_tokens=30, logits_processor=[double])
    engine.step()
    assert f"rounds on the host, of 1 requests that run and 2 before: {reason}" in engine.explain()

    def refuse(*_):
        raise CannotCapture("planted")

    monkeypatch.setattr(captured.CapturedRounds, "_make", refuse)
    engine = engine_of("none")
    monkeypatch.setattr(engine.target, "fall_back", lambda error: None)  # as in mode "auto", without its warning
    engine.submit(prompts_of(1)[0], max_new_tokens=4)
    list(engine.run())
    assert "rounds on the host, of 0 requests that run and 1 before: planted" in engine.explain()
    assert 'mode="eager"' in eager_engine().explain()


def double(ids, scores):
    """No captured round can hold a function of a user's own."""
    return 2 * scores


def eager_engine():
    engine = specdec.Engine(specdec.ModelRunner(model_of(), mode="eager"))
    engine.submit([5, 6, 7], max_new_tokens=2)
    list(engine.run())
    return engine
