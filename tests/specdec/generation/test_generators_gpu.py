"""The generators on a GPU, where the Triton kernels serve them with no change to user code."""

import gc
import warnings
from dataclasses import replace

import pytest
import torch

import specdec
from specdec.cuda_graph import CapturedGraph, HostCopy
from tests.families import CONFIGS, build, noisy_copy, ragged_prompts
from tests.matrix import DRAFTERS, TREE
from tests.specdec.generation.test_generators import PAIR, speculative
from tests.specdec.rounds.test_captured import CAPTURED, draft_for, generators

pytestmark = pytest.mark.gpu


def spy_on_kernels(monkeypatch) -> list[str]:
    """Names of the Triton launchers that were called."""
    from attention.kv import write_kernel as kv_write_kernel
    from attention.paged import attention_kernel as paged_kernel

    calls = []
    for module, name in ((paged_kernel, "paged_attention_triton"), (kv_write_kernel, "launch_write_kv")):
        launch = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *arguments, launch=launch, name=name: calls.append(name) or launch(*arguments)
        )
    return calls


@pytest.mark.parametrize("family", CONFIGS)
def test_greedy_equals_transformers(family, monkeypatch):
    calls = spy_on_kernels(monkeypatch)
    generator = speculative(family)
    model, draft = generator.target.model.cuda(), generator.drafter.runner.model.cuda()
    generator = specdec.SpeculativeGenerator(model, specdec.ModelDrafter(draft, 4))
    ids, mask = (x.cuda() for x in ragged_prompts(8))
    expected = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=30)
    assert generator.generate(ids, mask, max_new_tokens=30).sequences.equal(expected)
    assert set(calls) == {"paged_attention_triton", "launch_write_kv"}


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_quantised_pages_stay_close_to_the_reference(kv_dtype):
    """The same tokens as the PyTorch reference over the same quantised pages, apart from near-ties."""
    prompts = PAIR.tokenizer(PAIR.prompts[next(iter(PAIR.prompts))], return_tensors="pt", padding=True)
    on_cpu = specdec.AutoregressiveGenerator(PAIR.target, kv_dtype=kv_dtype).generate(
        prompts.input_ids, attention_mask=prompts.attention_mask, max_new_tokens=16
    )
    target = specdec.load_tiny_pair().target.cuda()
    ids, mask = prompts.input_ids.cuda(), prompts.attention_mask.cuda()
    on_gpu = specdec.AutoregressiveGenerator(target, kv_dtype=kv_dtype).generate(
        ids, attention_mask=mask, max_new_tokens=16
    )
    same = (on_gpu.sequences.cpu() == on_cpu.sequences).all(1)
    assert float(same.float().mean()) >= 0.75


def test_bfloat16_pair_speculates(monkeypatch):
    """Accepts about as often as in float32, over all shipped prompts; the kernels run."""
    calls, rates = spy_on_kernels(monkeypatch), {}
    for dtype in (torch.float32, torch.bfloat16):
        pair = specdec.load_tiny_pair(device="cuda", dtype=dtype)
        batch = pair.tokenizer(
            [text for texts in pair.prompts.values() for text in texts], return_tensors="pt", padding=True
        ).to("cuda")
        generator = specdec.SpeculativeGenerator(pair.target, specdec.ModelDrafter(pair.draft, 4))
        rates[dtype] = generator.generate(
            batch.input_ids, batch.attention_mask, max_new_tokens=48
        ).stats.pooled.acceptance_rate
    assert (
        abs(rates[torch.bfloat16] - rates[torch.float32]) < 0.05
        and rates[torch.float32] > 0.6
        and "paged_attention_triton" in calls
    )


# a chain that may end early waits once a token, and a translated draft once a round more
WAITS_MORE = {"confident chain", "translated"}


