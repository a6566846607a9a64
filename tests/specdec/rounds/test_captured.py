"""Captured rounds give what eager ones give: the same tokens and the same statistics, for every drafter that can.

On a CPU no graph is captured: what a GPU captures is called as a function; test_generators_gpu.py captures it."""

import gc
import time
import weakref
from dataclasses import replace
from functools import cache

import pytest
import torch
from transformers import StoppingCriteriaList
from transformers.generation import StoppingCriteria, TopPLogitsWarper

import specdec
from attention.native.library import why_unavailable
from attention.paged.device_batch import DeviceSequences
from specdec import cuda_graph
from specdec.cuda_graph import CannotCapture, CapturedGraph, GraphCache, up_to_power
from specdec.model.features import Features
from specdec.model.fusion import weight_layout
from specdec.model.fusion.projections import fuse_projections
from specdec.model.graph_runner import GraphRunner, capture_name
from specdec.planning.adaptive import AdaptivePolicy, CostModel
from specdec.planning.policy import PLAIN, shape_of
from specdec.rounds import captured as device_rounds
from specdec.rounds import launched
from specdec.rounds.captured import CapturedRounds
from specdec.trees.tensors import TreeMask
from specdec.trees.tree import TokenTree
from tests.families import CONFIGS, build, noisy_copy, ragged_prompts
from tests.matrix import DRAFTERS, RULES, TREE, at_each_run, require_free, runners_of, traits_of


def draft_for(runner):
    return noisy_copy("llama").to(runner.device)


NAMES = ("none", *DRAFTERS)
CAPTURED = ("none", *(name for name in DRAFTERS if traits_of(name).captured))

MODES = pytest.mark.parametrize(
    "mode",
    ["graph", pytest.param("compile", marks=pytest.mark.skipif(bool(why_unavailable()), reason="no C compiler"))],
)


def generators(make, family="llama", mode="graph", device="cpu", **options):
    """The same generator twice: with eager rounds, and with captured ones.

    make: one of `NAMES`, or a function of the target's runner that makes a drafter."""
    if make == "none":
        drafter_of = lambda runner: None
    elif isinstance(make, str):
        drafter_of = lambda runner: DRAFTERS[make](runner, draft_for(runner))
    else:
        drafter_of = make
    pair = []
    for one in ("eager", mode):
        runner = specdec.ModelRunner(build(family).to(device), mode="eager")
        runner.mode = one  # what the constructor refuses on a CPU, where nothing can be captured
        pair.append(specdec.SpeculativeGenerator(runner, drafter_of(runner), **options))
    return pair


def why_eager(name):
    """Why the rounds of a drafter cannot be captured (None: they can)."""
    return None if name in CAPTURED else "needs the host in every round"


def same(host, device, why=None):
    assert host.stats.host == 'the target runs with mode="eager"'
    assert device.stats.host is None if why is None else why in device.stats.host
    assert device.sequences.equal(host.sequences)
    for mine, theirs in zip(device.stats.rows, host.stats.rows, strict=True):
        for name in ("proposed", "accepted", "emitted", "depths", "ranks", "shapes"):
            assert getattr(mine, name) == getattr(theirs, name), name
        assert len(mine.seconds) == len(theirs.seconds)


@pytest.fixture
def warmed_up(monkeypatch):
    """What a GPU records runs two times before, over whatever its tensors hold then."""
    record = CapturedGraph.__init__

    def twice(self, function, device, *arguments, **options):
        record(self, function, device, *arguments, **options)
        for _ in range(2):
            function()

    monkeypatch.setattr(CapturedGraph, "__init__", twice)


@pytest.mark.parametrize("drafter", ["none", "tree", "Medusa heads", "early exit"])
def test_prompts_that_come_again_are_replayed(drafter, monkeypatch, warmed_up):
    """Ragged ones, and long ones in chunks, of which the second is recorded while the first lies in the cache."""
    monkeypatch.setattr(GraphRunner, "captures_ragged", True)
    monkeypatch.setattr(specdec.ModelRunner, "PREFILL_CHUNK", 8)
    host, device = generators(drafter)
    ids, mask = ragged_prompts(4)
    for text in ((ids, mask), (ids[:, 1:], mask[:, 1:]), (ids[:1], mask[:1]), (ids[:1, 2:], mask[:1, 2:])) * 2:
        same(*(g.generate(*text, max_new_tokens=8) for g in (host, device)))
    assert device.target.graphs_captured > 2


