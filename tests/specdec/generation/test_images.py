"""Vision-language targets: prompts with images give transformers' texts, with every kind of draft."""

from functools import cache

import pytest
import torch
from transformers import DynamicCache

import attention.hf.prompt as prompt
import medusa
import specdec
from attention.native.library import why_unavailable
from scripts.generate_bench.peers import cache_argument
from specdec import TokenTree
from specdec.drafters.feature_state import FeatureState
from specdec.drafters.model_state import ModelState
from specdec.drafters.network.parts import over_target
from specdec.model.image_prompts import run_image_prompts
from specdec.requests.images import image_prompts
from tests import families
from tests.learned import eagle3, fitted, mtp, mtp_module, outputs_of, outputs_of_modules
from tests.matrix import at_each_run, random_heads, require_free
from tests.vision import IMAGE, VOCAB, build, prompts

NEW, PAGE = 10, 4
TREE = TokenTree((None, 0, 0, 0, 1, 1, 2, 3, 4, 4, 5, 8, 9))  # 13 nodes
FAMILIES = ["qwen2_5_vl", "qwen3_vl", "gemma3", "llava", "mistral3"]
SINGLE = ((2, 1, 4),)  # a prompt with an image
CLOSE = ((2, 1, 1), (3,), (1, 1, 1, 1, 2))  # images that end just before the prompts do


@cache
def draft_model():
    """It reads token ids alone."""
    return families.build("llama")


DRAFTERS = {
    "none": lambda model: None,
    "chain": lambda model: specdec.ModelDrafter(draft_model(), 3),
    "tree": lambda model: specdec.ModelDrafter(draft_model(), tree=TREE),
    "lookup": lambda model: specdec.PromptLookupDrafter(5, 2),
    "Medusa heads": lambda model: medusa.MedusaDrafter(random_heads(model), TREE),
    "EAGLE-3": lambda model: eagle3(model, tree=TREE),
    "MTP": lambda model: mtp(model),
    "early exit": lambda model: specdec.EarlyExitDrafter(model, 1, num_tokens=3),
    "quantised self": lambda model: specdec.QuantisedSelfDrafter(model, 3, bits=8, group=32),
}


@cache
def model_of(family):
    return build(family)


@cache
def own_text(family, layout=None):
    """Prompts, and what transformers makes of them: rows with one image, none and two, unless `layout` says others."""
    given = prompts(family) if layout is None else prompts(family, layout)
    return given, model_of(family).generate(**given, do_sample=False, max_new_tokens=NEW)


def generate(family, mode, drafter, layout=None, **options):
    given, expected = own_text(family, layout)
    runner = specdec.ModelRunner(model_of(family), mode=mode, page_size=PAGE)
    generator = specdec.SpeculativeGenerator(runner, DRAFTERS[drafter](model_of(family)))
    out = generator.generate(**given, **{"max_new_tokens": NEW} | options)
    assert runner.cache.free_pages == runner.cache.num_pages and not runner.cache.shifts
    assert mode == "eager" or out.stats.host is None
    return out, expected


@pytest.mark.parametrize("drafter", ["chain", "Medusa heads", "EAGLE-3"])
@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers(family, mode, drafter):
    out, expected = generate(family, mode, drafter)
    assert out.sequences.equal(expected)


