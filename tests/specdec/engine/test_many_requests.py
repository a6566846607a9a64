"""A thousand random requests in a cache for a tenth of them: each ends as it would alone, and only its own way."""

import random

import torch
from transformers.generation import LogitsProcessor

import specdec
from tests.specdec.engine.test_engine import KINDS, engine_of, model_of, require_empty, solo

COUNT, SAMPLE, LONGEST, PAGES = 1000, 60, 12, 64


class Raises(LogitsProcessor):
    """Leaves scores as they are, and raises for texts of more than `limit` tokens."""

    def __init__(self, limit, name):
        self.limit, self.name = limit, name

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] > self.limit:
            raise ArithmeticError(self.name)
        return scores


def one_that_raises(draws, kind, length, name):
    """Options that break a request after 1 to 14 new tokens, if it gets that far; most requests get none."""
    limit = length + draws.randrange(1, 15)

    def callback(handle, new_tokens):
        if len(handle.prompt) + len(handle.tokens) > limit:
            raise ArithmeticError(name)

    def criterion(ids, scores):
        if ids.shape[1] > limit:
            raise ArithmeticError(name)
        return False

    options = {"callback": {"callback": callback}, "criterion": {"stopping_criteria": [criterion]}}
    return (options | {"processor": {"logits_processor": [Raises(limit, name)]}}).get(kind, {}), limit


def requests_of(count, seed=0):
    """(prompt, settings, what raises, those options, where) of each request."""
    draws = random.Random(seed)
    number = lambda: draws.randrange(10, 90)
    bases, given = [[number() for _ in range(40)] for _ in range(6)], []
    for i in range(count):
        shared = draws.choice([0, draws.randrange(40)])
        prompt = (draws.choice(bases)[:shared] + [number() for _ in range(draws.randrange(1, 8))])[:40]
        settings = {"seed": i} | draws.choice(KINDS) | {"max_new_tokens": draws.randrange(1, LONGEST + 1)}
        kind = draws.choices([None, "callback", "criterion", "processor"], [85, 6, 6, 3])[0]
        extra, limit = one_that_raises(draws, kind, len(prompt), f"request {i}")
        given.append((prompt, settings, kind, extra, limit))
    return given


def greedy_texts(prompts, eos):
    """What plain greedy decoding gives for all of `prompts` in one batch, cut after an end token."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    generator = specdec.AutoregressiveGenerator(model_of(), mode="eager")
    options = {"max_new_tokens": LONGEST, "pad_token_id": 0} | ({"eos_token_id": eos} if eos else {})
    out = generator.generate(ids, attention_mask=mask, **options)
    return [row[width : width + int(n)].tolist() for row, n in zip(out.sequences, out.lengths, strict=True)]


def require_own_error(handle, kind, name):
    """What ended it is what its own callback, criterion or processor raised."""
    error = handle.error.__cause__ if kind == "criterion" else handle.error
    while error is not None and not isinstance(error, ArithmeticError):
        error = error.__cause__
    assert handle.reason == "error" and error is not None and name in f"{handle.error} {error}", handle.error


def test_a_thousand_requests():
    given = requests_of(COUNT)
    engine = engine_of("chain", pages=PAGES, max_tokens_per_step=256)
    chosen, mixed = engine._scheduler.step, []
    engine._scheduler.step = lambda *a: mixed.append(chosen(*a)) or mixed[-1]
    handles = [engine.submit(prompt, **settings, **extra) for prompt, settings, _, extra, _ in given]
    finished = list(engine.run())
    require_empty(engine)
    assert len(finished) == COUNT and {*finished} == {*handles}
    assert sum(handle.preemptions for handle in handles) > 0
    assert sum(bool(step.rounds and step.prompts) for step in mixed) > len(mixed) // 4
    failed = 0
    for i, (handle, (prompt, settings, kind, _, limit)) in enumerate(zip(handles, given, strict=True)):
        length, wanted = len(prompt) + len(handle.tokens), settings["max_new_tokens"]
        if handle.error is not None:
            require_own_error(handle, kind, f"request {i}")
            failed += 1
        else:
            assert kind is None or length <= limit + (kind == "processor")
            assert handle.reason == ("length" if handle.tokens[-1] not in handle.request.eos else "end")
            assert len(handle.tokens) == wanted or handle.reason == "end"
    assert failed > COUNT // 20
    for eos in ([], [7, 8, 9]):  # all whose plain greedy texts can be had in one batch
        plain = [
            (handle, prompt, settings["max_new_tokens"])
            for handle, (prompt, settings, *_) in zip(handles, given, strict=True)
            if {*settings} - {"seed", "max_new_tokens"} == ({"eos_token_id"} if eos else set())
        ]
        texts = greedy_texts([prompt for _, prompt, _ in plain], eos)
        for (handle, _, count), text in zip(plain, texts, strict=True):
            expected = text[:count] if handle.error is None else text[: len(handle.tokens)]
            assert handle.tokens == expected
    pairs = list(zip(handles, given, strict=True))
    again = [pair for pair in pairs if pair[0].preemptions]  # made room
    for handle, (prompt, settings, *_) in again + random.Random(1).sample(pairs, SAMPLE):
        text = solo("chain", prompt, settings)
        assert handle.tokens == (text if handle.error is None else text[: len(handle.tokens)]), settings
