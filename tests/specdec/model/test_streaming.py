"""Models with layers in host memory give the same bits, from two buffers, whatever happens in between."""

import copy
import threading
from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
import transformers as tf
from torch import nn

import specdec
from specdec.drafters.early_exit import first_layers
from specdec.model.streaming import streamed_layers
from specdec.planning.adaptive import CostModel
from specdec.planning.round_times import RoundTimes
from tests.families import CONFIGS, build, ragged_prompts

IDS = torch.arange(3, 20)[None]


def deep(layers=5, wide=None):
    """A model of so many layers; that of index `wide` is larger than the others."""
    torch.manual_seed(0)
    config = CONFIGS["llama"]()
    config.num_hidden_layers = layers
    model = tf.LlamaForCausalLM(config).eval()
    if wide is not None:
        mlp = model.model.layers[wide].mlp
        mlp.gate_proj, mlp.up_proj, mlp.down_proj = nn.Linear(32, 160), nn.Linear(32, 160), nn.Linear(160, 32)
    return model


@torch.inference_mode()
def logits(model, ids=IDS):
    return model(ids).logits


def layers_of(model):
    return model.model.layers


def watch(model, see):
    """Call `see(index)` while a layer computes."""
    for index, layer in enumerate(layers_of(model)):
        layer.mlp.register_forward_pre_hook(lambda *_, index=index: see(index) and None)


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_gives_the_same_bits_wherever_its_layers_lie(family):
    model, plain = build(family), logits(build(family))
    for count in (1, 2, 3, 0):
        specdec.stream_layers(model, count)
        assert torch.equal(logits(model), plain) and (streamed_layers(model) is None) == (count == 0)


def test_streamed_layers_are_spread_evenly_and_the_rest_stays():
    for count, expected in ((1, (5,)), (2, (2, 5)), (3, (1, 3, 5)), (4, (0, 2, 3, 5)), (6, (0, 1, 2, 3, 4, 5))):
        model = deep(6)
        places = [p.data_ptr() for p in layers_of(model)[0].parameters()]
        streamed = specdec.stream_layers(model, count)
        assert streamed.indices == expected
        assert ([p.data_ptr() for p in layers_of(model)[0].parameters()] == places) == (0 not in expected)


def test_weights_lie_in_one_of_two_buffers_and_the_next_layer_is_there_already():
    model = deep(wide=2)
    plain, seen, ahead = logits(model), {}, []
    host = [[p.data_ptr() for p in layer.parameters()] for layer in layers_of(model)]
    streamed = specdec.stream_layers(model, 4)
    assert streamed.indices == (0, 1, 2, 4)  # 3 stays
    assert [p.data_ptr() for p in layers_of(model)[3].parameters()] == host[3]
    host = [[p.data_ptr() for p in layer.parameters()] for layer in layers_of(model)]

    def see(index):
        seen.setdefault(index, set()).add(min(p.data_ptr() for p in layers_of(model)[index].parameters()))
        ahead.append({streamed.indices[buffer.holds] for buffer in streamed._buffers})

    watch(model, see)
    for _ in range(2):
        assert torch.equal(logits(model), plain)
    assert len(streamed.addresses) == 2
    assert set.union(*(seen[i] for i in streamed.indices)) == set(streamed.addresses)
    assert not seen[3] & set(streamed.addresses) and ahead == [{0, 1}, {1, 2}, {2, 4}, {2, 4}, {4, 0}] * 2
    assert [[p.data_ptr() for p in layer.parameters()] for layer in layers_of(model)] == host
    sizes = [sum(p.numel() * 4 for p in layers_of(model)[i].parameters()) for i in streamed.indices]
    assert sum(sizes) <= streamed.nbytes < sum(sizes) + 4 * 256 * 12
    assert all(max(sizes) <= len(buffer.memory) < max(sizes) + 256 * 12 for buffer in streamed._buffers)


def test_each_layer_is_copied_once_a_forward_and_not_while_it_lies_in_a_buffer(monkeypatch):
    model = deep()
    streamed, copied = specdec.stream_layers(model, 5), []
    own = type(streamed)._copy
    monkeypatch.setattr(type(streamed), "_copy", lambda *given: copied.append(1) or own(*given))
    counts = []
    for run in (model, model, model, first := first_layers(model, 1), first, first, model):
        copied.clear()
        logits(run)
        counts.append(len(copied))
    assert counts == [6, 5, 5, 1, 0, 0, 4]  # at the end of each the first layer is brought for the next one