@pytest.mark.parametrize(
    ("mode", "drafter"), [("eager", "none"), ("graph", "tree"), ("graph", "MTP"), ("compile", "lookup")]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_of_further_drafts(family, mode, drafter):
    if mode == "compile" and why_unavailable():
        pytest.skip("no C compiler")
    out, expected = generate(family, mode, drafter)
    assert out.sequences.equal(expected)


CASES = [("qwen2_5_vl", "graph", "Medusa heads"), ("gemma3", "eager", "chain"), ("qwen2_5_vl", "graph", "early exit"),
         ("qwen3_vl", "eager", "quantised self")]  # fmt: skip


@pytest.mark.parametrize(("kind", "mode", "drafter"), CASES)
def test_a_few_of_each(kind, mode, drafter):
    """What the whole test suite has of the matrix."""
    out, expected = generate(kind, mode, drafter)
    assert out.sequences.equal(expected)


@pytest.mark.parametrize(("mode", "drafter"), [("eager", "lookup"), ("graph", "Medusa heads")])
def test_one_prompt_of_a_target_with_recurrent_states(mode, drafter):
    out, expected = generate("qwen3_5", mode, drafter, SINGLE)
    assert out.sequences.equal(expected)


def test_several_prompts_of_a_target_with_recurrent_states():
    generator = specdec.SpeculativeGenerator(model_of("qwen3_5"), None, mode="eager")
    with pytest.raises(ValueError, match="recurrent states: prompts with images run one at a time.*got 3 prompts"):
        generator.generate(**prompts("qwen3_5"), max_new_tokens=2)
    require_free(generator)


@pytest.mark.seam
@pytest.mark.parametrize("kind", ["qwen2_5_vl", "gemma3"])
def test_keys_values_and_positions_of_the_prompt(kind):
    """Pages hold what transformers' cache does; slots count tokens, while positions follow the planes."""
    model, given = model_of(kind), prompts(kind)
    target = specdec.ModelRunner(model, mode="eager", page_size=PAGE)
    target.reserve([40] * 3)
    sequences, mask = [target.cache.add() for _ in range(3)], given["attention_mask"] != 0
    others = {name: x for name, x in given.items() if name not in ("input_ids", "attention_mask")}
    seen = []
    features = specdec.model.features.Features((0, 2), "prompt")
    run_image_prompts(target, sequences, image_prompts(target, given["input_ids"], mask, others), features,
                      lambda rows, states: seen.extend(states))  # fmt: skip
    cache = DynamicCache()
    positions = model._prepare_position_ids_for_generation(given["input_ids"], given)
    with torch.no_grad():
        own = model(**given, position_ids=positions, output_hidden_states=True, use_cache=True,
                    **{cache_argument(model): cache})  # fmt: skip
    for row, (sequence, real) in enumerate(zip(sequences, mask, strict=True)):
        count = int(real.sum()) - 1
        assert target.cache.length(sequence) == count
        slots = target.cache.slots(sequence, range(count))
        for number, layer in enumerate(cache.layers):
            part, place = target.cache.parts[0], target.cache.places[number]
            for ours, theirs in ((part.key_slots, layer.keys), (part.value_slots, layer.values)):
                torch.testing.assert_close(ours[place.layer][slots].transpose(0, 1), theirs[row][:, real][:, :-1])
        states = torch.cat([own.hidden_states[layer][row][real][:-1] for layer in (0, 2)], -1)
        torch.testing.assert_close(seen[row], states, atol=1e-4, rtol=1e-4)
    moved = [0, 0, 0] if kind == "gemma3" else model.model.rope_deltas.flatten().tolist()
    assert [target.cache.shifts[sequence] for sequence in sequences] == moved
    assert kind == "gemma3" or moved[0] < 0 == moved[1]


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("drafter", ["none", "Medusa heads"])
def test_positions_off_by_the_shift_are_noticed(drafter, mode, monkeypatch):
    """A planted bug: tokens after the prompt at the places that they have in the cache."""
    monkeypatch.setattr(prompt, "shifts_of", lambda positions, mask: [0] * len(mask))
    out, expected = generate("qwen2_5_vl", mode, drafter)
    assert out.sequences[1].equal(expected[1]) and not out.sequences.equal(expected)


@pytest.fixture
def heard(monkeypatch):
    """Of each proposal, also in each replay of a captured one: texts, lengths, which rows are alive, first logits."""
    given, catch_up, propose = [], FeatureState.catch_up, medusa.drafter.propose

    def keep(batch, logits):
        rows = batch.rows
        index = torch.arange(rows.size) if batch.index is None else batch.index
        at_each_run(lambda: given.append([x.clone() for x in (rows.tokens[index], rows.lengths[index],
                                                              rows.alive[index], logits)]))  # fmt: skip

    def of_states(state, batch):
        logits, ids = catch_up(state, batch), state.runner.source.ids
        keep(batch, over_target(logits, ids, VOCAB) if ids is not None and logits.shape[1] == len(ids) else logits)
        return logits

    def of_heads(heads, own, batch, tree=None):
        if batch.features is not None:
            keep(batch, heads(batch.features, batch.rows.target.output_layer, 2).transpose(0, 1))
        return propose(heads, own, batch, tree)

    monkeypatch.setattr(FeatureState, "catch_up", of_states)
    monkeypatch.setattr(medusa.drafter, "propose", of_heads)
    return given


@torch.no_grad()
def fresh_logits(model, drafter, text, given):
    """What each kind drafts first after every token of `text [1, L]` but the last, from the model's own states."""
    others = {name: x for name, x in given.items() if name not in ("input_ids", "attention_mask")}
    for name in {*prompt.TOKEN_KINDS} & others.keys():
        others[name] = torch.nn.functional.pad(others[name], (0, NEW))
    if drafter == "EAGLE-3":
        network = fitted(model)
        return network.target_logits(outputs_of(network, model, text, **others)[0])
    states = model(input_ids=text, output_hidden_states=True, **others).hidden_states[-1][:, :-1]
    if drafter == "MTP":
        module = mtp_module(model)
        return module.network.get_output_embeddings()(outputs_of_modules([module], text, states)[0])[0]
    return random_heads(model)(states[0], model.get_output_embeddings(), 2).transpose(0, 1)


@pytest.mark.parametrize(("kind", "mode", "drafter"), [
    ("qwen2_5_vl", "graph", "EAGLE-3"), ("gemma3", "eager", "EAGLE-3"), ("qwen2_5_vl", "graph", "Medusa heads"),
    ("qwen2_5_vl", "eager", "MTP"),
])  # fmt: skip
def test_every_round_drafts_as_a_fresh_drafter(kind, mode, drafter, heard):
    """Its first logits are those over the target's own states of the whole text, images included."""
    out, expected = generate(kind, mode, drafter, SINGLE)
    assert out.sequences.equal(expected)
    text, compared = out.sequences, 0
    anew = fresh_logits(model_of(kind), drafter, text, own_text(kind, SINGLE)[0])
    for tokens, lengths, alive, logits in heard:
        if alive[0]:
            length = int(lengths[0])
            assert tokens[0, :length].equal(text[0, :length])
            torch.testing.assert_close(logits[0], anew[length - 2], atol=1e-3, rtol=1e-4)
            compared += 1
    assert compared == sum(proposed > 0 for proposed in out.stats.rows[0].proposed) > 2


@pytest.mark.parametrize("tree", [None, TREE], ids=["chain", "tree"])
@pytest.mark.parametrize(("kind", "mode"), [("qwen2_5_vl", "graph"), ("qwen2_5_vl", "eager"), ("gemma3", "graph")])
def test_a_draft_model_that_can_see_sees_the_images(kind, mode, tree):
    """The target's own copy is right about every token, in every round: it never runs an image as text."""
    given, expected = own_text(kind, CLOSE)
    drafter = specdec.ModelDrafter(build(kind), 3, tree=tree)
    generator = specdec.SpeculativeGenerator(specdec.ModelRunner(model_of(kind), mode=mode, page_size=PAGE), drafter)
    for _ in range(2):
        out = generator.generate(**given, max_new_tokens=NEW)
        assert out.sequences.equal(expected) and not drafter.runner.cache.shifts
        assert all(row.accepted == row.depths for row in out.stats.rows)
    require_free(generator)
    blind = specdec.SpeculativeGenerator(model_of(kind), specdec.ModelDrafter(build(kind), 3, window=80), mode="eager")
    seen = blind.generate(**given, max_new_tokens=NEW)  # with a window a draft model reads token ids alone
    assert seen.sequences.equal(expected) and seen.stats.pooled.acceptance_rate < 1


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "llava"])
def test_captured_rounds_never_run_an_image_as_text(kind, monkeypatch):
    """The keys of the prompt in a draft model's pages, whose drafts are often rejected, stay as its own forward made
    them, although a captured round runs the last tokens of a text again."""
    given, expected = own_text(kind, CLOSE)
    draft = build(kind)
    with torch.no_grad():
        draft.get_output_embeddings().weight += 0.1 * torch.randn(VOCAB, 32, generator=torch.Generator().manual_seed(1))
    drafter = specdec.ModelDrafter(draft, 3)
    lengths, kept = (given["attention_mask"].sum(1) - 1).tolist(), {}

    def keys(state, row):
        cache = state.runner.cache
        return cache.key_slots[0][cache.slots(state.prefix_sequence(row), range(lengths[row.number]))].clone()

    def see(state, rows, prompts, original=ModelState.see_images):
        original(state, rows, prompts)
        kept.update({row.number: keys(state, row) for row in rows.members})
        released = state.release

        def release(ending):
            for row in ending:
                torch.testing.assert_close(keys(state, row), kept.pop(row.number), atol=0, rtol=0)
            released(ending)

        state.release = release

    monkeypatch.setattr(ModelState, "see_images", see)
    runner = specdec.ModelRunner(model_of(kind), mode="graph", page_size=PAGE)
    out = specdec.SpeculativeGenerator(runner, drafter).generate(**given, max_new_tokens=NEW)
    assert out.sequences.equal(expected) and out.stats.host is None and not kept
    assert 0 < out.stats.pooled.acceptance_rate < 1