def test_a_text_is_not_touched_when_another_one_is_recorded(monkeypatch, warmed_up):
    monkeypatch.setattr(GraphRunner, "captures_ragged", True)
    runner, plain = generators("none")[1].target, generators("none")[0].target
    tokens, last, found = torch.arange(5, 25), torch.tensor([0]), []
    for one in (runner, plain):
        one.reserve([30] * 4)
        first, *others = [one.cache.add() for _ in range(4)]
        one.forward([first], tokens, [20], keep=last + 19)
        for other in others:  # each on its way to be recorded, or replayed
            one.forward([other], tokens[:9], [9], keep=last + 8)
        found.append(one.forward([first], tokens[:1], [1]).logits)
    assert runner.graphs_captured and torch.allclose(*found, atol=1e-5)


def test_a_model_that_changes_is_recorded_anew():
    """A hook that was added, an adapter that was switched, a buffer that was replaced: replays would know nothing of
    it.
    """
    ids, _ = ragged_prompts(1)
    generator = generators("none")[1]
    layer, rotary = generator.target.model.model.layers[1], generator.target.model.model.rotary_emb
    recordings, texts = generator._captured._rounds, [generator.generate(ids, max_new_tokens=12).sequences]
    changes = [
        lambda: layer.register_forward_hook(lambda module, inputs, out: out * 0.5),
        lambda: vars(layer).update(_active_adapter=["b"]),
        lambda: rotary.register_buffer("inv_freq", rotary.inv_freq * 0.3, persistent=False),
    ]
    for number, change in enumerate(changes, 2):
        change()
        texts.append(generator.generate(ids, max_new_tokens=12).sequences)
        assert recordings.count == number
        generator.generate(ids, max_new_tokens=12)
        assert recordings.count == number
    assert not texts[1].equal(texts[0]) and texts[2].equal(texts[1]) and not texts[3].equal(texts[2])


@pytest.mark.covering(cases=10)
@MODES
@pytest.mark.parametrize("drafter", NAMES)
def test_captured_rounds_do_what_eager_ones_do(drafter, mode, warmed_up):
    """Tokens and statistics, with every drafter in both modes, greedy in one of them and sampled in the other.

    Rows end one after the other, so that the rest moves into fewer rows; a second call takes the first one's graphs."""
    do_sample = (NAMES.index(drafter) + (mode == "compile")) % 2 == 1
    host, device = generators(drafter, mode=mode)
    ids, mask = ragged_prompts(5)
    for seed, batch in ((0, slice(None)), (1, slice(1, 4))):
        options = dict(max_new_tokens=14, seed=seed) | (dict(do_sample=True, top_k=20) if do_sample else {})
        ours = [g.generate(ids[batch], mask[batch], **options) for g in (host, device)]
        same(*ours, why_eager(drafter))
    for generator in (host, device):
        require_free(generator)


@MODES
@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_runs_on_the_device(family, mode):
    same(eager_output(family), family_generators(family, mode)[1].generate(*ragged_prompts(3), max_new_tokens=24))


def family_generators(family, mode="graph"):
    return generators(lambda runner: specdec.ModelDrafter(noisy_copy(family), tree=TREE), family, mode)


@cache
def eager_output(family):
    return family_generators(family)[0].generate(*ragged_prompts(3), max_new_tokens=24)


FITS = {  # one of DRAFTERS for each kind of draft
    "chain": "drawn chain",
    "tree": "tree drawn without replacement",
    "most likely tree": "chosen tree",
    "dynamic tree": "chosen trees of each row",
}


@pytest.mark.covering
@MODES
@pytest.mark.parametrize("rule", RULES)
def test_captured_rounds_do_what_eager_ones_do_with_every_rule(rule, mode):
    """Every rule with every kind of draft, in one mode or the other, and in both with one or two of them."""
    case, (ids, mask) = RULES[rule], ragged_prompts(3)
    fitting = [drafter for drafter, kind in FITS.items() if case.samples is False or kind in case.takes]
    for number, drafter in enumerate(fitting):
        if len(fitting) == 1 or (number + list(RULES).index(rule)) % 2 == (mode == "compile"):
            host, device = generators(drafter, mode=mode, rule=case.rule)
            options = dict(max_new_tokens=8, do_sample=case.samples is not False, seed=4)
            same(*(g.generate(ids, mask, **options) for g in (host, device)))


