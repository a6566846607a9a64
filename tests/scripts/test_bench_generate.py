"""The generation benchmark runs from end to end on a toy, survives methods that fail, and its arithmetic and verdicts
are right.
"""

import json
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import specdec
from scripts import bench_generate
from scripts.bench_generate import main
from scripts.generate_bench.methods import KINDS, NODES, drafter_of, measure, runner_of, tree_of_heads
from scripts.generate_bench.models import (
    SHAPES,
    Models,
    build_shape,
    card_of,
    ceiling,
    load,
    prompts,
    read_texts,
    weight_bytes,
)
from scripts.generate_bench.options import note_of, options_of
from scripts.generate_bench.peers import ASSISTED, EAGER, LOOKUP, STATIC
from scripts.generate_bench.processes import record_in, run_child
from scripts.generate_bench.quantised import require_layers
from scripts.generate_bench.rounds import PARTS, opened, take_apart
from scripts.generate_bench.speeds import NotAvailable
from specdec.planning.theory import expected_tokens_per_round

TOY = ["--shape", "toy", "--device", "cpu", "--prompt", "12", "--new-tokens", "18", "--repeats", "1", "--batch", "1"]


@pytest.fixture(scope="module")
def toy():
    options = options_of(TOY)
    return options, load(options)


def on_device(models, drafter):
    """A generator whose rounds are the functions that a GPU records; nothing is recorded on a CPU."""
    runner = specdec.ModelRunner(models.target)
    runner.mode = "graph"
    return specdec.SpeculativeGenerator(runner, drafter)


# ---- models


@pytest.mark.parametrize("weights", ["random", "counting"])
def test_the_first_layers_of_a_shape_are_an_exactly_right_draft(weights):
    models = load(options_of([*TOY, "--weights", weights]))
    ids = torch.randint(512, (3, 10), generator=torch.Generator().manual_seed(1))
    assert torch.equal(models.target(ids).logits, models.draft(ids).logits)
    out = specdec.SpeculativeGenerator(models.target, specdec.ModelDrafter(models.draft, 5)).generate(
        ids, max_new_tokens=24
    )
    assert out.stats.pooled.acceptance_rate == 1 and out.stats.pooled.tokens_per_round == 6
    if weights == "counting":
        assert out.sequences[:, 10:].equal((ids[:, -1:] + torch.arange(1, 25)) % 512)
    assert len(models.target.model.layers) == 4 and len(models.draft.model.layers) == 2
    with pytest.raises(ValueError, match="num_layers must lie between 1 and 3, got 4"):
        build_shape("toy", 4, weights, torch.float32, "cpu", seed=0)


def test_no_tokens_nearly_tie_in_16_bits_where_weights_count(monkeypatch):
    wide = dict(vocab_size=16384, hidden_size=1024, intermediate_size=14336, num_hidden_layers=3, num_attention_heads=8)
    monkeypatch.setitem(SHAPES, "wide", wide)
    target = build_shape("wide", 2, "counting", torch.bfloat16, "cpu", seed=0).target
    ids = torch.randint(16384, (1, 512), generator=torch.Generator().manual_seed(2))
    best, second = target(ids).logits[0].float().topk(2).values.unbind(-1)
    assert (second < best / 4).all()


def test_every_process_gets_the_same_weights_and_prompts(toy):
    options, models = toy
    again = load(options)
    assert all(torch.equal(a, b) for a, b in zip(models.target.parameters(), again.target.parameters(), strict=True))
    assert prompts(models, options, 2)[0].equal(prompts(again, options, 2)[0])
    assert (
        models.target.generation_config.eos_token_id is None
        and models.draft.generation_config is not models.target.generation_config
    )


@pytest.mark.parametrize(("acceptance", "tokens"), [(0.0, 20), (0.5, 240), (1.0, 60)])
def test_acceptance_is_a_dial(acceptance, tokens):
    options = options_of([*TOY, "--acceptance", str(acceptance)])
    models = load(options)
    drafter, note = drafter_of("chain", models, options)
    ids, _ = prompts(models, options, 2)
    out = specdec.SpeculativeGenerator(models.target, drafter).generate(ids, max_new_tokens=tokens, seed=0)
    assert (
        out.stats.pooled.tokens_per_round == pytest.approx(expected_tokens_per_round(acceptance, 5), rel=0.15)
        and "planted" in note
    )
    assert out.sequences.equal(
        specdec.AutoregressiveGenerator(models.target).generate(ids, max_new_tokens=tokens).sequences
    )