@pytest.mark.parametrize("drafter", ["none", "chain"])
def test_sampled_texts_have_the_targets_law(drafter):
    """The logits of which every token was drawn are the model's own of that text, and a seed repeats it."""
    sampled = dict(do_sample=True, temperature=0.8, seed=3, output_logits=True, num_return_sequences=2)
    out, _ = generate("qwen2_5_vl", "eager", drafter, SINGLE, **sampled)
    again, _ = generate("qwen2_5_vl", "eager", drafter, SINGLE, **sampled)
    assert out.sequences.equal(again.sequences) and not out.sequences[0].equal(out.sequences[1])
    model, (given, _) = model_of("qwen2_5_vl"), own_text("qwen2_5_vl", SINGLE)
    width = given["input_ids"].shape[1]
    for row, text in enumerate(out.sequences):
        whole = {"input_ids": text[None], "mm_token_type_ids": (text[None] == IMAGE).long()}
        whole |= {name: given[name] for name in ("pixel_values", "image_grid_thw")}
        whole["mm_token_type_ids"][:, width:] = 0
        with torch.no_grad():
            own = model(**whole, use_cache=False).logits[0, width - 1 : -1]
        count = int(out.lengths[row])
        ours = torch.stack([logits[row] for logits in out.logits])
        torch.testing.assert_close(ours[:count], own[:count], atol=2e-3, rtol=1e-4)