def test_rows_end_at_end_of_text_tokens_on_the_device():
    host, device = generators("chain")
    ids, mask = ragged_prompts(4)
    said = host.generate(ids, mask, max_new_tokens=20).sequences[:, ids.shape[1] :]
    for generator in (host, device):
        generator.target.model.generation_config.eos_token_id = [int(said[0, 9]), int(said[2, 4])]
    ours = [g.generate(ids, mask, max_new_tokens=20) for g in (host, device)]
    same(*ours)
    assert 0 < int(ours[1].lengths.min()) < 20 and len(set(ours[1].lengths.tolist())) > 1


class AfterTokens(StoppingCriteria):
    """Ends a row whose text has a number of tokens that is divisible by 7, and at least 20."""

    def __call__(self, input_ids, scores, **_):
        length = (input_ids != 1).sum(1)  # without the padding, which it sees as in transformers
        return (length >= 20) & (length % 7 == 0)


def test_a_criterion_in_python_ends_rows_that_the_device_has_gone_on_with():
    host, device = generators("tree")
    ids, mask = ragged_prompts(4)
    ours = [
        g.generate(ids, mask, max_new_tokens=30, stopping_criteria=StoppingCriteriaList([AfterTokens()]))
        for g in (host, device)
    ]
    same(*ours, "a stopping criterion runs on the host after every round")
    assert len(set(ours[0].lengths.tolist())) > 1


def test_streamers_hear_every_round():
    class Listener:
        def __init__(self):
            self.heard = []

        def put(self, value):
            self.heard.append(value.tolist())

        def end(self):
            self.heard.append("end")

    ids, _ = ragged_prompts(1)
    listeners = Listener(), Listener()
    for generator, listener in zip(generators("chain"), listeners, strict=True):
        generator.generate(ids, max_new_tokens=20, streamer=listener)
    assert listeners[0].heard == listeners[1].heard and listeners[1].heard[-1] == "end"


@pytest.mark.parametrize("drafter", ["tree", "dynamic tree", "Medusa heads"])
def test_unused_pages_and_padding_rows_are_never_read(drafter, monkeypatch):
    """Five rows run as eight, as on a GPU; every page is NaN before the call."""
    monkeypatch.setattr(specdec.ModelRunner, "slots_for", lambda self, count: up_to_power(count))
    host, device = generators(drafter)
    ids, mask = ragged_prompts(5)
    options = dict(max_new_tokens=20, do_sample=True, seed=2)
    expected = host.generate(ids, mask, **options)
    device.generate(ids, mask, **options)
    for runner in runners_of(device):
        runner.cache.key_pages.fill_(float("nan"))
        runner.cache.value_pages.fill_(float("nan"))
    same(expected, device.generate(ids, mask, **options))


def test_a_row_of_captured_rounds_depends_on_no_other_row():
    ids, mask = ragged_prompts(5)
    _, device = generators("tree")
    options = dict(max_new_tokens=14, do_sample=True, top_k=20, seed=3)
    together = device.generate(ids, mask, **options)
    for rows in (slice(0, 1), slice(0, 2)):
        some = device.generate(ids[rows], mask[rows], **options)
        length = int(some.lengths[0])
        assert length == int(together.lengths[0]) > 3
        width = ids.shape[1] + length
        assert some.sequences[0, :width].equal(together.sequences[0, :width])


def test_the_time_of_a_plain_step_is_taken_on_the_device_and_leaves_no_trace():
    _, device = generators("chain")
    ids, mask = ragged_prompts(2)
    stats = device.generate(ids, mask, max_new_tokens=16).stats
    assert stats.pooled.step_seconds > 0 and stats.pooled.overhead > 0


