"""Results as they come: streams, the order of finishing, a progress bar, and Ctrl-C in the middle of a run."""

import os
import signal
import sys
import warnings

import pytest

from tests.specdec.engine.test_engine import engine_of, prompts_of, require_empty, solo, submit_all


@pytest.mark.parametrize("name", ["none", "chain"])
def test_streams_give_the_tokens_as_they_come(name):
    engine, prompts = engine_of(name), prompts_of(3)
    handles = [engine.submit(prompt, max_new_tokens=12) for prompt in prompts]
    first, second = engine.stream(handles[0]), engine.stream(handles[1])
    parts = [next(first), next(second), next(first)]
    assert all(parts) and not handles[0].finished
    assert parts[0] + parts[2] + sum(first, []) == handles[0].tokens == solo(name, prompts[0], {})[:12]
    assert parts[1] + sum(second, []) == handles[1].tokens == solo(name, prompts[1], {})[:12]
    list(engine.run())
    assert sum(engine.stream(handles[2]), []) == handles[2].tokens, "a finished one too"
    require_empty(engine)


def test_a_stream_raises_what_ended_its_request():
    def callback(handle, new_tokens):
        raise LookupError("seen enough")

    engine, prompt = engine_of(), prompts_of(1)[0]
    broken, good = engine.submit(prompt, callback=callback), engine.submit(prompt, max_new_tokens=9)
    received = []
    with pytest.raises(LookupError, match="seen enough"):
        for tokens in engine.stream(broken):
            received += tokens
    assert received == broken.tokens != []
    assert sum(engine.stream(good), []) == solo("chain", prompt, {})[:9]
    with pytest.raises(ValueError, match="request 0 is not one of this engine"):
        engine.stream(engine_of().submit(prompt))


def test_a_bar_counts_requests_and_tokens(capsys, monkeypatch):
    engine, prompts = engine_of(), prompts_of(3)
    requests = [dict(prompt=prompt, max_new_tokens=4 + i) for i, prompt in enumerate(prompts)]
    assert len(list(engine.run(requests, progress=True))) == 3
    assert "3/3" in (shown := capsys.readouterr().err) and "tokens=15" in shown
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.warns(UserWarning, match="pip install tqdm"):
        assert len(list(engine.run(requests, progress=True))) == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(engine.run(requests))) == 3
    assert capsys.readouterr().err == ""


@pytest.fixture
def ctrl_c():
    """Python's own handler, which programs that were started in the background lack."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("raised", [False, True], ids=["signal", "raised in a callback"])
def test_an_interrupted_run_gives_what_there_is_and_leaves_clean_caches(raised, ctrl_c):
    def callback(handle, new_tokens):
        if len(handle.tokens) > 5:
            if raised:
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGINT)

    engine, prompts, usual = engine_of("chain", max_rows=3), prompts_of(6), signal.getsignal(signal.SIGINT)
    short = engine.submit(prompts[0], max_new_tokens=1, priority=1)
    given = submit_all(engine, prompts[1:], ({},), callback=callback, max_new_tokens=30)
    results = []
    with pytest.raises(KeyboardInterrupt):
        for handle in engine.run():
            results.append(handle)
    assert results[0] is short and short.reason == "length"
    assert {*results} == {short, *(handle for handle, *_ in given)}, "partial results come out"
    assert {handle.reason for handle in results[1:]} == {"interrupted"}
    assert any(handle.tokens for handle, *_ in given) and not all(handle.tokens for handle, *_ in given)
    for handle, prompt, options in given:
        assert handle.tokens == solo("chain", prompt, options)[: len(handle.tokens)]
    require_empty(engine)
    assert signal.getsignal(signal.SIGINT) is usual
    again = engine.submit(prompts[1], max_new_tokens=8)
    assert list(engine.run()) == [again] and again.tokens == solo("chain", prompts[1], {})[:8]


def test_a_handler_of_the_users_own_is_called_after_the_step():
    engine, called = engine_of(), []
    usual = signal.signal(signal.SIGINT, lambda number, frame: called.append(len(handle.tokens)))
    try:
        callback = lambda handle, new_tokens: handle.finished or os.kill(os.getpid(), signal.SIGINT)
        handle = engine.submit(prompts_of(1)[0], max_new_tokens=8, callback=callback)
        assert list(engine.run()) == [handle] and len(called) == handle.stats.rounds
    finally:
        signal.signal(signal.SIGINT, usual)
