"""Two processes that hold one model together give the tokens of one process, and stay together."""

import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from transformers.distributed import DistributedConfig

import specdec
from specdec.acceptance import Acceptance, greedy
from specdec.model import parallel
from specdec.requests.request import build_request
from specdec.rounds import round as rounds
from tests.families import _COMMON, _LLAMA_LIKE, LATENT, ragged_prompts
from tests.ranks import run_ranks

pytestmark = pytest.mark.seam
LIKE = _COMMON | _LLAMA_LIKE | dict(vocab_size=96)  # an even number: older releases divide the output layer evenly only
CONFIGS = {
    "llama": lambda: tf.LlamaConfig(**LIKE),
    "qwen3": lambda: tf.Qwen3Config(**LIKE, head_dim=16),  # norms of each head
    "olmo2": lambda: tf.Olmo2Config(**LIKE),  # norms over the whole width of q and k
    "minimax_m2": lambda: tf.MiniMaxM2Config(**LIKE, head_dim=16, num_local_experts=4, num_experts_per_tok=2),
    "one head": lambda: tf.LlamaConfig(**LIKE | dict(num_key_value_heads=1)),
    "minicpm3": lambda: tf.MiniCPM3Config(**LATENT["minicpm3"]().to_dict() | dict(vocab_size=96)),
    "three heads": lambda: tf.LlamaConfig(**LIKE | dict(hidden_size=48, num_attention_heads=6, num_key_value_heads=3)),
}
TREE = specdec.TokenTree.from_widths((2, 2, 1))
IDS, MASK = (given.clamp(max=95) for given in ragged_prompts(3))
LONG = ragged_prompts(2, longest=150)[0][:1].clamp(max=95)


def save(folder: Path, name: str, noise: float = 0.0) -> Path:
    """A random model of `name`, with norms that are no identities, in a folder."""
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(CONFIGS[name]())
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.mul_(4.0) if parameter.ndim > 1 else parameter.add_(0.3 * torch.randn_like(parameter))
            if noise and "norm" not in parameter_name:
                parameter.add_(torch.randn_like(parameter) * parameter.std() * noise)
    where = folder / f"{name}{noise}"
    model.save_pretrained(where)
    return where


def load(where: Path, ranks: int = 2, **plan):
    config = {"distributed_config": DistributedConfig(tp_size=ranks, **plan)} if ranks > 1 else {}
    return tf.AutoModelForCausalLM.from_pretrained(where, **config).eval()


@pytest.fixture(autouse=True)
def short_timeout(monkeypatch):
    monkeypatch.setattr(parallel, "TIMEOUT", timedelta(seconds=20))


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("pair")
    return SimpleNamespace(target=save(folder, "llama"), draft=save(folder, "llama", 0.05))


def drafters(draft) -> dict[str, specdec.Drafter | None]:
    return {
        "plain": None,
        "chain": specdec.ModelDrafter(draft, num_tokens=4),
        "tree": specdec.ModelDrafter(draft, tree=TREE),
        "own trees": specdec.DynamicTreeDrafter(draft, num_tokens=6, depth=3, width=2),
        "lookup": specdec.PromptLookupDrafter(),
    }


GREEDY, SAMPLED = dict(max_new_tokens=12), dict(max_new_tokens=12, do_sample=True, seed=3, top_p=0.9)


def texts(target, draft) -> dict[tuple[str, str], list]:
    """The tokens of each drafter and call, and those of an engine."""
    found = {}
    for name, drafter in drafters(draft).items():
        generator = specdec.SpeculativeGenerator(target, drafter, mode="eager")
        found[name, "greedy"] = generator.generate(IDS, MASK, **GREEDY).sequences.tolist()
        if name in ("chain", "tree"):
            found[name, "sampled"] = generator.generate(IDS, MASK, **SAMPLED).sequences.tolist()
            found[name, "to the last position"] = generator.generate(LONG, max_new_tokens=10).sequences.tolist()
    engine = specdec.Engine(target, specdec.ModelDrafter(draft, num_tokens=4), tree=None, memory=1 << 20)
    prompts = [row[row != 1] for row in IDS]
    handles = [engine.submit(prompt, **options) for prompt in prompts for options in (GREEDY, SAMPLED)]
    while not engine.idle:
        engine.step()
    return found | {("engine", "both"): [handle.tokens for handle in handles]}