def test_what_needs_the_host_says_so():
    runner = specdec.ModelRunner(build("llama"))
    runner.mode = "graph"
    ids, mask = ragged_prompts(2)
    said = lambda drafter, **options: (
        specdec.SpeculativeGenerator(runner, drafter).generate(ids, mask, max_new_tokens=8, **options).stats.host
    )
    chain = specdec.ModelDrafter(noisy_copy("llama"), 3)
    assert said(chain) is None
    lookup = specdec.PromptLookupDrafter(length=2)
    assert said(specdec.MergedDrafter(specdec.PromptLookupDrafter(), lookup)) is None
    lookup.traits = replace(lookup.traits, captured=False)
    assert "PromptLookupDrafter needs the host" in said(lookup)
    assert "MergedDrafter needs the host" in said(specdec.MergedDrafter(specdec.PromptLookupDrafter(), lookup))
    config = type(runner.model.generation_config)(repetition_penalty=1.3, max_new_tokens=8)
    assert said(chain, generation_config=config) is None
    assert "that needs the host: unchanged" in said(chain, generation_config=config, logits_processor=[unchanged])
    assert "TopHLogitsWarper" in said(
        chain, generation_config=type(config)(do_sample=True, top_h=0.5, max_new_tokens=8)
    )
    auto = specdec.SpeculativeGenerator(runner, chain, tree="auto")
    assert auto.generate(ids, mask, max_new_tokens=8).stats.host is None, "a CPU has few shapes"
    auto._policy = lambda request, rule: AdaptivePolicy(CostModel(), "tree", 5)
    assert "shape of each round" in auto.generate(ids, mask, max_new_tokens=8).stats.host


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    "tree", [None, TokenTree.chain(3), TREE, "on the device"], ids=["none", "chain", "tree", "on the device"]
)
def test_forwards_that_may_be_recorded_equal_others(rows, tree, monkeypatch):
    """Logits and features, with nodes of the tree in the cache already, and again over a sequence that has
    grown.
    """
    taken = []
    run = GraphRunner._run_uniform
    monkeypatch.setattr(GraphRunner, "_run_uniform", lambda *arguments: taken.append(1) or run(*arguments))
    outputs = []
    for mode in ("eager", "graph"):
        runner = specdec.ModelRunner(build("llama"))
        runner.mode = mode
        runner.reserve([40] * rows)
        sequences, found = [runner.cache.add() for _ in range(rows)], []
        runner.extend(sequences, [torch.arange(5 + row, 12 + 2 * row) for row in range(rows)])
        torch.manual_seed(0)
        for count in (4, 1, 3):
            nodes = torch.randint(5, 60, (rows * count,))
            given = tree
            if tree == "on the device":
                tables = TreeMask.of(TREE).on_device(runner.device)
                given = TreeMask(tensors=tuple(x.expand(rows, *x.shape[1:]) for x in tables))
            found.append(runner.forward(sequences, nodes, [count] * rows, given, features=Features((0, 2, 3))))
        outputs.append(found)
    assert len(taken) >= 3
    for mine, theirs in zip(*outputs, strict=True):
        torch.testing.assert_close(mine.logits, theirs.logits)
        torch.testing.assert_close(mine.features, theirs.features)


def unchanged(input_ids, scores):
    """A processor that must run on the host, since nobody knows it."""
    return scores


@pytest.mark.parametrize("options", [{}, dict(repetition_penalty=1.3), dict(no_repeat_ngram_size=2)], ids=str)
def test_rounds_through_the_host_are_the_same_in_either_mode(options):
    host, device = generators("tree")
    ids, mask = ragged_prompts(3)
    config = type(host.target.model.generation_config)(max_new_tokens=20, **options)
    ours = [g.generate(ids, mask, generation_config=config, logits_processor=[unchanged]) for g in (host, device)]
    same(*ours, "that needs the host: unchanged")


@pytest.mark.parametrize("drafter", ["chain", "tree", "dynamic tree", "early exit", "Medusa heads"])
def test_nothing_is_appended_behind_what_a_row_has_pages_for(drafter, monkeypatch):
    """A dynamic tree expands more nodes than it proposes; texts end just below the capacity of a recording."""
    append, seen = DeviceSequences.append, []

    def spy(self, *arguments):
        batch = append(self, *arguments)
        room = self.block_tables.shape[1] * self.cache.page_size
        at_each_run(lambda: seen.append((int(self.lengths.max()), room)))
        return batch

    monkeypatch.setattr(DeviceSequences, "append", spy)
    monkeypatch.setattr(device_rounds, "MIN_CAPACITY", 32)
    make = (
        drafter if drafter != "dynamic tree" else lambda runner: specdec.DynamicTreeDrafter(draft_for(runner), 6, 5, 4)
    )
    _, device = generators(make, family="llama")
    ids = torch.randint(5, 60, (1, 100), generator=torch.Generator().manual_seed(0))
    device.generate(ids, max_new_tokens=128 - 100 - 1 - device.drafter.traits.max_tokens)
    assert max(length for length, _ in seen) > 100 and all(length <= room for length, room in seen)