def waits(generate) -> tuple[int, int]:
    """How often a call waited for the device, and its rounds."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            out = generate()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught), max(
        len(row.emitted) for row in out.stats.rows
    )


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("name", ["none", *(name for name in DRAFTERS if name not in WAITS_MORE)])
def test_a_round_waits_for_the_device_once(name, do_sample):
    pair = specdec.load_tiny_pair()
    target, draft = pair.target.cuda(), pair.draft.cuda()
    batch = pair.tokenizer(["def mean(values):", "import os\n\n"], return_tensors="pt", padding=True).to("cuda")
    drafter = None if name == "none" else DRAFTERS[name](target, draft)
    generator = specdec.SpeculativeGenerator(target, drafter, mode="eager")
    call = lambda tokens: generator.generate(
        batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=tokens, do_sample=do_sample, seed=3
    )
    call(60)  # plain steps are timed in first calls
    (few, short), (many, long) = (waits(lambda tokens=tokens: call(tokens)) for tokens in (20, 60))
    assert long > short and many - few == long - short


@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_greedy_text_is_the_targets_own_with_every_drafter(family, name):
    model, draft = build(family).cuda(), noisy_copy(family).cuda()
    ids, mask = (x.cuda() for x in ragged_prompts(8))
    expected = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=24)
    assert (
        specdec.SpeculativeGenerator(model, DRAFTERS[name](model, draft))
        .generate(ids, mask, max_new_tokens=24)
        .sequences.equal(expected)
    )


@pytest.mark.parametrize("mode", ["graph", "compile"])
@pytest.mark.parametrize("drafter", CAPTURED)
def test_recorded_rounds_give_the_same_tokens(drafter, mode):
    """fp32, greedy; a second call replays the first one's recording, and rows that end leave the others to smaller
    ones.
    """
    if mode == "compile" and drafter not in ("none", "Medusa heads"):
        pytest.skip("every shape is compiled anew, which takes minutes")
    host, device = generators(drafter, mode=mode, device="cuda")
    ids, mask = (x.cuda() for x in ragged_prompts(5))
    for batch in (slice(None), slice(1, 4), slice(0, 1)):
        ours = [g.generate(ids[batch], mask[batch], max_new_tokens=26, seed=0) for g in (host, device)]
        assert ours[1].stats.host is None and ours[1].sequences.equal(ours[0].sequences)
        require_same_rounds(*ours)


def require_same_rounds(*outs):
    """What was drafted is the same too: a greedy text is right whatever the draft was."""
    for rows in zip(*(out.stats.rows for out in outs), strict=True):
        for name in ("proposed", "accepted", "emitted", "ranks"):
            assert len({getattr(row, name) for row in rows}) == 1, name


EVERY_KIND = dict(
    repetition_penalty=1.3, no_repeat_ngram_size=3, bad_words_ids=[[5], [6, 7]], min_new_tokens=9, suppress_tokens=[11],
    presence_penalty=0.1, frequency_penalty=0.1,
)  # fmt: skip


@pytest.mark.parametrize("sampling", [{}, dict(do_sample=True, temperature=0.9, top_p=0.9)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("drafter", CAPTURED)
def test_recorded_rounds_look_at_the_text(drafter, sampling):
    """Penalties, n-grams and the like need the host in no round; greedy texts are those of eager rounds."""
    host, device = generators(drafter, device="cuda")
    ids, mask = (x.cuda() for x in ragged_prompts(5))
    ours = [g.generate(ids, mask, max_new_tokens=20, seed=0, **EVERY_KIND, **sampling) for g in (host, device)]
    assert ours[1].stats.host is None and ours[1].sequences.equal(ours[0].sequences)


@pytest.mark.parametrize("drafter", CAPTURED)
def test_recorded_rounds_sample_with_every_warper(drafter):
    """The kernels that read logits, in eager rounds and in captured ones: the same draws."""
    host, device = generators(drafter, device="cuda")
    ids, mask = (x.cuda() for x in ragged_prompts(5))
    for options in (dict(top_k=20, top_p=0.9), dict(min_p=0.01, epsilon_cutoff=1e-4, eta_cutoff=1e-4, typical_p=0.95)):
        ours = [g.generate(ids, mask, max_new_tokens=20, seed=0, do_sample=True, temperature=0.8, **options)
                for g in (host, device)]  # fmt: skip
        assert ours[1].stats.host is None and ours[1].sequences.equal(ours[0].sequences)


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_is_recorded_or_says_why_not(family):
    ids, mask = (x.cuda() for x in ragged_prompts(3))
    host, device = generators(
        lambda runner: specdec.ModelDrafter(noisy_copy(family).to(runner.device), tree=TREE), family, device="cuda"
    )
    try:
        out = device.generate(ids, mask, max_new_tokens=24)
    except RuntimeError as error:
        assert family in ("mixtral", "gpt_oss") and "cannot be recorded as a CUDA graph" in str(error)
        return
    assert out.sequences.equal(host.generate(ids, mask, max_new_tokens=24).sequences)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_that_ask_the_device_nothing_are_recorded(family):
    model = build(family).cuda()
    model.set_experts_implementation("batched_mm")
    ids, mask = (x.cuda() for x in ragged_prompts(3))
    expected = specdec.AutoregressiveGenerator(model, mode="eager").generate(ids, mask, max_new_tokens=24).sequences
    out = specdec.AutoregressiveGenerator(model, mode="graph").generate(ids, mask, max_new_tokens=24)
    assert out.stats.host is None and out.sequences.equal(expected)


def test_recorded_sampling_repeats_and_runs_on():
    """The same seed gives the same text, another seed another; nothing grows over many rounds once all shapes have been
    met.
    """
    _, device = generators("chain", device="cuda")
    ids, mask = (x.cuda() for x in ragged_prompts(4))
    text = lambda seed: device.generate(ids, mask, max_new_tokens=30, do_sample=True, seed=seed).sequences
    first = text(1)
    assert text(1).equal(first) and not text(2).equal(first)
    used = []
    for _ in range(3):
        for seed in range(20):
            text(seed)
        used.append(torch.cuda.memory_allocated())
    assert used[1] == used[2]


@pytest.mark.parametrize("drafter", ["none", "chain", "tree", "Medusa heads"])
def test_prompts_are_recorded_when_they_come_again(drafter):
    """Ragged ones and those of another length that share a recording; the pages of other texts are not touched."""
    host, device = generators(drafter, device="cuda")
    ids, mask = (x.cuda() for x in ragged_prompts(4))
    texts = [(ids, mask), (ids[:, 1:], mask[:, 1:]), (ids[:1], mask[:1]), (ids[:1, 2:], mask[:1, 2:])]
    expected = [host.generate(*text, max_new_tokens=20).sequences for text in texts]
    for recorded in (False, True, True):
        assert all(
            device.generate(*text, max_new_tokens=20).sequences.equal(whole)
            for text, whole in zip(texts, expected, strict=True)
        )
        assert device.target.graphs_captured > 0 or not recorded


def test_rounds_through_the_host_replay_recorded_forwards():
    same_prompts = [x.cuda() for x in ragged_prompts(3)]
    host, device = generators(lambda runner: specdec.ModelDrafter(draft_for(runner), 4), device="cuda")
    for generator in (host, device):
        generator.drafter.traits = replace(generator.drafter.traits, captured=False)
    ours = [g.generate(*same_prompts, max_new_tokens=20) for g in (host, device)]
    assert ours[0].sequences.equal(ours[1].sequences) and device.target.graphs_captured


def test_models_with_hooks_run_eagerly_by_default():
    """A replay would call no hook; without it rounds are recorded again."""
    model, (ids, mask) = build("llama").cuda(), (x.cuda() for x in ragged_prompts(2))
    generator = specdec.SpeculativeGenerator(model, None)
    outs = [generator.generate(ids, mask, max_new_tokens=12)]
    seen = []
    handle = model.model.layers[1].register_forward_hook(lambda module, inputs, out: seen.append(1) or out * 0.5)
    outs.append(generator.generate(ids, mask, max_new_tokens=12))
    handle.remove()
    outs.append(generator.generate(ids, mask, max_new_tokens=12))
    assert [out.stats.host is None for out in outs] == [True, False, True] and len(seen) >= 12
    assert outs[2].sequences.equal(outs[0].sequences) and not outs[1].sequences.equal(outs[0].sequences)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_models_on_another_gpu_than_the_current_one(mode):
    ids, mask = ragged_prompts(2)
    found = []
    for device in ("cuda:0", "cuda:1"):
        model, draft = build("llama").to(device), noisy_copy("llama").to(device)
        generator = specdec.SpeculativeGenerator(model, specdec.ModelDrafter(draft, tree=TREE), mode=mode)
        found.append(generator.generate(ids.to(device), mask.to(device), max_new_tokens=12).sequences.cpu())
    assert found[0].equal(found[1])


def test_what_garbage_collection_would_free_during_a_capture_does_not_break_it():
    """Cycles of earlier calls hold graphs, events and pinned memory; a collection runs at every allocation."""
    device, x = torch.device("cuda"), torch.zeros(8, device="cuda")

    def leave_garbage():
        cycle = [CapturedGraph(lambda: x + 1, device), HostCopy(x), HostCopy(x.expand(1 << 20, 8)), torch.cuda.Event()]
        cycle.append(cycle)

    def allocate_objects():
        objects = [[] for _ in range(64)]
        return x + len(objects)

    before = gc.get_threshold()
    for _ in range(4):
        gc.set_threshold(0)
        leave_garbage()
        try:
            graph = CapturedGraph(lambda: (gc.set_threshold(1), allocate_objects())[1], device)
        finally:
            gc.set_threshold(*before)
        assert graph().tolist() == [64.0] * 8


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("drafter", ["chain", "Medusa heads", "dynamic tree"])
def test_automatic_shapes_are_captured_and_their_times_kept(drafter, do_sample, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ids, mask = (x.cuda() for x in ragged_prompts(3))
    model = build("llama").cuda()
    runner = specdec.ModelRunner(model)
    generator = specdec.SpeculativeGenerator(runner, DRAFTERS[drafter](runner, draft_for(runner)), tree="auto")
    expected = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=60)
    for seed in range(4):
        out = generator.generate(ids, mask, max_new_tokens=60, do_sample=do_sample, seed=seed)
        assert out.stats.host is None and (do_sample or out.sequences.equal(expected))
    assert (tmp_path / "specdec" / "round_times.json").exists()
    (fit,) = generator._automatic._fits.values()
    assert 2 <= len(fit.times[4].known) <= 10 and fit.times[4].step > 0
