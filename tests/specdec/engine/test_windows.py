"""Models with a sliding window in every layer: an engine gives pages back while a row runs, and texts stay the same."""

import random
from functools import cache

import pytest
import torch

import specdec
from specdec.cuda_graph import HostCopy
from specdec.drafters.base import runners_of
from specdec.engine import lane
from specdec.rounds import captured
from tests.families import build, noisy_copy
from tests.matrix import DRAFTERS
from tests.specdec.engine.test_engine import KINDS, PAGE, require_empty

WINDOW = 9  # of `families`' Mistral, 3 pages
NEW = 60
NAMES = ("none", "chain", "tree", "dynamic tree", "prompt lookup", "early exit", "Medusa heads", "translated")


@cache
def model_of(family="mistral"):
    return build(family)


def drafter_of(name, family="mistral"):
    drafter = None if name == "none" else DRAFTERS[name](model_of(family), noisy_copy(family))
    for runner in runners_of(drafter):
        runner.page_size = PAGE
    return drafter


def engine_of(name="none", pages=200, mode="eager", family="mistral", **options):
    runner = specdec.ModelRunner(model_of(family), page_size=PAGE, mode=mode)
    drafter = drafter_of(name, family)
    own = [] if name == "early exit" else list(runners_of(drafter))
    memory = pages * sum(one.page_format.bytes for one in (runner, *own))
    return specdec.Engine(runner, drafter, memory=memory, **{"max_tokens_per_step": 32, "tree": None} | options)


def prompts_of(count, length, seed=0):
    """Texts of about `length` tokens that begin alike."""
    draws = random.Random(seed)
    base = [draws.randrange(10, 90) for _ in range(length)]
    return [base[: draws.randrange(length // 2, length)] + [draws.randrange(10, 90), 10 + i] for i in range(count)]


@cache
def solo_generator(name, family="mistral"):
    return specdec.SpeculativeGenerator(model_of(family), drafter_of(name, family), mode="eager")


def solo(name, prompt, options, family="mistral"):
    """The new tokens of a request that runs alone in a generator, which gives no page back."""
    out = solo_generator(name, family).generate(torch.tensor([prompt]), **{"max_new_tokens": NEW} | options)
    return out.sequences[0, len(prompt) : len(prompt) + int(out.lengths[0])].tolist()


def run(engine, poison=False, flush=False):
    """Step to the end; with `poison` every page that nobody owns and no block names holds NaN after each step.

    Returns the most pages of the target's cache that were owned after a step."""
    most = 0
    while not engine.idle:
        engine.step()
        if flush:
            engine._prefixes.flush()
        for held in engine._memory.caches:
            held.table.check_integrity()
            if poison:
                held.key_pages[:, held.table._free] = held.value_pages[:, held.table._free] = float("nan")
        for index in engine._prefixes.indexes:
            index.check_integrity()
        most = max(most, engine.target.cache.stats().owned)
    return most


def submit_all(engine, prompts, kinds):
    settings = [{"seed": i, "max_new_tokens": NEW} | kinds[i % len(kinds)] for i in range(len(prompts))]
    handles = [engine.submit(prompt, **chosen) for prompt, chosen in zip(prompts, settings, strict=True)]
    return list(zip(handles, prompts, settings, strict=True))


def require_texts(name, given, family="mistral"):
    for handle, prompt, options in given:
        assert handle.error is None and handle.tokens == solo(name, prompt, options, family), options


@pytest.fixture(params=["eager", "graph", "one round late"])
def mode(request, monkeypatch):
    """How rounds run; on a CPU a round that is read late would find its outcome overwritten by the next one."""
    if request.param != "one round late":
        return request.param
    monkeypatch.setattr(lane, "rounds_in_flight", lambda rows: 2)
    monkeypatch.setattr(captured, "HostCopy", lambda outcome: HostCopy(outcome.clone()))
    return "graph"


@pytest.mark.parametrize("flush", [False, True], ids=["blocks are kept", "blocks are forgotten"])
@pytest.mark.parametrize("name", NAMES)
def test_texts_are_those_of_requests_alone(name, mode, flush, monkeypatch):
    """Of all kinds together, with NaN in every page that was given back."""
    monkeypatch.setenv("SPECDEC_CHECK_KV", "1")
    engine = engine_of(name, mode=mode)
    given = submit_all(engine, prompts_of(5, 40), KINDS[:6])
    run(engine, poison=True, flush=flush)
    require_texts(name, given)
    require_empty(engine)