def test_tokens_are_those_of_one_process(pair, tmp_path):
    def work(rank):
        target = load(pair.target)
        held = specdec.ModelRunner(target).adapter.layout.common.num_kv_heads
        return held, texts(target, load(pair.draft, 1))

    alone = texts(load(pair.target, 1), load(pair.draft, 1))
    for told in run_ranks(tmp_path, work):
        assert isinstance(told, tuple), told
        assert told[0] == 1  # of two kv heads
        for key, tokens in alone.items():
            assert told[1][key] == tokens, key


def test_a_draft_model_may_be_split_too_and_the_target_draft_for_itself(pair, tmp_path):
    def work(rank):
        target = load(pair.target)
        with pytest.raises(ValueError, match=r"draft model's weights are split over the processes \[0, 1\]"):
            specdec.SpeculativeGenerator(load(pair.target, 1), specdec.ModelDrafter(target, 2))
        found = []
        for drafter in (specdec.ModelDrafter(load(pair.draft), 4), specdec.EarlyExitDrafter(target, 2, num_tokens=3)):
            out = specdec.SpeculativeGenerator(target, drafter).generate(IDS, MASK, **GREEDY)
            found.append((out.sequences.tolist(), [row.accepted for row in out.stats.rows]))
        return found

    wanted = specdec.AutoregressiveGenerator(load(pair.target, 1)).generate(IDS, MASK, **GREEDY)
    first, second = run_ranks(tmp_path, work)
    assert first == second and [tokens for tokens, _ in first] == [wanted.sequences.tolist()] * 2


def test_the_first_rank_decides(pair, tmp_path, monkeypatch):
    """Seed, drafts and their length, acceptance and stops, all of which the other rank would decide otherwise."""

    def work(rank):
        torch.manual_seed(rank)
        target, draft = load(pair.target), load(pair.draft, 1)
        ticks = iter(range(1_000_000))
        monkeypatch.setattr(rounds.time, "perf_counter", lambda: next(ticks) * [1e-3, 0.7][rank] ** (next(ticks) % 5))
        auto = specdec.SpeculativeGenerator(target, specdec.ModelDrafter(draft, 5), tree="auto")
        out = [auto.generate(IDS, MASK, max_new_tokens=40, do_sample=True, top_k=5) for _ in range(2)]
        monkeypatch.undo()
        found = [(one.sequences.tolist(), one.stats.pooled.shapes) for one in out]
        with torch.no_grad():  # this rank's draft model drafts other tokens
            for parameter in draft.parameters():
                parameter.add_(rank * torch.randn_like(parameter))
        for drafter in (specdec.ModelDrafter(draft, 4), specdec.DynamicTreeDrafter(draft, 6, 3, 2)):
            generator = specdec.SpeculativeGenerator(target, drafter)
            found.append(generator.generate(IDS, MASK, **GREEDY).sequences.tolist())
            found.append(generator.generate(IDS, MASK, **SAMPLED).sequences.tolist())

        def odd(draft, scores, noise):  # this rank accepts other tokens
            verdict = greedy(draft, scores, noise)
            return Acceptance(verdict.counts, verdict.path, (verdict.next_tokens + rank) % 96)

        generator = specdec.SpeculativeGenerator(target, specdec.ModelDrafter(load(pair.draft, 1), 3), rule=odd)
        found.append(generator.generate(IDS, MASK, **GREEDY).sequences.tolist())
        found.append(build_request(generator.target, IDS, MASK).seed)
        stop = lambda ids, scores: ids.shape[1] >= IDS.shape[1] + (7 if rank == 0 else 3)
        plain = specdec.AutoregressiveGenerator(target)
        found.append(plain.generate(IDS, MASK, stopping_criteria=[stop], max_new_tokens=20).lengths.tolist())
        return found

    first, second = run_ranks(tmp_path, work)
    assert isinstance(first, list), first
    assert first == second
    assert first[0][0] != first[1][0]  # two seeds
    plain = specdec.AutoregressiveGenerator(load(pair.target, 1)).generate(IDS, MASK, **GREEDY)
    assert first[2] == first[4] == first[6] == plain.sequences.tolist() and first[-1] == [7, 7, 7]


