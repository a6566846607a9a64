"""A thousand random requests in a cache for a tenth of those that run: each ends as alone, and only its own way."""

import random
from collections import defaultdict
from functools import cache

import pytest
import torch
from transformers.generation import LogitsProcessor

import specdec
from specdec import TokenTree
from specdec.drafters.early_exit import first_layers
from specdec.engine import groups
from specdec.planning.policy import PLAIN
from tests.families import noisy_copy
from tests.specdec.engine.forced import force
from tests.specdec.engine.test_engine import KINDS, PAGE, model_of, require_empty

ROWS, LONGEST, PAGES = 128, 28, 88
TREE = TokenTree((None, 0, 0, 1, 3))


@cache
def small(model):
    """A model of one layer."""
    return first_layers(model(), 1)


def noisy():
    return noisy_copy("llama")


def drafter():
    made = specdec.ModelDrafter(small(noisy), tree=TREE)
    made.runner.page_size = PAGE
    return made


def engine_that_mixes(seed):
    """An engine whose rows draft trees, chains and nothing at random in the same steps."""
    runner, draft, draws = (
        specdec.ModelRunner(small(model_of), page_size=PAGE, mode="eager"),
        drafter(),
        random.Random(seed),
    )
    memory = PAGES * (runner.page_format.bytes + draft.runner.page_format.bytes)
    engine = specdec.Engine(runner, draft, memory=memory, max_tokens_per_step=512, max_rows=ROWS, tree="auto")
    force(engine, lambda row, shapes: shapes[0] if row is None else draws.choice([PLAIN, *shapes]))
    return engine


def solo_generator():
    return specdec.SpeculativeGenerator(small(model_of), drafter(), mode="eager")


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
    bases, given = [[number() for _ in range(16)] for _ in range(6)], []
    for i in range(count):
        shared = draws.choice([0, draws.randrange(16)])
        prompt = (draws.choice(bases)[:shared] + [number() for _ in range(draws.randrange(1, 8))])[:16]
        settings = {"seed": i} | draws.choice(KINDS) | {"max_new_tokens": draws.randrange(1, LONGEST + 1)}
        kind = draws.choices([None, "callback", "criterion", "processor"], [85, 6, 6, 3])[0]
        extra, limit = one_that_raises(draws, kind, len(prompt), f"request {i}")
        given.append((prompt, settings, kind, extra, limit))
    return given


def greedy_texts(prompts, settings):
    """What plain greedy decoding gives for all of `prompts` in one batch."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    generator = specdec.AutoregressiveGenerator(small(model_of), mode="eager")
    out = generator.generate(ids, attention_mask=mask, **{"max_new_tokens": LONGEST, "pad_token_id": 0} | settings)
    return [row[width : width + int(n)].tolist() for row, n in zip(out.sequences, out.lengths, strict=True)]


def solo_text(generator, prompt, settings, **options):
    """The new tokens of a request that runs alone."""
    out = generator.generate(torch.tensor([prompt]), **settings, **options)
    return out.sequences[0, len(prompt) : len(prompt) + int(out.lengths[0])].tolist()


def solo_texts(handles, given):
    """What each request gets alone: greedy ones in batches, sampled ones each in rounds of its recorded shapes.

    A few greedy ones run alone as well, as proof that a batch changes nothing."""
    alike, generator, texts = defaultdict(list), solo_generator(), {}
    for handle, (prompt, settings, *_) in zip(handles, given, strict=True):
        if settings.get("do_sample"):
            texts[handle] = solo_text(generator, prompt, settings, shapes=handle.shapes)
        else:
            rest = {name: value for name, value in settings.items() if name not in ("seed", "max_new_tokens")}
            alike[repr(rest)].append((handle, prompt, settings, rest))
    for some in alike.values():
        batch = greedy_texts([prompt for _, prompt, *_ in some], some[0][-1])
        for place, ((handle, prompt, settings, _), text) in enumerate(zip(some, batch, strict=True)):
            texts[handle] = text[: settings["max_new_tokens"]]
            assert place >= 5 or texts[handle] == solo_text(generator, prompt, settings)
    return texts


def require_own_error(handle, kind, name):
    """What ended it is what its own callback, criterion or processor raised."""
    error = handle.error.__cause__ if kind == "criterion" else handle.error
    while error is not None and not isinstance(error, ArithmeticError):
        error = error.__cause__
    assert handle.reason == "error" and error is not None and name in f"{handle.error} {error}", handle.error


def watch_steps(monkeypatch):
    """Of each step to come: the shapes of its rounds, and how many requests' prompts run beside them."""
    steps, run = [], groups.take_turns

    def take_turns(turns, chunks, **options):
        steps.append(([turn.shape for turn in turns], len(chunks)))
        run(turns, chunks, **options)

    monkeypatch.setattr(groups, "take_turns", take_turns)
    return steps


def require_mixed(steps):
    """Many steps held prompts, plain rows and trees together."""
    is_tree = lambda shape: shape.tree is not None and not shape.tree.is_chain
    mixed = [chunks and PLAIN in shapes and any(map(is_tree, shapes)) for shapes, chunks in steps]
    assert sum(map(bool, mixed)) > len(steps) // 4, (sum(map(bool, mixed)), len(steps))


def require_tenth(engine, handles):
    """Each cache has a tenth of the pages that as many requests as may run together need on average."""
    need = sum(engine._memory.caches[0].pages_for(handle.limit + TREE.size) for handle in handles) / len(handles) * ROWS
    assert all(cache.num_pages <= need / 10 for cache in engine._memory.caches), need


@pytest.mark.parametrize("count", [300, pytest.param(1000, marks=pytest.mark.thorough)])
def test_a_thousand_requests(count, monkeypatch):
    """With `make test` some hundred of them."""
    given, steps = requests_of(count), watch_steps(monkeypatch)
    engine = engine_that_mixes(seed=0)
    handles = [engine.submit(prompt, **settings, **extra) for prompt, settings, _, extra, _ in given]
    require_tenth(engine, handles)
    finished = list(engine.run())
    require_empty(engine)
    assert len(finished) == count and {*finished} == {*handles}
    require_mixed(steps)
    assert sum(handle.preemptions for handle in handles) > count // 21, sum(handle.preemptions for handle in handles)
    texts, failed = solo_texts(handles, given), 0
    for i, (handle, (prompt, settings, kind, _, limit)) in enumerate(zip(handles, given, strict=True)):
        text, length = texts[handle], len(prompt) + len(handle.tokens)
        if handle.error is not None:
            require_own_error(handle, kind, f"request {i}")
            assert handle.tokens == text[: len(handle.tokens)], settings
            failed += 1
        else:
            assert kind is None or length <= limit + (kind == "processor")
            assert handle.reason == ("length" if handle.tokens[-1] not in handle.request.eos else "end")
            assert handle.tokens == text, settings
    assert failed > count // 20