def test_a_model_of_ones_own_reads_texts(tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "def f(x):"}\n\nplain words\n')
    options = options_of([*TOY, "--model", "tiny", "--prompts", str(file), "--batch", "3"])
    models = load(options)
    ids, mask = prompts(models, options, 3)
    assert read_texts(file) == ["def f(x):", "plain words"] and ids.shape == mask.shape and ids.shape[1] <= 12
    assert models.tokenizer.decode(ids[2][mask[2].bool()]) == "def f(x):"  # from the first again
    assert len(set(read_texts(None))) >= 8
    file.write_text("\n")
    with pytest.raises(ValueError, match="holds no prompts"):
        read_texts(file)


def test_roofline_counts_what_a_token_reads(toy):
    """By hand: a layer of the toy has 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 192 weights and two norms of 64; behind them
    a norm and 64 * 512.
    """
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 192 + 2 * 64
    behind = 64 + 64 * 512
    card = card_of(toy[1])
    assert card["weight_bytes"] == 4 * (4 * layer + behind) and card["draft_weight_bytes"] == 4 * (2 * layer + behind)
    assert card["kv_bytes"] == 4 * 2 * 4 * 2 * 16 and card["parameters"] == 4 * layer + behind + 64 * 512
    tied = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=50,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            tie_word_embeddings=True,
        )
    )
    assert weight_bytes(tied) == 4 * tied.num_parameters()
    card = {"weight_bytes": 100, "kv_bytes": 2, "draft_weight_bytes": 10, "draft_kv_bytes": 1}
    assert ceiling(card, 3000.0, batch=4, context=25) == 4 * 3000 / (100 + 4 * 25 * 2)
    assert ceiling(card, 3000.0, batch=4, context=25, length=5, tokens_per_round=6.0) == 4 * 6 * 3000 / (
        100 + 200 + 5 * (10 + 100)
    )
    assert ceiling(card | {"draft_weight_bytes": None}, 3000.0, 1, 1, length=5) is None


def test_the_8b_shape_has_the_weights_of_8b():
    models = build_shape("llama-3.1-8b", 2, "random", torch.bfloat16, "meta", seed=0)
    card = card_of(models)
    assert (
        card["parameters"] == 8_030_261_248
        and card["weight_bytes"] == 2 * (8_030_261_248 - 128256 * 4096)
        and card["kv_bytes"] == 131072
    )


# ---- methods


@pytest.mark.parametrize(
    "method", [EAGER, STATIC, ASSISTED, LOOKUP, "autoregressive-eager", "tree-eager", "medusa-eager", "lookup-eager"]
)
def test_methods_write_the_same_text(toy, method):
    options, models = toy
    (row,) = measure(method, options)
    expected = (
        specdec.AutoregressiveGenerator(models.target)
        .generate(prompts(models, options, 1)[0], max_new_tokens=18)
        .sequences[:, 12:]
    )
    assert row["tokens"] == expected.tolist() and row["batch"] == 1 and "error" not in row
    assert (
        row["range"][0] <= row["tokens_per_second"] <= row["range"][1]
        and row["first_token_seconds"] > 0
        and row["peak_bytes"] is None
    )
    if method == ASSISTED:
        assert row["tokens_per_round"] == 6
    if not method.startswith("transformers"):
        assert set(row["parts"]) == {*PARTS, "whole", "host"} and row["parts"]["host"] is None and row["host_rounds"]


def test_half_of_the_layers_may_lie_in_host_memory(toy):
    plain, models = toy
    options = options_of([*TOY, "--host-layers", "2"])
    ids = prompts(models, plain, 1)[0]
    expected = specdec.AutoregressiveGenerator(models.target).generate(ids, max_new_tokens=18).sequences[:, 12:]
    for method in ("autoregressive-eager", "chain-eager", "auto-eager"):
        (row,) = measure(method, options)
        assert row["tokens"] == expected.tolist() and "error" not in row and "parts_error" not in row
    assert sum(row["shapes"].values()) and "2 layers of the target are streamed" in note_of(options)
    with pytest.raises(NotAvailable, match='streamed layers runs in mode="eager" only'):
        list(measure("chain-graph", options))


