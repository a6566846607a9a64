"""The engine on a GPU, with the Triton kernels and graphs of forwards."""

import pytest
import torch

import specdec
from specdec.drafters.base import runners_of
from tests.families import build, noisy_copy
from tests.matrix import DRAFTERS
from tests.specdec.engine.forced import at_random, force
from tests.specdec.engine.test_engine import KINDS, prompts_of, require_empty, submit_all

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("name", ["none", "chain", "tree", "early exit"])
def test_pages_before_a_window_are_given_back(name, mode):
    """With a round in flight, and NaN in all pages that nobody owns."""
    model, draft = build("mistral").cuda(), noisy_copy("mistral").cuda()
    make = lambda: None if name == "none" else DRAFTERS[name](model, draft)
    runner, drafter = specdec.ModelRunner(model, page_size=16, mode=mode), make()
    for held in runners_of(drafter):
        held.page_size = 16
    engine = specdec.Engine(runner, drafter, memory=160 * runner.page_format.bytes, max_tokens_per_step=64, tree=None)
    prompts = [prompt * 2 for prompt in prompts_of(6)]
    handles = [engine.submit(prompt, max_new_tokens=90, eos_token_id=[]) for prompt in prompts]
    freed = 0
    while not engine.idle:
        engine.step()
        engine._prefixes.flush()
        for held in engine._memory.caches:
            held.key_pages[:, held.table._free] = held.value_pages[:, held.table._free] = float("nan")
        table = runner.cache.table
        freed = max([freed, *(table.freed_pages(sequence) for sequence in table.sequences)])
    assert freed >= 5
    solo = specdec.SpeculativeGenerator(model, make(), mode="eager")
    for handle, prompt in zip(handles, prompts, strict=True):
        out = solo.generate(torch.tensor([prompt]).cuda(), max_new_tokens=90, eos_token_id=[])
        assert handle.error is None and handle.tokens == out.sequences[0, len(prompt) :].tolist()
    require_empty(engine)


@pytest.mark.parametrize("tree", [None, "auto"])
@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize(
    "name", ["none", "chain", "tree", "dynamic tree", "Medusa heads", "early exit", "prompt lookup"]
)
def test_texts_are_those_of_requests_alone(name, mode, tree):
    """Also where requests make room for others, where a prefix is shared, and in shapes that the load decides."""
    model, draft = build("llama").cuda(), noisy_copy("llama").cuda()
    make = lambda: None if name == "none" else DRAFTERS[name](model, draft)
    runner = specdec.ModelRunner(model, page_size=16, mode=mode)
    drafter = make()
    for held in vars(drafter).values() if drafter is not None else ():
        if isinstance(held, specdec.ModelRunner):
            held.page_size = 16
    memory = 24 * runner.page_format.bytes
    engine = specdec.Engine(runner, drafter, memory=memory, max_tokens_per_step=64, tree=tree)
    if tree == "auto" and mode == "graph":
        force(engine, at_random(0))
    solo = specdec.SpeculativeGenerator(model, make(), mode="eager")
    kinds = KINDS if name != "Medusa heads" or tree == "auto" else ({}, dict(repetition_penalty=1.2))
    given = submit_all(engine, prompts_of(10), kinds)
    list(engine.run())
    for handle, prompt, options in given:
        assert handle.error is None
        shapes = handle.shapes if tree == "auto" and drafter is not None else None
        out = solo.generate(torch.tensor([prompt]).cuda(), **{"max_new_tokens": 16, "shapes": shapes} | options)
        length = len(prompt) + int(out.lengths[0])
        assert handle.tokens == out.sequences[0, len(prompt) : length].tolist(), options
    require_empty(engine)