def test_a_step_is_timed_where_it_runs():
    _, device = generators("chain")
    ids, _ = ragged_prompts(1)
    device.generate(ids, max_new_tokens=8, logits_processor=[unchanged])
    for _ in range(3):
        device.generate(ids, max_new_tokens=8)
    assert {size[0] for size in device._clock.seconds} == {"host", "device"}
    assert device._captured._rounds.count == 2, "one for the rounds, one for the step, and none after the first call"


def test_a_round_that_the_host_must_run_first_counts_as_decoding(monkeypatch):
    """A prompt of one token is too short for a tree's rounds on the device, and this draft model is hardly ever
    right.
    """
    _, device = generators(lambda runner: specdec.ModelDrafter(noisy_copy("llama", 3.0), tree=TREE))
    host_round, took = launched.run_eagerly, []

    def slow(call, timed=True, usual=True):
        took.append(timed)
        if timed:
            time.sleep(0.3)
        host_round(call, timed, usual)

    monkeypatch.setattr(launched, "run_eagerly", slow)
    stats = device.generate(torch.tensor([[7]]), max_new_tokens=20).stats
    assert True in took and stats.host is None and stats.decode_seconds > 0.3


def test_what_cannot_be_recorded_or_has_no_room_is_remembered(monkeypatch):
    """On a GPU, whose recording is stood in for here."""
    for error in (RuntimeError("capture"), torch.OutOfMemoryError("full")):

        def fail(self, device, pool, error=error):
            raise error

        monkeypatch.setattr(CapturedGraph, "_capture", fail)
        with pytest.raises(CannotCapture, match=f"a round cannot be recorded .*{error}"):
            CapturedGraph(lambda: None, torch.device("cuda"), what="a round")
    shelf, made = GraphCache(2), []

    def refuse():
        made.append(1)
        raise CannotCapture("no")

    for _ in range(2):
        with pytest.raises(CannotCapture):
            shelf.get("a", refuse)
    assert made == [1], "what failed once is not tried again"
    for key in ("b", "b", "c", "b", "d"):
        shelf.get(key, lambda key=key: key)
    assert shelf.count == 4 and len(shelf) == 2 and shelf.get("b", lambda: "made anew") == "b"


def test_too_few_pages_to_take_beforehand_send_the_rounds_through_the_host():
    ids, mask = ragged_prompts(2)
    runner = specdec.ModelRunner(build("llama"), page_size=4, num_pages=16)
    runner.mode = "graph"
    out = specdec.AutoregressiveGenerator(runner).generate(ids, attention_mask=mask, max_new_tokens=40 - ids.shape[1])
    assert "needed to append" in out.stats.host
    expected = specdec.AutoregressiveGenerator(build("llama")).generate(
        ids, attention_mask=mask, max_new_tokens=40 - ids.shape[1]
    )
    assert out.sequences.equal(expected.sequences)


def test_recordings_are_made_once_for_what_is_alike():
    """Temperatures and seeds are data of a round, not another round."""
    host, device = generators("chain")
    ids, mask = ragged_prompts(2)
    made = lambda: dict(device._captured._rounds._graphs)
    device.generate(ids, mask, max_new_tokens=8)
    first = made()
    device.generate(ids, mask, max_new_tokens=9)
    assert first and made() == first
    device.generate(ids, mask, max_new_tokens=9, do_sample=True, temperature=0.5)
    sampled = made()
    assert len(sampled) > len(first)
    for temperature, seed in ((0.5, 1), (1.7, 1), (1.7, 2)):
        options = dict(max_new_tokens=9, do_sample=True, temperature=temperature, seed=seed)
        assert device.generate(ids, mask, **options).sequences.equal(host.generate(ids, mask, **options).sequences)
    kinds = lambda keys: {key[-3:] for key in keys}  # how rounds are sampled; the rows may be fewer
    assert kinds(made()) == kinds(sampled)