@pytest.mark.seam
@pytest.mark.parametrize("kind", ["llava", "qwen3_vl"])
def test_the_users_model_stays_as_it_is(kind):
    """Its own generate works after ours, also where transformers adds hooks to a vision tower of its own accord."""
    model, given = build(kind), prompts(kind)
    state = lambda: [(len(module._forward_hooks), sorted(vars(module))) for module in model.modules()]
    before = state()
    generator = specdec.AutoregressiveGenerator(model)
    first = generator.generate(**given, max_new_tokens=NEW)
    assert state() == before and first.sequences.equal(own_text(kind)[1])
    assert model.generate(**given, do_sample=False, max_new_tokens=NEW).equal(first.sequences)
    again = generator.generate(**given, max_new_tokens=NEW)
    assert again.sequences.equal(first.sequences) and again.stats.host == first.stats.host


@pytest.mark.seam
@pytest.mark.parametrize("kind", ["mistral3", "qwen2_5_vl"])
def test_through_transformers_own_generate(kind):
    given, expected = own_text(kind)
    run = specdec.custom_generate(DRAFTERS["EAGLE-3"](model_of(kind)))
    out = model_of(kind).generate(**given, do_sample=False, max_new_tokens=NEW, custom_generate=run)
    assert out.equal(expected) and sum(run.stats.pooled.proposed) > 0


def test_what_cannot_be_seen_is_named():
    text = specdec.AutoregressiveGenerator(draft_model(), mode="eager")
    with pytest.raises(ValueError, match="pixel_values cannot be used: LlamaForCausalLM takes none, it reads text"):
        text.generate(torch.tensor([[5, 6]]), pixel_values=torch.zeros(1, 3, 4, 4), max_new_tokens=2)
    generator = specdec.SpeculativeGenerator(model_of("llava"), None, mode="eager")
    with pytest.raises(ValueError, match="image_grid_thw cannot be used: LlavaFor.* an image is its pixel_values"):
        generator.generate(**prompts("llava"), image_grid_thw=torch.ones(1, 3), max_new_tokens=2)
    with pytest.raises(ValueError, match=f"prompt 0 ends with a token of an image \\({IMAGE}\\): text must follow"):
        generator.generate(**prompts("llava", ((3, 1),)), max_new_tokens=2)
    given = prompts("llava") | {"input_ids": prompts("llava")["input_ids"].masked_fill(torch.tensor(True), 5)}
    with pytest.raises(ValueError, match="do not match"):  # transformers' own words
        generator.generate(**given, max_new_tokens=2)
    require_free(generator)
    assert generator.generate(**prompts("llava"), max_new_tokens=NEW).sequences.equal(own_text("llava")[1])
