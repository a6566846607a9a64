"""Draft models on another device than their target, and targets whose own layers are on several."""

import copy
import re
import warnings
from contextlib import nullcontext

import pytest
import torch
from accelerate.hooks import attach_align_device_hook_on_blocks

import medusa
import specdec
from attention import PagedKVCache, UnsupportedArchitecture
from attention.kv.layout import LayerLayout
from attention.kv.places import Place
from scripts.generate_bench import rounds
from specdec.drafters.base import runners_of
from specdec.drafters.eagle3.drafter import Eagle3Drafter
from specdec.engine import memory
from specdec.training.eagle3.network import new_eagle3
from tests.families import VOCAB, build, noisy_copy, ragged_prompts
from tests.matrix import DRAFTERS, TREE, random_heads, require_free, word_tokenizer, words
from tests.other_device import OTHER, THIRD, Elsewhere, elsewhere, move, other_devices

CPU = torch.device("cpu")
WITH_MODELS = ("chain", "tree", "dynamic tree")
KNOWN = [*words(VOCAB)[:-9], *(f"x{i}" for i in range(9))]  # of the translated drafter
TEXT = dict(max_new_tokens=8)
SAMPLED = TEXT | dict(do_sample=True, temperature=0.8, top_k=20, seed=3)


def drafter(name, model, draft):
    match name:
        case "translated":
            return specdec.TranslatedDrafter(draft, word_tokenizer(words(VOCAB)), word_tokenizer(KNOWN), 3)
        case "synthetic":
            return specdec.SyntheticDrafter(draft, 0.6, 4)
    return DRAFTERS[name](model, draft)


def eager(model, *arguments, **options):
    return specdec.SpeculativeGenerator(specdec.ModelRunner(model, mode="eager"), *arguments, **options)


def texts(generator, place=CPU):
    """Greedy and sampled ones, of two rows."""
    ids, mask = (elsewhere(x, place) for x in ragged_prompts(2))
    return [generator.generate(ids, mask, **options).sequences.tolist() for options in (TEXT, SAMPLED)]


def spread(first=OTHER, last=OTHER, family="llama", count=1):
    """A model whose inputs are on OTHER, its first `count` layers on `first`, the others on THIRD, its output layer on
    `last`, by the hooks that accelerate's `device_map` makes."""
    model = build(family)
    blocks = {f"model.layers.{i}": THIRD if i >= count else first for i in range(len(model.model.layers))}
    places = {"model.embed_tokens": OTHER, "model.rotary_emb": OTHER, "model.norm": THIRD, "lm_head": last} | blocks
    for name, place in places.items():
        move(model.get_submodule(name), place)
    attach_align_device_hook_on_blocks(model, {"": OTHER} | places, offload=dict.fromkeys(places, False))
    return model


def test_tensors_of_two_devices_do_not_meet():
    with other_devices():
        a, b = torch.ones(3, device=OTHER), torch.ones(3)
        for mix in (lambda: a + b, lambda: b.add_(a), lambda: torch.cat([a, b]), lambda: b[a.long()]):
            with pytest.raises(RuntimeError, match="on the same device"):
                mix()
        assert Elsewhere.moves == [] and (a + 1).tolist() == [2, 2, 2] and (a + a.to(b.device).sum()).device == OTHER
        assert Elsewhere.moves == [(OTHER, CPU, torch.float32, 3)]


@pytest.mark.covering(cases=2)
@pytest.mark.parametrize("name", [*WITH_MODELS, "translated", "synthetic"])
def test_a_draft_model_on_another_device_gives_the_same_texts(name):
    draft = lambda: build("llama") if name == "synthetic" else noisy_copy("llama")
    expected = texts(eager(build("llama"), drafter(name, None, draft())))
    with other_devices():
        generator = eager(build("llama"), drafter(name, None, move(draft(), OTHER)))
        assert texts(generator) == expected
    require_free(generator)
    assert {runner.cache.device for runner in runners_of(generator.drafter)} == {OTHER}
    there = {dtype for source, target, dtype, _ in Elsewhere.moves if (source, target) == (CPU, OTHER)}
    back = {dtype for source, target, dtype, _ in Elsewhere.moves if (source, target) == (OTHER, CPU)}
    assert there == {torch.int64} and back == {torch.float32}, "tokens and trees go there, logits come back"
    assert "rounds run on the host: the draft model is on hpu:0, the target on cpu" in generator.explain()


def test_rounds_with_a_draft_model_elsewhere_are_not_captured():
    ids, mask = ragged_prompts(2)
    expected = specdec.AutoregressiveGenerator(build("llama")).generate(ids, mask, **TEXT)
    with other_devices(), pytest.warns(UserWarning, match="cannot be recorded"):  # a double's own forwards cannot be
        generator = specdec.SpeculativeGenerator(build("llama"), specdec.ModelDrafter(move(noisy_copy("llama"), OTHER)))
        out = generator.generate(ids, mask, **TEXT)
    assert generator.target.mode != "eager" and out.stats.host == "the draft model is on hpu:0, the target on cpu"
    assert out.sequences.equal(expected.sequences)