@pytest.mark.parametrize("kind", KINDS)
def test_a_round_taken_apart_is_the_round(toy, kind):
    options, models = toy
    drafter, _ = drafter_of(kind, models, options)
    generator, (ids, mask) = on_device(models, drafter), prompts(models, options, 3)
    out = generator.generate(ids, mask, max_new_tokens=18)
    text = out.sequences[:, : 12 + 9]
    with opened(generator, text, torch.ones_like(text), 9) as one, torch.inference_mode():
        for _ in range(2):  # the second begins where the first did
            answer = one.whole().tolist()
            counts = [row[0] for row in answer[:3]]
            assert len(answer) == 3 and counts == ([5] * 3 if kind in ("chain", "tree") else counts)
            draft = one.draft()
            verdict, emitted, _, _ = one.accept(draft, one.verify(draft))
            kept = [emitted[row, : int(verdict.counts[row]) + 1].tolist() for row in range(3)]
            assert kept == [out.sequences[row, 21 : 21 + len(kept[row])].tolist() for row in range(3)]
            one.commit(draft, verdict, emitted)
    parts = take_apart(generator, text, torch.ones_like(text), 9)
    assert all(parts[name] > 0 for name in (*PARTS, "whole")) and parts["capture_seconds"] is None
    assert generator.target.cache.sequences == () and generator.generate(ids, mask, max_new_tokens=18).sequences.equal(
        out.sequences
    )


def test_costs_and_a_long_run(toy):
    options = options_of([*TOY, "--long-run", "7"])
    (cost,) = measure("costs-eager", options)
    assert (
        list(cost["forward_seconds"]) == ["1", "6", "tree 64"] and cost["draft_seconds"] > 0 and cost["context"] == 21
    )
    (long,) = measure("long-run-eager", options)
    assert long["rounds"] >= 7 and long["before"]["resident"] and long["after"]["allocated"] is None
    assert tree_of_heads().size == NODES and tree_of_heads().max_depth == 5


def test_what_is_not_available_says_why(toy):
    with pytest.raises(NotAvailable, match="not available here: mode must be one of"):
        runner_of(toy[1], "fast")
    with pytest.raises(NotAvailable, match="--draft"):
        drafter_of("chain", Models(toy[1].target, None), options_of([*TOY, "--model", "tiny"]))


# ---- the whole program


def test_one_run(tmp_path, capsys, monkeypatch):
    measured = bench_generate.run_child

    def run(method, *rest):  # one of them is not available here
        missing = {
            "method": method,
            "environment": None,
            "rows": [],
            "error": "not available here: no GPU",
            "seconds": 0.1,
        }
        return missing if method == "chain-graph" else measured(method, *rest)

    monkeypatch.setattr(bench_generate, "run_child", run)
    arguments = [*TOY, "--records", str(tmp_path / "records"), "--json", str(tmp_path / "made" / "result.json")]
    methods = ["roofline", EAGER, "autoregressive-eager", "chain-graph"]
    main([*arguments, "--methods", *methods])
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    assert result == json.loads((tmp_path / "made" / "result.json").read_text())
    assert [(row["method"], bool(row.get("error"))) for row in result["rows"]] == [
        *((name, False) for name in methods[:3]),
        ("chain-graph", True),
    ]
    assert (
        "not measured: chain-graph: not available here" in printed
        and "failed" in printed
        and "Synthetic control: random weights" in printed
    )
    assert (
        result["schema"] == 1
        and result["skipped"] == []
        and "torch" in result["environment"]
        and result["settings"]["new_tokens"] == 18
    )
    assert [(entry["method"], entry["identical"], entry["texts"]) for entry in result["audit"]] == [(EAGER, 1, 1)]
    assert all(bar["met"] is None and not bar["judged"] for bar in result["bars"]) and not any(
        "tokens" in row for row in result["rows"]
    )

    main(
        [*arguments, "--methods", *methods, "--seconds", "0"]
    )  # what was measured is taken from the records, what failed would run again
    printed = capsys.readouterr().out
    again = json.loads(printed.splitlines()[-1])
    assert (
        again["skipped"] == ["chain-graph", "audit"]
        and again["rows"] == result["rows"][:3]
        and "in an earlier run" in printed
    )


def test_a_process_that_takes_too_long_is_ended_and_recorded():
    record = run_child("autoregressive-eager", TOY, 0.5)
    assert record["rows"] == [] and record["error"].startswith("took longer than 0.5 s") and record["seconds"] < 5