def test_other_orders_and_first_layers_are_right():
    model, other = deep(wide=3), deep(wide=3)
    short, plain = first_layers(other, 3), logits(other)
    specdec.stream_layers(model, 4)
    cut = first_layers(model, 3)
    for run, expected in ((cut, logits(short)), (model, plain), (cut, logits(short)), (cut, logits(short))):
        assert torch.equal(logits(run), expected)
    for each in (model, other):
        each.model.layers = nn.ModuleList([each.model.layers[i] for i in (4, 1, 1, 3, 0)])
    assert torch.equal(logits(model), logits(other)) and not torch.equal(logits(model), plain)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_inside_a_layer_leaves_a_usable_model(error):
    model = deep()
    plain, streamed = logits(model), specdec.stream_layers(model, 4)
    places = [p.data_ptr() for p in model.parameters()]
    for index in streamed.indices:

        def fail(*_):
            raise error("planted")

        handle = layers_of(model)[index].mlp.register_forward_pre_hook(fail)
        with pytest.raises(error, match="planted"):
            logits(model)
        handle.remove()
        assert [p.data_ptr() for p in model.parameters()] == places
        assert torch.equal(logits(model), plain)


def test_what_a_user_does_to_weights_is_seen_or_refused():
    model, other = deep(), deep()
    specdec.stream_layers(model, 5)
    logits(model)
    for each in (model, other):
        with torch.no_grad():
            layers_of(each)[0].mlp.up_proj.weight.mul_(-1)  # lies in a buffer already
        layers_of(each)[3].mlp.up_proj.weight = nn.Parameter(layers_of(each)[2].mlp.up_proj.weight.detach().clone())
    assert torch.equal(logits(model), logits(other))
    state = {name: -value for name, value in other.state_dict().items()}
    for each in (model, other):
        each.load_state_dict(state)
    assert torch.equal(logits(model), logits(other))
    with pytest.raises(RuntimeError, match=r"weights of layer 0 are streamed, so there is no backward pass"):
        model(IDS)
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(model)
    model.double()
    with pytest.raises(RuntimeError, match="layer 0 were moved or cast .* call stream_layers again"):
        logits(model)
    specdec.stream_layers(model, 3)
    assert torch.equal(logits(model), logits(other.double()))


def test_shared_weights_stay_and_a_layer_twice_in_the_list_is_one():
    model = deep()
    layers = layers_of(model)
    layers[2].mlp.up_proj.weight = layers[1].mlp.up_proj.weight
    layers[4] = layers[0]
    plain, place = logits(model), layers[1].mlp.up_proj.weight.data_ptr()
    streamed = specdec.stream_layers(model, 5)
    seen = []
    watch(model, lambda index: seen.append(layers[1].mlp.up_proj.weight.data_ptr()))
    assert streamed.indices == (0, 1, 2, 3) and torch.equal(logits(model), plain) and set(seen) == {place}


def test_strides_are_kept():
    model = deep()
    weight = layers_of(model)[4].mlp.up_proj.weight
    weight.data = weight.data.t().contiguous().t()
    plain = logits(model)
    specdec.stream_layers(model, 1)
    assert weight.stride() == (1, 64) and torch.equal(logits(model), plain)


def test_what_cannot_be_streamed_is_named():
    model = deep()
    for count in (-1, 6):
        with pytest.raises(ValueError, match=f"between 0 and the model's 5 layers, got {count}"):
            specdec.stream_layers(model, count)
    layers_of(model)[4].forward = layers_of(model)[4].forward
    with pytest.raises(ValueError, match="layer 4 of LlamaForCausalLM .* its forward was replaced"):
        specdec.stream_layers(model, 1)
    del layers_of(model)[4].forward
    layers_of(model)[4].register_buffer("packed", torch.zeros(10**5))
    with pytest.raises(ValueError, match="layer 4 .* most of its numbers are buffers"):
        specdec.stream_layers(model, 1)
    with pytest.raises(ValueError, match="layer 1 .* is a Tensor on meta"):
        specdec.stream_layers(deep().to("meta"), 2, "cpu")
    assert streamed_layers(model) is None
    model = deep()
    specdec.stream_layers(model, 2)
    with pytest.raises(ValueError, match="LlamaForCausalLM has streamed layers, of which no rounded copy is made"):
        specdec.QuantisedSelfDrafter(model)
    model = deep()
    model.model._modules = {"layers": layers_of(model)} | model.model._modules
    with pytest.raises(ValueError, match="LlamaForCausalLM begins with a streamed layer"):
        specdec.stream_layers(model, 5)
    assert streamed_layers(model) is None