@pytest.mark.parametrize("drafter", ["chain", "early exit"])
def test_a_cache_that_is_replaced_takes_its_recordings_along(drafter):
    """Whoever made them: no old cache stays in memory."""
    _, device = generators(drafter)
    idle = specdec.AutoregressiveGenerator(device.target)
    ids, mask = ragged_prompts(2)
    for generator in (device, idle):
        generator.generate(ids, attention_mask=mask, max_new_tokens=8)
    runners = {device.target, device.drafter.runner}
    old = [weakref.ref(runner.cache) for runner in runners]
    for runner in (device.target, *runners - {device.target}):
        runner.reserve([10_000])
    if drafter == "early exit":
        device.generate(ids, mask, max_new_tokens=8)  # its model takes up the target's new one
    gc.collect()
    assert [ref() for ref in old] == [None] * len(old)
    expected = (
        specdec.AutoregressiveGenerator(build("llama")).generate(ids, attention_mask=mask, max_new_tokens=8).sequences
    )
    for generator in (device, idle):
        assert generator.generate(ids, attention_mask=mask, max_new_tokens=8).sequences.equal(expected)


@pytest.mark.parametrize("fuse", [True, False])
def test_weights_that_were_moved_are_taken_up(fuse, monkeypatch):
    """By another runner's joining, or by a swap through `.data`: recordings read weights where they lay."""
    monkeypatch.setattr(weight_layout, "columns_are_faster", lambda dtype: False)  # else copies are read
    ids, _ = ragged_prompts(1)
    model, other = build("llama"), noisy_copy("llama", 0.3)
    runner = specdec.ModelRunner(model, fuse=fuse)
    runner.mode = "graph"
    generator = specdec.AutoregressiveGenerator(runner)
    first = generator.generate(ids, max_new_tokens=12).sequences
    recordings = generator._generator._captured._rounds
    fuse_projections(model)
    assert generator.generate(ids, max_new_tokens=12).sequences.equal(first) and recordings.count == (1 if fuse else 2)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        mine.data = theirs.data.clone()
    expected = specdec.AutoregressiveGenerator(other).generate(ids, max_new_tokens=12).sequences
    assert generator.generate(ids, max_new_tokens=12).sequences.equal(expected) and not expected.equal(first)


def test_recordings_do_not_pile_up():
    _, device = generators("none")
    ids, _ = ragged_prompts(1)
    for kept in range(1, CapturedRounds.MAX_ROUNDS + 4):
        processor = TopPLogitsWarper(0.9, min_tokens_to_keep=kept)
        device.generate(ids, max_new_tokens=2, do_sample=True, logits_processor=[processor])
    assert len(device._captured._rounds._graphs) == CapturedRounds.MAX_ROUNDS


def test_an_explicit_mode_that_cannot_run_is_refused():
    for make in (specdec.ModelRunner, specdec.AutoregressiveGenerator):
        with pytest.raises(ValueError, match="mode must be one of .* got 'fast'"):
            make(build("llama"), mode="fast")
    with pytest.raises(ValueError, match="ModelRunner with mode='graph', so mode='compile' is not possible"):
        specdec.AutoregressiveGenerator(specdec.ModelRunner(build("llama"), mode="graph"), mode="compile")


def test_auto_goes_on_eagerly_where_nothing_can_be_recorded(monkeypatch):
    runner = specdec.ModelRunner(build("llama"), mode="auto")
    assert runner.mode in ("graph", "compile") and runner.auto
    runner.mode = "graph"
    assert not runner.auto, "a mode that is asked for by name stays"
    ids, mask = ragged_prompts(2)
    host, device = generators("tree")
    expected = host.generate(ids, mask, max_new_tokens=12)

    def refuse(self, function, device, pool=None, what="it", compiled=False):
        raise CannotCapture(f"{what} cannot be recorded")

    monkeypatch.setattr(CapturedGraph, "__init__", refuse)
    with pytest.raises(CannotCapture, match="LlamaForCausalLM cannot be recorded"):
        device.generate(ids, mask, max_new_tokens=12)
    assert device.target.cache.sequences == ()
    for runner in (device.target, device.drafter.runner):
        runner.execution.auto = True  # what mode="auto" sets on a GPU
    device._captured.drop_graphs()  # what could not be recorded is remembered
    with pytest.warns(UserWarning, match="does without: .* cannot be recorded"):
        out = device.generate(ids, mask, max_new_tokens=12)
    assert out.sequences.equal(expected.sequences) and "cannot be recorded" in out.stats.host


