"""Requests that go on from the text of another one."""

import pytest

from specdec.report.stats import RoundStats
from tests.specdec.engine.test_engine import PAGE, engine_of, prompts_of, require_empty, solo


@pytest.mark.parametrize("name", ["none", "chain"])
def test_forks_go_on_from_the_text_so_far_and_share_its_pages(name):
    engine, prompt = engine_of(name, pages=400), prompts_of(1)[0] * 4
    handle = engine.submit(
        prompt, max_new_tokens=30, do_sample=True, temperature=0.9, eos_token_id=None, seed=3, priority=2
    )
    while len(handle.tokens) < 10:
        engine.step()
    before = handle.tokens
    saved = engine.stats()["saved_tokens"]
    forks = engine.fork(handle, 4)
    greedy = engine.fork(handle, do_sample=False, max_new_tokens=5, logprobs=True)
    assert len(list(engine.run())) == 6
    assert handle.tokens == solo(name, prompt, handle.options | {"seed": 3, "max_new_tokens": 30}), (
        "it goes on as if nothing had been"
    )
    for fork in forks:
        assert fork.prompt == prompt + before and fork.limit == handle.limit and fork.priority == 2
        assert fork.reason == "length" and len(fork.tokens) == 30 - len(before)
    assert len({tuple(fork.tokens) for fork in [handle, *forks]}) == 5, "samples of their own"
    assert greedy[0].tokens == solo(name, prompt + before, {})[:5] and len(greedy[0].logprobs) == 5
    assert engine.stats()["saved_tokens"] - saved >= 5 * (len(prompt) // PAGE * PAGE)
    assert isinstance(forks[0].stats, RoundStats)
    require_empty(engine)


def test_forks_of_what_has_not_begun_and_of_what_has_ended():
    engine, prompt = engine_of(), prompts_of(1)[0]
    handle = engine.submit(prompt, max_new_tokens=6, stopping_criteria=[lambda ids, scores: False])
    (fork,) = engine.fork(handle)
    engine.cancel(handle)
    (second,) = engine.fork(handle)
    for count, match in ((2, "without do_sample"), (0, "got 0")):
        with pytest.raises(ValueError, match=match):
            engine.fork(handle, count)
    list(engine.run())
    assert fork.tokens == second.tokens == solo("chain", prompt, {})[:6]
    with pytest.raises(ValueError, match=r"has finished \(length\)"):
        engine.fork(fork)