def test_ranks_with_other_requests_raise(pair, tmp_path):
    def work(rank):
        target = load(pair.target)
        generator = specdec.AutoregressiveGenerator(target)
        with pytest.raises(ValueError, match="prompts, limit, sampling, ends and seed must be the same on all 2 ranks"):
            generator.generate(IDS.roll(rank, 0), max_new_tokens=2)
        with pytest.raises(ValueError, match="must be the same on all 2 ranks"):
            generator.generate(IDS, max_new_tokens=2, seed=rank)
        engine = specdec.Engine(target, memory=1 << (20 + rank))
        pages = engine.target.cache.num_pages
        handles = [engine.submit(IDS[0], max_new_tokens=4) for _ in range(2)]
        engine.step()
        engine.cancel(handles[rank])
        with pytest.raises(ValueError, match="the requests at work must be the same"):
            engine.step()
        return pages

    first, second = run_ranks(tmp_path, work)
    assert isinstance(first, int) and first == second


def test_what_runs_over_ranks_says_so(pair, tmp_path):
    def work(rank):
        model = load(pair.target)
        runner = specdec.ModelRunner(model)
        assert runner.mode == "eager" and "runs eagerly: its weights are split over 2 ranks" in runner.explain()
        with pytest.raises(ValueError, match='split over 2 ranks runs in mode="eager" only'):
            specdec.ModelRunner(model, mode="graph")
        before = runner.execution._fingerprint_now()
        weight = model.model.layers[0].mlp.up_proj.weight
        weight._local_tensor = weight._local_tensor.clone()  # as when a model is loaded again
        return before != runner.execution._fingerprint_now()

    assert run_ranks(tmp_path, work) == [True, True]


@pytest.mark.parametrize("name", ["qwen3", "olmo2", "minimax_m2"])
def test_norms_of_queries_and_keys_are_right(name, tmp_path):
    where = save(tmp_path, name)

    def work(rank):
        return specdec.AutoregressiveGenerator(load(where)).generate(IDS, MASK, **GREEDY).sequences.tolist()

    wanted = specdec.AutoregressiveGenerator(load(where, 1)).generate(IDS, MASK, **GREEDY).sequences.tolist()
    assert run_ranks(tmp_path, work) == [wanted] * 2


def test_heads_and_norms_that_ranks_cannot_share_are_refused(tmp_path):
    divided = {f"model.layers.*.self_attn.{name}_proj": "colwise" for name in "qkv"}
    plan = divided | {"model.layers.*.self_attn.o_proj": "rowwise"}
    cases = [
        ("one head", {}, r"has 1 kv heads, which 2 ranks cannot share evenly \(model.layers.0.self_attn.k_proj\)"),
        ("three heads", {}, "has 3 kv heads, which 2 ranks cannot share evenly"),
        ("olmo2", {"tp_plan": plan}, "4 attention heads divided between them, .*q_norm normalises all 32 numbers"),
    ]
    where = {name: save(tmp_path, name) for name, *_ in cases}

    def work(rank):
        for name, options, message in cases:
            with pytest.raises(ValueError, match=message):
                specdec.ModelRunner(load(where[name], **options))
        return True

    assert run_ranks(tmp_path, work) == [True, True]


def test_every_rank_keeps_the_latents_of_all_heads(tmp_path):
    where = save(tmp_path, "minicpm3")

    def found(ranks):
        runner = specdec.ModelRunner(load(where, ranks))
        generator = specdec.SpeculativeGenerator(runner, specdec.DynamicTreeDrafter(runner.model, 6, depth=3, width=2))
        text = generator.generate(IDS, MASK, **GREEDY).sequences.tolist()
        return text, runner.page_format.bytes, "in place of their latents" in runner.explain()

    wanted = found(1)
    assert run_ranks(tmp_path, lambda rank: found(2)) == [wanted] * 2 and not wanted[2]


@pytest.mark.parametrize("end", ["killed", "stuck"])
def test_a_rank_that_is_lost_ends_the_others(end, pair, tmp_path, monkeypatch):
    lost = 1 if end == "killed" else 0
    monkeypatch.setattr(parallel, "TIMEOUT", timedelta(seconds=1))

    def work(rank):
        def criterion(ids, scores):
            if rank == lost and ids.shape[1] >= IDS.shape[1] + 5:
                os.kill(os.getpid(), signal.SIGKILL) if end == "killed" else time.sleep(3)
            return False

        generator, began = specdec.AutoregressiveGenerator(load(pair.target)), time.perf_counter()
        if rank == lost:
            return generator.generate(IDS, MASK, stopping_criteria=[criterion], max_new_tokens=50)
        with pytest.raises(RuntimeError):
            generator.generate(IDS, MASK, stopping_criteria=[criterion], max_new_tokens=50)
        return time.perf_counter() - began

    told = run_ranks(tmp_path, work)
    assert told[1 - lost] < 20, told
    assert told[lost] is None if end == "killed" else "Error" in told[lost]