def test_two_threads_share_the_buffers():
    model = deep()
    plain, found = [logits(model, IDS), logits(model, IDS + 30)], [[], []]
    specdec.stream_layers(model, 5)
    run = lambda i: [found[i].append(logits(model, IDS + 30 * i)) for _ in range(8)]
    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(len(each) == 8 and all(torch.equal(x, plain[i]) for x in each) for i, each in enumerate(found))


class Event:
    """In place of a CUDA event: counts how often it was recorded."""

    def __init__(self, log, name):
        self.log, self.name, self.count = log, name, 0

    def record(self, stream):
        self.count += 1
        self.log.append((stream.name, "record", self.name, self.count))


class Stream:
    """In place of a CUDA stream: writes down what it waits for."""

    def __init__(self, log, name):
        self.log, self.name = log, name

    def wait_event(self, event):
        self.log.append((self.name, "wait", event.name, event.count))


def test_streams_wait_for_copies_and_for_the_layers_before(monkeypatch):
    """On what stands in for CUDA's streams: a copy waits for the last use of its buffer, a layer for its copy, and the
    copy for the next layer is launched before a layer computes.
    """
    log, model = [], deep()
    streamed, compute = specdec.stream_layers(model, 5), Stream(log, "compute")
    streamed._copies = Stream(log, "copies")
    for number, buffer in enumerate(streamed._buffers):
        buffer.ready, buffer.done = Event(log, f"ready {number}"), Event(log, f"done {number}")
    events = {event.name: event for buffer in streamed._buffers for event in (buffer.ready, buffer.done)}
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: compute)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    uses, copies, ahead = {"0": 0, "1": 0}, {"0": 0, "1": 0}, []

    def see(index):
        waits = [entry for entry in log[-2:] if entry[:2] == ("compute", "wait")]
        (_, _, ready, count), (_, _, done, _) = waits
        number = ready[-1]
        uses[number] += 1
        assert count == events[ready].count >= 1 and done == f"done {number}"
        ahead.append(sum(event.count for name, event in events.items() if name.startswith("ready")))

    watch(model, see)
    for _ in range(3):
        logits(model)
    for before, entry in pairwise(log):
        if entry[:2] == ("copies", "record"):
            number = entry[2][-1]
            assert before[:3] == ("copies", "wait", f"done {number}")
            ended = sum(one[:3] == ("compute", "record", f"done {number}") for one in log[: log.index(entry)])
            copies[number] += 1
            assert before[3] == ended
    assert uses == {"0": 8, "1": 7} and copies == {"0": 8, "1": 8}
    assert ahead == list(range(2, 17))  # copies that were launched when each layer began


DRAFTERS = {
    "chain": lambda target: specdec.ModelDrafter(build("llama", seed=1), 4),
    "tree": lambda target: specdec.ModelDrafter(build("llama", seed=1), tree=specdec.TokenTree.from_widths((3, 2))),
    "early exit": lambda target: specdec.EarlyExitDrafter(target, 2, 3),
    "streamed draft": lambda target: specdec.ModelDrafter(streamed_copy(), 3),
}


def streamed_copy():
    draft = build("llama", seed=2)
    specdec.stream_layers(draft, 3)
    return draft


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_generators_write_the_same_texts(drafter):
    """Those of the same rounds over resident weights, greedy and sampled, and transformers' own greedy one."""
    texts, (ids, mask) = [], ragged_prompts(3)
    for count in (0, 3):
        model = build("llama")
        model.generation_config.eos_token_id = None
        specdec.stream_layers(model, count)
        generator = specdec.SpeculativeGenerator(model, DRAFTERS[drafter](model), mode="eager")
        greedy = generator.generate(ids, mask, max_new_tokens=16)
        sampled = generator.generate(ids, mask, max_new_tokens=16, do_sample=True, seed=3)
        own = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=16, pad_token_id=1)
        assert torch.equal(greedy.sequences, own)
        texts.append((greedy.sequences, sampled.sequences))
    assert all(torch.equal(*pair) for pair in zip(*texts, strict=True))