def test_a_process_that_dies_leaves_the_rows_it_had(monkeypatch, tmp_path):
    """The last whole line counts; the half of one, and what others print, does not."""
    script = tmp_path / "python"
    whole = json.dumps({"method": "chain-graph", "environment": None, "rows": [{"batch": 1}], "error": None})
    script.write_text(f"#!/bin/sh\necho '{whole}'\necho 5\necho '{whole[:20]}'\necho 'CUDA error' >&2\nexit 3\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    record = run_child("chain-graph", TOY, 20)
    assert record["rows"] == [{"batch": 1}] and record["error"] == "ended with status 3; last said: CUDA error"
    assert record_in("[1]") is None and record_in("{") is None


def test_the_command_line_refuses_what_it_cannot_do(capsys):
    for arguments in (
        ["--acceptance", "0.5", "--model", "tiny"],
        ["--acceptance", "1.5"],
        ["--batch", "0"],
        ["--methods", "nothing"],
    ):
        with pytest.raises(SystemExit):
            options_of(arguments)
    assert options_of(["--device", "cuda"]).dtype == "bfloat16" and options_of(["--device", "cpu"]).dtype == "float32"
    assert (
        "long-run-graph" in options_of(["--long-run", "9"]).methods and "long-run-graph" not in options_of([]).methods
    )


# ---- quantised weights


def quantised(*more):
    pytest.importorskip("torchao", reason="torchao is not installed")
    return load(options_of([*TOY, *more]))


@pytest.mark.parametrize(("target", "draft"), [("int8", "int8"), ("fp8", "none"), ("none", "int8-dynamic")])
def test_target_and_draft_of_a_shape_are_quantised_as_asked(toy, target, draft):
    """Alike, the draft is exactly right as before; otherwise each has the weights that it has without the other."""
    plain, models = toy[1], quantised("--target-quant", target, "--draft-quant", draft)
    ids = torch.randint(512, (3, 10), generator=torch.Generator().manual_seed(1))
    logits = {name: getattr(models, name)(ids).logits for name in ("target", "draft")}
    assert logits["target"].equal(logits["draft"]) == (target == draft)
    for name, kind in (("target", target), ("draft", draft)):
        expected = plain.target(ids).logits
        if kind != "none":
            alone = load(options_of([*TOY, f"--{name}-quant", kind]))
            assert not logits[name].equal(expected) and alone.kept == {name: []}
            expected = getattr(alone, name)(ids).logits
        assert logits[name].equal(expected)
    assert models.draft.get_input_embeddings() is models.target.get_input_embeddings()
    layers, packed = 4 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 192), weight_bytes(models.target)
    if target != "none":  # a byte a weight; a scale of four bytes an output, in int8 a zero point of one too
        outputs = 4 * (3 * 64 + 2 * 32 + 2 * 192)
        smaller = weight_bytes(plain.target) - 3 * layers + (5 if target == "int8" else 4) * outputs
        assert packed == smaller


def test_a_run_with_quantised_weights(capsys):
    quants = ["--target-quant", "int8", "--draft-quant", "fp8"]
    target = quantised(*quants).target
    main([*TOY, *quants, "--methods", "chain-eager"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["settings"]["target_quant"], result["settings"]["draft_quant"]) == ("int8", "fp8")
    (row,) = result["rows"]
    assert row["note"] == "2-layer draft" and "error" not in row and row["tokens_per_round"] > 1
    assert "before they are quantised" in result["note"] and "target int8, draft fp8" in result["note"]
    assert not any(bar["judged"] for bar in result["bars"])
    options = options_of([*TOY, *quants])
    (row,) = measure("chain-eager", options)
    ids = prompts(Models(target, None), options, 1)[0]
    plain = specdec.AutoregressiveGenerator(target, mode="eager").generate(ids, max_new_tokens=18)
    assert row["tokens"] == plain.sequences[:, 12:].tolist()


def test_kinds_of_weights_that_cannot_work_are_refused(capsys, monkeypatch, tmp_path):
    def refused(*more):
        with pytest.raises(SystemExit):
            options_of([*TOY, *more])
        return capsys.readouterr().err

    assert "invalid choice: 'int3' (choose from" in refused("--target-quant", "int3")
    with monkeypatch.context() as without:
        without.setattr("importlib.util.find_spec", lambda name: None)
        assert "specdec-lab[quant]" in refused("--draft-quant", "int8")
    pytest.importorskip("torchao", reason="torchao is not installed")
    own = ["--model", str(tmp_path)]
    assert "needs a draft model: --draft" in refused(*own, "--draft-quant", "int8")
    assert "quantise both alike" in refused("--acceptance", "0.5", "--target-quant", "int8")
    half = ["--device", "cuda", "--dtype", "float16", "--target-quant", "int4"]
    assert "bfloat16 only, got --dtype float16" in refused(*own, *half)
    with pytest.raises(ValueError, match="no linear layer of the draft divides into groups of 128"):
        options_of([*TOY, "--draft-quant", "int4"])
    models = load(options_of(TOY))
    models.target.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(ValueError, match="the target is a checkpoint that is quantised already"):
        require_layers(models.target, "int8", "target")
