"""Log probabilities of new tokens are those of one forward of the plain model over the finished text."""

import pytest
import torch

import specdec
from tests.specdec.engine.test_engine import KINDS, NAMES, engine_of, model_of, prompts_of, require_empty, solo


def teacher_forced(prompt, tokens):
    """log p of each of `tokens`, by the model's own forward."""
    with torch.inference_mode():
        logits = model_of()(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]


@pytest.mark.parametrize("name", NAMES)
def test_they_are_those_of_a_forward_over_the_text(name):
    engine, seen = engine_of(name), {}

    def callback(handle, new_tokens):
        seen[handle] = len(handle.logprobs)
        assert seen[handle] == len(handle.tokens)

    prompts, kinds = prompts_of(6), (*KINDS[:5], KINDS[-1])
    given = [
        engine.submit(prompt, seed=i, logprobs=True, callback=callback, **{"max_new_tokens": 9} | kind)
        for i, (prompt, kind) in enumerate(zip(prompts, kinds, strict=True))
    ]
    without = engine.submit(prompts[1], seed=1, max_new_tokens=9, **kinds[1])
    list(engine.run())
    for handle, prompt in zip(given, prompts, strict=True):
        assert handle.error is None and handle.record.outputs == {}, "no tensor stays"
        assert torch.tensor(handle.logprobs).allclose(teacher_forced(prompt, handle.tokens), atol=1e-4)
    assert without.tokens == given[1].tokens
    with pytest.raises(ValueError, match="handle.logprobs needs submit"):
        _ = without.logprobs
    require_empty(engine)


def test_they_survive_making_room_and_a_broken_round():
    engine = engine_of("chain", pages=36)
    prompts = prompts_of(12)
    given = [engine.submit(prompt, max_new_tokens=16, logprobs=True) for prompt in prompts]

    def criterion(ids, scores):
        if ids.shape[1] > 8:
            raise OSError("gone")
        return False

    broken = engine.submit([11, 12, 13], max_new_tokens=16, logprobs=True, stopping_criteria=[criterion])
    list(engine.run())
    assert sum(handle.preemptions for handle in given) > 0
    for handle, prompt in zip(given, prompts, strict=True):
        assert handle.tokens == solo("chain", prompt, {})
        assert torch.tensor(handle.logprobs).allclose(teacher_forced(prompt, handle.tokens), atol=1e-4)
    assert broken.reason == "error" and len(broken.logprobs) == len(broken.tokens)


def test_greedy_tokens_after_a_processor_keep_the_models_own_numbers():
    """A rule that is not exact too: the numbers are the target's."""
    engine = specdec.Engine(model_of(), memory=1 << 20, rule=specdec.Typical())
    handle = engine.submit([11, 12], do_sample=True, temperature=0.3, top_k=2, max_new_tokens=8, logprobs=True)
    list(engine.run())
    assert torch.tensor(handle.logprobs).allclose(teacher_forced([11, 12], handle.tokens), atol=1e-4)