def test_an_engine_drafts_on_another_device():
    ids, mask = ragged_prompts(4)
    prompts = [row[kept.bool()] for row, kept in zip(ids, mask, strict=True)]

    def handles(place):
        model = move(noisy_copy("llama"), place)
        runner = specdec.ModelRunner(build("llama"), page_size=16, mode="eager")
        engine = specdec.Engine(runner, specdec.ModelDrafter(model, 3), memory=1 << 21, tree=None)
        submitted = [engine.submit(p, seed=5, do_sample=i > 1, **TEXT) for i, p in enumerate(prompts)]
        list(engine.run())
        return [handle.tokens for handle in submitted]

    with other_devices():
        assert handles(CPU) == handles(OTHER)


def test_recurrent_states_lie_where_their_layers_are():
    draft = lambda: specdec.ModelDrafter(noisy_copy("qwen3_5"), tree=TREE)
    expected = texts(eager(build("qwen3_5"), draft()))
    with other_devices():
        generator = eager(spread(family="qwen3_5", count=2), draft())
        assert texts(generator, OTHER) == expected
    assert [pool.device for pool in generator.target.cache.states.pools] == [OTHER, OTHER, THIRD, THIRD]
    require_free(generator)


@pytest.mark.parametrize("name", ["EAGLE-3", "P-EAGLE", "EAGLE-3, dynamic tree"])
def test_a_target_and_a_learned_drafter_elsewhere_give_the_same_texts(name):
    drafter = DRAFTERS[name](build("llama"), None)
    expected = texts(eager(build("llama"), drafter))
    with other_devices():
        network, shape = move(copy.deepcopy(drafter.model), OTHER), dict(tree=TREE)
        there = Eagle3Drafter(network, **(dict(dynamic=(9, 4, 3)) if "dynamic" in name else shape))
        generator = eager(move(build("llama"), OTHER), there)
        assert texts(generator, OTHER) == expected
    require_free(generator)


def test_rounds_to_be_timed_take_prompts_to_the_device(monkeypatch):
    """A request holds its prompts on the host."""
    given = []
    monkeypatch.setattr(rounds, "extend", lambda runner, live, texts, *_: given.extend(text.device for text in texts))
    with other_devices():
        ids = elsewhere(torch.arange(3, 27).view(2, 12), OTHER)
        generator = eager(move(build("llama"), OTHER), None)
        one = rounds.opened(generator, ids, torch.ones_like(ids), 4)
        with pytest.raises(RuntimeError, match="on the same device"), one as round:  # the double has no captured ones
            round.whole()
    assert given == [OTHER, OTHER]