@pytest.mark.parametrize("drafter", CAPTURED)
def test_eager_rounds_go_on_where_captured_ones_stop_in_the_middle_of_a_text(drafter, monkeypatch):
    """When half of the rows have ended, rounds for fewer rows are captured; here that fails."""
    host, device = generators(drafter)
    ids, mask = ragged_prompts(4)
    for generator in (host, device):
        generator.target.model.generation_config.eos_token_id = list(range(3, 11))
    options = dict(max_new_tokens=26, do_sample=True, seed=8)
    expected = host.generate(ids, mask, **options)
    lengths = sorted(expected.lengths.tolist())
    assert lengths[1] + 2 < lengths[3], "half of the rows must end early for this test to mean something"
    make = CapturedRounds._make

    def refuse(self, session, call, shape):
        if call.rows.size < 4:
            raise CannotCapture("too few rows")
        return make(self, session, call, shape)

    monkeypatch.setattr(CapturedRounds, "_make", refuse)
    device.target.execution.auto = True
    with pytest.warns(UserWarning, match="too few rows"):
        out = device.generate(ids, mask, **options)
    assert out.sequences.equal(expected.sequences) and out.stats.host == "too few rows"
    require_free(device)


def test_draft_models_run_as_their_target_does():
    host, device = generators("chain")
    ids, _ = ragged_prompts(1)
    for generator in (host, device):
        generator.generate(ids, max_new_tokens=4)
        assert generator.drafter.runner.mode == generator.target.mode
    assert "nothing is fused" in host.target.explain() and "nothing is fused" not in device.target.explain()
    apart = specdec.ModelRunner(build("llama"), fuse=False)
    apart.mode = "graph"
    assert "nothing is fused (fuse=False)" in apart.explain()


def test_messages_say_how_experts_run():
    models = [build(family) for family in ("llama", "mixtral", "mixtral")]
    models[2].set_experts_implementation("batched_mm")
    dense, asking, silent = (capture_name(model) for model in models)
    assert (
        dense == "LlamaForCausalLM"
        and silent == "MixtralForCausalLM"
        and asking.startswith("MixtralForCausalLM with grouped_mm experts (model.set_")
    )


def test_the_policy_learns_no_time_of_a_round_in_which_an_inner_draft_model_was_captured(monkeypatch):
    """A merged drafter's models are runners of the call like any other."""
    runner = specdec.ModelRunner(build("llama"))
    runner.mode = "graph"
    inner = specdec.DynamicTreeDrafter(draft_for(runner), 8, 3, 3)
    merged = specdec.MergedDrafter(inner, specdec.PromptLookupDrafter(length=3))
    generator = specdec.SpeculativeGenerator(runner, merged, tree="auto")
    machine = CostModel()
    generator._policy = lambda request, rule: AdaptivePolicy(
        machine, "own", merged.traits.max_tokens
    )  # rounds on the host
    captures, told = lambda: inner.runner.graphs_captured, []
    observe = AdaptivePolicy.observe

    def note(self, shape, seconds, ranks, tokens):
        told.append((captures(), seconds))
        observe(self, shape, seconds, ranks, tokens)

    monkeypatch.setattr(AdaptivePolicy, "observe", note)
    ids, mask = ragged_prompts(2)
    generator.generate(ids, mask, max_new_tokens=40)
    rose = [seconds for (before, _), (after, seconds) in zip(told, told[1:], strict=False) if after > before]
    assert rose and rose == [None] * len(rose) and any(seconds is not None for _, seconds in told)


def calls_of(layer):
    """A hook's list of calls."""
    calls = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_hooks_of_a_draft_model_and_of_all_modules_are_called_in_every_round():
    """By mode="auto", whose replays would call none."""
    (ids, mask), draft = ragged_prompts(2), noisy_copy("llama")
    generator = specdec.SpeculativeGenerator(build("llama"), specdec.ModelDrafter(draft, 3))
    expected = generator.generate(ids, mask, max_new_tokens=12)
    assert expected.stats.host is None
    calls = calls_of(draft.model.layers[0])
    for _ in range(2):
        calls.clear()
        out = generator.generate(ids, mask, max_new_tokens=12)
        assert len(calls) >= 3 * out.stats.rows[0].rounds and "hooks" in out.stats.host
        assert out.sequences.equal(expected.sequences)
    plain, seen = specdec.SpeculativeGenerator(build("llama"), None), []
    plain.generate(ids, mask, max_new_tokens=12)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: seen.append(1))
    try:
        plain.generate(ids, mask, max_new_tokens=12)
    finally:
        handle.remove()
    assert len(seen) > 12 * 10