def test_an_engine_runs_streamed_models():
    ids, mask = ragged_prompts(3)
    model = build("llama")
    model.generation_config.eos_token_id = None
    prompts = [row[kept.bool()] for row, kept in zip(ids, mask, strict=True)]
    own = [model.generate(p[None], do_sample=False, max_new_tokens=12, pad_token_id=1)[0, len(p) :] for p in prompts]
    specdec.stream_layers(model, 2)
    engine = specdec.Engine(model, specdec.PromptLookupDrafter())
    handles = [engine.submit(prompt.tolist(), max_new_tokens=12) for prompt in prompts]
    list(engine.run())
    assert [list(handle.tokens) for handle in handles] == [text.tolist() for text in own]


@pytest.mark.parametrize("streamed", [True, False])
def test_automatic_drafts_of_an_engine_on_a_streamed_target_are_long(streamed, monkeypatch):
    """A pass costs one step here, a drafted level a hundredth of it, and the draft is exact."""
    own = RoundTimes.learn
    seconds = lambda shape: 1.0 if shape.tree is None else 1 + 0.01 * shape.tree.max_depth
    monkeypatch.setattr(RoundTimes, "learn", lambda times, shape, _: own(times, shape, seconds(shape)))
    (ids, mask), model = ragged_prompts(2), build("llama")
    model.generation_config.eos_token_id = None
    prompts = [row[kept.bool()] for row, kept in zip(ids, mask, strict=True)]
    texts = [model.generate(p[None], do_sample=False, max_new_tokens=100, pad_token_id=1)[0, len(p) :] for p in prompts]
    specdec.stream_layers(model, 3 if streamed else 0)
    engine = specdec.Engine(specdec.ModelRunner(model, mode="eager"), specdec.ModelDrafter(build("llama")))
    for _ in range(2):
        handles = [engine.submit(prompt.tolist(), max_new_tokens=100) for prompt in prompts]
        list(engine.run())
        assert [list(handle.tokens) for handle in handles] == [text.tolist() for text in texts]
    accepted = max(handles[0].record.accepted)
    assert accepted > 12 if streamed else accepted <= 12


def test_a_runner_is_eager_and_says_why_and_is_itself_again_after():
    (ids, mask), model = ragged_prompts(2), build("llama")
    generator = specdec.SpeculativeGenerator(model, specdec.PromptLookupDrafter())
    fused, mode = generator.generate(ids, mask, max_new_tokens=8).sequences, generator.target.mode
    explicit = specdec.SpeculativeGenerator(model, specdec.PromptLookupDrafter(), mode="graph")
    specdec.stream_layers(model, 2)
    assert torch.equal(generator.generate(ids, mask, max_new_tokens=8).sequences, fused)
    assert generator.target.mode == "eager" != mode
    assert "runs eagerly: layers 0, 2 (0.1 MiB) are streamed from host memory" in generator.explain()
    for refused in (
        lambda: explicit.generate(ids, mask, max_new_tokens=2),
        lambda: specdec.ModelRunner(model, mode="graph"),
        lambda: setattr(generator.target, "mode", "graph"),
    ):
        with pytest.raises(ValueError, match="a model with streamed layers runs in mode=\"eager\" only, got 'graph'"):
            refused()
    generator = specdec.SpeculativeGenerator(model, specdec.PromptLookupDrafter())
    specdec.stream_layers(model, 0)
    assert torch.equal(generator.generate(ids, mask, max_new_tokens=8).sequences, fused)
    assert generator.target.mode == mode and "streamed" not in generator.explain()


@pytest.mark.parametrize("streamed", [True, False])
def test_automatic_drafts_of_streamed_targets_are_long(streamed, monkeypatch):
    """A pass costs one step here, a drafted level a hundredth of it, and the draft is exact."""
    own = CostModel.learn
    seconds = lambda shape: 1.0 if shape.tree is None else 1 + 0.01 * shape.tree.max_depth
    monkeypatch.setattr(CostModel, "learn", lambda machine, shape, _: own(machine, shape, seconds(shape)))
    (ids, mask), model = ragged_prompts(1), build("llama")
    model.generation_config.eos_token_id = None
    expected = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=120, pad_token_id=1)
    specdec.stream_layers(model, 3 if streamed else 0)
    drafter = specdec.ModelDrafter(build("llama"))
    generator = specdec.SpeculativeGenerator(model, drafter, tree="auto", mode="eager")
    outputs = [generator.generate(ids, mask, max_new_tokens=120) for _ in range(2)]
    assert all(torch.equal(output.sequences, expected) for output in outputs)
    accepted = max(outputs[1].stats.rows[0].accepted)
    assert accepted > 12 if streamed else accepted <= 12