def test_an_engine_counts_the_memory_of_each_device(monkeypatch):
    with other_devices():
        target, draft = specdec.ModelRunner(build("llama")), specdec.ModelRunner(move(noisy_copy("llama"), OTHER))
        whole = specdec.ModelRunner(spread())
    page = target.page_format.bytes
    parts = {place: form.bytes for place, form in memory.page_formats(whole).items()}
    assert parts == {OTHER: page // 3, THIRD: 2 * page // 3}, "one layer of three, and two"
    room = {CPU: 9 * page, OTHER: 4 * page, THIRD: 3 * page}
    monkeypatch.setattr(memory, "memory_within", room.__getitem__)
    assert memory.num_pages(target, [], None) == 9 and memory.num_pages(target, [draft], None) == 4
    assert memory.num_pages(whole, [], None) == 4, "two layers of three on the device for three pages of all"
    assert memory.num_pages(whole, [draft], None) == 3 and memory.num_pages(target, [draft], 7 * page) == 3


def test_an_engine_counts_the_pages_of_a_drafter_that_reads_features(monkeypatch):
    model = build("llama")
    drafter = Eagle3Drafter(new_eagle3(model, None), 3)
    engine = specdec.Engine(specdec.ModelRunner(model, mode="eager"), drafter)
    own, page = drafter.runner.page_format.bytes, engine.target.page_format.bytes
    assert memory.page_formats(drafter.runner)[CPU].bytes == own
    monkeypatch.setattr(memory, "memory_within", lambda device: 5 * (own + page))
    assert memory.num_pages(engine.target, [drafter.runner], None) == 5


@pytest.mark.parametrize(("name", "last"), [("none", THIRD), ("chain", OTHER), ("tree", THIRD)])
def test_a_target_on_several_devices_gives_the_texts_of_one(name, last):
    make = lambda: None if name == "none" else drafter(name, None, noisy_copy("llama"))
    expected = texts(eager(build("llama"), make()))
    with other_devices():
        generator = specdec.SpeculativeGenerator(spread(last=last), make())
        assert texts(generator, OTHER) == expected
        require_free(generator)
    cache = generator.target.cache
    assert [(part.device, part.num_layers) for part in cache.parts] == [(OTHER, 1), (THIRD, 2)]
    assert cache.places == (Place(0, 0), Place(1, 0), Place(1, 1))
    assert cache.stats().bytes_per_page == generator.target.page_format.bytes
    assert "runs eagerly: its layers are on hpu:0, hpu:1" in generator.explain()


def test_a_target_on_several_devices_gives_features_and_long_prompts():
    """Of layers on all devices, at kept tokens and at all; a prompt in pieces."""
    tokens, keep = torch.arange(3, 14), torch.tensor([2, 10])
    for kind in ("last", "prompt"):
        wanted = specdec.model.features.Features((0, 1, 3), kind)
        found = []
        for place in (CPU, OTHER):
            with other_devices() if place == OTHER else nullcontext():
                runner = specdec.ModelRunner(spread() if place == OTHER else build("llama"), page_size=4, mode="eager")
                runner.PREFILL_CHUNK = 5
                runner.reserve([40])
                sequence = runner.cache.add()
                kept, given = elsewhere(keep, place), elsewhere(tokens, place)
                out = runner.forward([sequence], given, [11], keep=kept, features=wanted)
                assert out.logits.device == out.features.device == place
                last = runner.extend([sequence], [given])
                found.append([x.tolist() for x in (out.logits, out.features, last)])
        assert found[0] == found[1]


def test_pages_on_several_devices_move_together():
    """A fork copies its last page, a commit closes gaps: in every layer."""
    layout = LayerLayout.uniform(num_layers=3, num_kv_heads=2, head_dim=4)
    found = []
    with other_devices():
        for devices in ([CPU] * 3, [CPU, OTHER, CPU], [OTHER, THIRD, OTHER]):
            cache = PagedKVCache.for_layout(layout, 6, 4, devices=devices, device=devices[0])
            torch.manual_seed(0)
            layers = [cache.parts[part].key_pages[there] for part, there, _ in cache.places]
            assert [layer.device for layer in layers] == devices
            for layer in layers:
                layer.copy_(torch.randn(layer.shape).to(layer.device))
            first = cache.add()
            cache.append([first], [6])
            other = cache.fork(first)
            cache.append([other], [4])
            cache.commit([other], [5], [(0, 2, 4)])
            slots = cache.slots(other, range(8))
            found.append([layer.flatten(0, 1).to(CPU)[slots].tolist() for layer in layers])
    assert found[0] == found[1] == found[2] and len({len(each) for each in found}) == 1


def test_an_engine_runs_a_target_on_several_devices():
    prompts = [list(range(3, 3 + n)) for n in (5, 22, 40)]
    found = []
    for place in (CPU, OTHER):
        with other_devices() if place == OTHER else nullcontext():
            runner = specdec.ModelRunner(spread() if place == OTHER else build("llama"), page_size=8, mode="eager")
            draft = specdec.ModelDrafter(noisy_copy("llama"), tree=specdec.TokenTree.from_widths((2, 2)))
            engine = specdec.Engine(runner, draft, memory=1 << 20, tree=None, max_tokens_per_step=24)
            handles = [engine.submit(prompt, **TEXT) for prompt in prompts]
            list(engine.run())
            assert all(handle.error is None for handle in handles)
            found.append([handle.tokens for handle in handles])
    assert found[0] == found[1]


def test_what_several_devices_do_not_allow_is_refused():
    with other_devices():
        model = spread()
        with pytest.raises(ValueError, match="a model on several devices runs in mode=\"eager\" only, got 'graph'"):
            specdec.ModelRunner(model, mode="graph")
        apart = specdec.ModelRunner(spread(last=THIRD))
        heads = move(random_heads(build("llama")), THIRD)
        with pytest.raises(ValueError, match="output layer is on hpu:1, and hidden states come to hpu:0"):
            medusa.MedusaDrafter(heads).validate(apart)
        model = spread(first=THIRD)
        with pytest.raises(UnsupportedArchitecture, match=re.escape("inputs on hpu:0, where none of its layers")):
            specdec.ModelRunner(model)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["eager", "auto"])
@pytest.mark.parametrize("name", [*WITH_MODELS, "translated"])
@pytest.mark.parametrize("places", [("cuda", "cpu"), ("cpu", "cuda")], ids="-".join)
def test_a_gpu_and_a_cpu_give_the_texts_of_one_device(places, name, mode):
    """Target on one, draft model on the other, in float32: the texts of both on the target's device."""
    at, other = places
    ids, mask = (x.to(at) for x in ragged_prompts(3))
    found = []
    for place in (at, other):
        target = specdec.ModelRunner(build("llama").to(at), mode=mode)
        generator = specdec.SpeculativeGenerator(target, drafter(name, None, noisy_copy("llama").to(place)))
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*does without")
            outs = [generator.generate(ids, mask, **options) for options in (TEXT, SAMPLED)]
        found.append([out.sequences.tolist() for out in outs])
        require_free(generator)
    assert found[0] == found[1]
    plain = specdec.AutoregressiveGenerator(build("llama").to(at), mode=mode).generate(ids, mask, **TEXT)
    assert found[1][0] == plain.sequences.tolist()
    (draft,) = runners_of(generator.drafter)
    reason = f"the draft model is on {draft.device}, the target on {target.device}"
    assert outs[0].stats.host == (reason if mode == "auto" else 'the target runs with mode="eager"')
    assert f"rounds run on the host: {reason}" in generator.explain()
