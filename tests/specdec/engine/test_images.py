"""Requests with images get the texts that they would get alone, beside texts and other images."""

from functools import cache

import pytest
import torch

import medusa
import specdec
from attention.paged.device_batch import DeviceSequences
from specdec.drafters.eagle3.drafter import Eagle3Drafter
from tests.learned import fitted
from tests.matrix import TREE, random_heads
from tests.specdec.engine.test_engine import require_empty
from tests.vision import build, prompts

NEW, PAGE = 10, 4
LAYOUTS = ((2, 1, 4), (3,), (1, 1, 1, 1, 3), (9,), (2, 1, 4))
DRAFTERS = {
    "none": lambda model: None,
    "EAGLE-3": lambda model: Eagle3Drafter(fitted(model), 3),
    "Medusa heads": lambda model: medusa.MedusaDrafter(random_heads(model), TREE),
}


@cache
def model_of(kind):
    return build(kind)


@cache
def texts(kind, layouts=LAYOUTS):
    """Inputs of one prompt each, and what transformers says after it."""
    found = []
    for seed, layout in enumerate(layouts):
        given = prompts(kind, (layout,), seed)
        if "pixel_values" in given:
            given["pixel_values"] = given["pixel_values"] * (1 - 0.5 * seed)
        out = model_of(kind).generate(**given, do_sample=False, max_new_tokens=NEW)
        found.append((given, out[0, given["input_ids"].shape[1] :].tolist()))
    return found


def engine_of(kind, mode, drafter, pages, **options):
    runner = specdec.ModelRunner(model_of(kind), page_size=PAGE, mode=mode)
    made = DRAFTERS[drafter](model_of(kind))
    formats = [runner.page_format.bytes]
    if drafter == "EAGLE-3":
        made.validate(runner)
        made.runner.page_size = PAGE
        formats.append(made.runner.page_format.bytes)
    memory = pages * sum(formats)
    return specdec.Engine(runner, made, memory=memory, **{"max_tokens_per_step": 24, "tree": None} | options)


def submit(engine, given, **options):
    given = dict(given)
    return engine.submit(given.pop("input_ids"), **given, max_new_tokens=NEW, **options)


@pytest.mark.parametrize(("mode", "drafter", "pages"), [
    ("graph", "none", 200), ("graph", "EAGLE-3", 200), ("graph", "Medusa heads", 25), ("eager", "EAGLE-3", 25),
])  # fmt: skip
def test_each_gets_its_own_text(mode, drafter, pages):
    """With few pages some make room, and see their images again; the second half joins rows at work."""
    engine, wanted = engine_of("qwen2_5_vl", mode, drafter, pages), texts("qwen2_5_vl")
    handles = [submit(engine, given) for given, _ in wanted[:2]]
    engine.step(), engine.step()
    handles += [submit(engine, given) for given, _ in wanted[2:] + wanted[:1]]
    for _ in engine.run():
        pass
    for handle, (_, text) in zip(handles, [*wanted, wanted[0]], strict=True):
        assert handle.error is None and handle.tokens == text, handle.id
    assert pages == 200 or sum(handle.preemptions for handle in handles) > 0
    assert not engine.target.cache.shifts
    require_empty(engine)


def test_images_of_equal_placeholders_share_nothing():
    """Prompts of the same token ids with other pixels, one after the other in one engine with whole blocks of them."""
    engine, ((given, text), *_) = engine_of("qwen2_5_vl", "eager", "none", 200), texts("qwen2_5_vl")
    other = given | {"pixel_values": -given["pixel_values"]}
    expected = model_of("qwen2_5_vl").generate(**other, do_sample=False, max_new_tokens=NEW)[0, -NEW:].tolist()
    assert expected != text
    for inputs, wanted in ((given, text), (other, expected), (given, text)):
        handle = submit(engine, inputs)
        list(engine.run())
        assert handle.tokens == wanted
    assert engine.stats()["saved_tokens"] == 0


def test_rows_that_join_without_their_shift_are_noticed(monkeypatch):
    """A planted bug: tables of captured rounds keep the shifts of rows that left."""
    monkeypatch.setattr(DeviceSequences, "_write_shifts", lambda self, shifts: None)
    engine, wanted = engine_of("qwen2_5_vl", "graph", "none", 200), texts("qwen2_5_vl")
    handles = [submit(engine, given) for given, _ in wanted]
    list(engine.run())
    assert [handle.tokens for handle in handles] != [text for _, text in wanted]


def test_a_request_whose_images_do_not_fit_ends_alone():
    engine, wanted = engine_of("llava", "eager", "none", 200), texts("llava")
    good, text = wanted[0]
    broken = submit(engine, good | {"pixel_values": good["pixel_values"].repeat(2, 1, 1, 1)})
    handle = submit(engine, good)
    list(engine.run())
    assert broken.reason == "error" and "do not match" in str(broken.error) and handle.tokens == text
    with pytest.raises(ValueError, match="attention_mask must be all 1"):
        engine.submit(good["input_ids"], attention_mask=torch.tensor([[0, 1]]))
    running = submit(engine, good)
    engine.step()
    with pytest.raises(ValueError, match="images in its prompt, from which no request can be forked"):
        engine.fork(running)
    engine.cancel(running)
    require_empty(engine)