def changes_of_settings():
    """Numbers that a forward reads, but no weight."""
    return {
        "an epsilon": lambda model: [
            setattr(layer.input_layernorm, "variance_epsilon", 30.0) for layer in model.model.layers
        ],
        "frequencies": lambda model: model.model.rotary_emb.inv_freq.mul_(0.5),
        "a class's forward": lambda model: None,
    }


@pytest.mark.parametrize("name", changes_of_settings())
def test_settings_that_change_after_a_call_are_taken_up(name, monkeypatch):
    (ids, mask), model = ragged_prompts(2), build("llama")
    generator = specdec.SpeculativeGenerator(model, None)
    before = generator.generate(ids, mask, max_new_tokens=16).sequences
    changes_of_settings()[name](model)
    if name == "a class's forward":
        mlp = type(model.model.layers[0].mlp)
        forward = mlp.forward
        monkeypatch.setattr(mlp, "forward", lambda self, x: -3 * forward(self, x))
    expected = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=16)
    assert not expected.equal(before), "the change matters"
    assert generator.generate(ids, mask, max_new_tokens=16).sequences.equal(expected)


def test_graphs_on_a_cpu_are_held_up_to_a_number_of_bytes(monkeypatch):
    monkeypatch.setattr(cuda_graph, "MAX_BYTES", 100)
    shelf = GraphCache(8, lambda graph: graph)
    for key, size in (("a", 40), ("b", 50), ("c", 60), ("d", 500)):
        shelf.get(key, lambda size=size: size)
    assert list(shelf._graphs) == ["d"]


class InTurn:
    """A policy that wants each of a few shapes for some rounds, plain ones between them."""

    step_seconds, few_shapes, max_tokens = 1.0, True, 5

    def __init__(self):
        chain = lambda length: shape_of(TokenTree.chain(length))
        self._shapes = [chain(2)] * 2 + [PLAIN] * 12 + [chain(4)] * 2 + [chain(1)] + [PLAIN] + [chain(3)]
        self.timed = []

    def next(self):
        return self._shapes[0]

    def enter(self, place):
        pass

    def observe(self, shape, seconds, ranks, tokens):
        self.timed.append((shape.name, seconds is not None))
        del self._shapes[: len(self._shapes) > 1]

    def finish(self, rounds, tokens):
        pass


@pytest.mark.covering
@MODES
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("drafter", ["chain", "Medusa heads"])
def test_a_policy_may_change_its_mind_after_each_captured_round(drafter, rows, mode, monkeypatch):
    """The draft model's cache is brought up to date after plain rounds: an exact draft is accepted whole."""
    exact = lambda runner: specdec.ModelDrafter(runner.model, num_tokens=5)
    host, device = generators(exact if drafter == "chain" else drafter, mode=mode)
    ids, mask = ragged_prompts(rows)
    policies = []
    monkeypatch.setattr(
        specdec.SpeculativeGenerator, "_policy", lambda self, request, rule: policies.append(InTurn()) or policies[-1]
    )
    ours = [g.generate(ids, mask, max_new_tokens=40) for g in (host, device)]
    assert ours[0].sequences.equal(ours[1].sequences) and ours[1].stats.host is None
    names = [row.rounds for row in ours[1].stats.rows]
    if drafter == "chain":
        assert names == [row.rounds for row in ours[0].stats.rows]
        rounds = policies[1].timed
        assert (rounds[14], rounds[15]) == (("chain 4", False), ("chain 4", True)), (
            "catching up takes longer than usual"
        )
    for generator in (host, device):
        require_free(generator)


@cache
def own_text():
    """Transformers' own."""
    ids, mask = ragged_prompts(3)
    return build("llama").generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=30)


@pytest.mark.parametrize("drafter", ["chain", "tree", "Medusa heads", "dynamic tree", "early exit", "synthetic"])
def test_automatic_shapes_are_captured_on_a_cpu(drafter):
    (ids, mask), runner = ragged_prompts(3), specdec.ModelRunner(build("llama"), mode="graph")
    generator = specdec.SpeculativeGenerator(runner, DRAFTERS[drafter](runner, draft_for(runner)), tree="auto")
    expected = own_text()
    for _ in range(3):
        out = generator.generate(ids, mask, max_new_tokens=30)
        assert out.sequences.equal(expected) and out.stats.host == why_eager_auto(generator)


def why_eager_auto(generator):
    """Why rounds of automatic shapes are not captured (None: they are)."""
    name = type(generator.drafter).__name__
    return None if generator.drafter.traits.captured else f"a {name} needs the host in every round"
