"""The CPU benchmark runs from end to end on next to nothing, survives engines that fail, and its figures are right."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import specdec
from scripts.bench_cpu import draw, main
from scripts.cpu_bench.engines.llama_cpp import interleaved, write_gguf
from scripts.cpu_bench.figures import ratios_of, rows_of
from scripts.cpu_bench.interleave import Calls, measure
from scripts.cpu_bench.methods import CHAIN, KINDS, LOOKUP, PEERS, PLAIN, Method, methods_of, pairs_of
from scripts.cpu_bench.options import options_of
from scripts.cpu_bench.processes import Launcher, RemoteWorker, WorkerFailed
from scripts.cpu_bench.report import report
from scripts.cpu_bench.sampled import judge, kolmogorov, places_of
from scripts.cpu_bench.workload import SURE, prepare, surer, whole_folder

# an engine of the standard library alone: says the prompt's last token and counts on; "lookup" is broken in two ways
ENGINE = """
import os, time
PACKAGES = ("pip", "no-such-distribution")
def export(models, folder):
    raise OSError("nothing to export\\nsecond line")
def load(settings):
    print("what an engine prints is no answer")
    def call(prompts, new_tokens, seed):
        if seed == 13: os._exit(3)
        if settings["kind"] == "lookup": raise ValueError("cannot look up")
        time.sleep(0.002 if settings["kind"] == "plain" else 0.001)
        texts = [[prompt[-1] + 1 + i for i in range(new_tokens - (seed == 14))] for prompt in prompts]
        return texts, new_tokens if settings["kind"] == "plain" else new_tokens / 2
    return call
"""


@pytest.fixture
def engine(tmp_path) -> Path:
    path = tmp_path / "json.py"  # a name that would hide a module if its folder were searched
    path.write_text(ENGINE)
    return path


@pytest.fixture
def worker(engine):
    worker = RemoteWorker(engine)
    yield worker
    worker.close()


# ---- the whole


def test_it_runs_and_writes_what_it_measured(tmp_path, capsys):
    """Ours and transformers on a toy, then from the file; a chain of an exact draft takes one round for six tokens."""
    file, plot = tmp_path / "result.json", tmp_path / "plot.png"
    sizes = ["--prompts", "3", "--prompt-tokens", "6", "--new-tokens", "12", "--repeats", "1"]
    main(["--shape", "toy", *sizes, "--kinds", "chain", "--json", str(file), "--plot", str(plot)])
    result = json.loads(file.read_text())
    assert [row["name"] for row in result["methods"]] == ["ours chain", "transformers chain"]
    assert all(row["tokens_per_round"] > 4 and row["tokens_per_wall_second"] > 0 for row in result["methods"])
    (entry,) = result["audit"]
    assert (entry["method"], entry["texts"], entry["identical"]) == ("transformers chain", 3, 3)
    assert [(row["clock"], row["prompts"]) for row in result["ratios"]] == [("wall", 3), ("cpu", 3)]
    assert all(row["interval"][0] < row["value"] < row["interval"][1] for row in result["ratios"])
    said = capsys.readouterr().out
    assert "Synthetic control" in said and "peak GiB" in said and f"figures: {file}" in said and plot.stat().st_size
    main(["--from", str(file)])
    assert capsys.readouterr().out.strip() in said


def test_peers_that_are_not_there_leave_a_line_and_the_others_go_on(tmp_path, capsys):
    file, nowhere = tmp_path / "result.json", str(tmp_path / "nowhere")
    missing = [f"--python={peer}={nowhere}" for peer in PEERS]
    sizes = ["--prompts", "1", "--new-tokens", "6", "--repeats", "1", "--samples", "0"]
    main([*missing, *sizes, "--kinds", "plain", "--json", str(file), "--exports", str(tmp_path / "exports")])
    result = json.loads(file.read_text())
    errors = {row["name"]: row["error"] for row in result["methods"] if "error" in row}
    assert errors.keys() == {f"{peer} plain" for peer in PEERS} and all(nowhere in text for text in errors.values())
    assert result["audit"][0]["identical"] == 4 and {row["clock"] for row in result["ratios"]} == {"wall", "cpu"}
    said = capsys.readouterr().out
    assert said.count("not measured: ") == 3 and "2 of 5 methods are ready" in said
    kept = [path.name for path in (tmp_path / "exports").rglob("*") if path.is_dir()]
    assert {"target", "draft", SURE} <= set(kept) and not [name for name in kept if name.endswith(".part")]


def test_options_that_do_not_fit_together_are_refused(tmp_path):
    assert options_of([]).peers == list(PEERS) and options_of(["--batch", "8"]).peers == []
    for arguments, said in (
        (["--shape", "wide", "--peers", "openvino"], "--peers decode the shipped pair"),
        (["--peers", "vllm"], "must be of llama.cpp, openvino, onnxruntime, got vllm"),
        (["--python", "openvino"], "--python is PEER=PATH"),
        (["--base", str(tmp_path)], "is no checkout"),
        (["--repeats", "0"], "--repeats must be at least 1"),
    ):
        with pytest.raises(ValueError, match=said):
            options_of(arguments)


# ---- methods and workload


def test_which_methods_run_and_which_speeds_are_divided(tmp_path):
    (tmp_path / "specdec").mkdir()
    names = lambda *arguments: [method.name for method in methods_of(options_of(arguments))]
    assert len(names()) == len(KINDS) + 4 * 3 and "openvino medusa" not in names()
    assert names("--shape", "toy") == ["ours plain", "ours chain", "transformers plain", "transformers chain"]
    batched = names("--batch", "8", "--base", str(tmp_path), "--kinds", "chain", "--modes", "eager")
    assert batched == ["ours chain", "ours chain, eager", "base chain"]
    pairs = pairs_of(methods_of(options_of([])))
    asked = ("plain", "transformers"), ("chain", "llama.cpp"), ("chain", "onnxruntime"), ("lookup", "openvino")
    assert {(f"ours {kind}", f"{engine} {kind}") for kind, engine in asked} <= set(pairs)
    assert ("openvino chain", "openvino plain") in pairs and len(pairs) == len(set(pairs))


def test_prompts_are_of_all_kinds_and_batches_are_ragged(tmp_path):
    workload = prepare(options_of(["--prompts", "2", "--batch", "4"]), tmp_path)
    lengths = [[len(prompt) for prompt in batch] for batch in workload.batches]
    assert [len(batch) for batch in workload.batches] == [4, 4] and len(set(lengths[0])) > 1
    with pytest.raises(ValueError, match="a batch of 8 needs more than 4 prompts"):
        prepare(options_of(["--prompts", "1", "--batch", "8"]), tmp_path)
    draft, sure = (workload.load(name, "float32") for name in ("draft", SURE))
    ids = torch.tensor([workload.batches[0][0]])
    assert torch.allclose(sure(ids).logits, 4 * draft(ids).logits, rtol=1e-4, atol=1e-3)


def test_a_folder_is_whole_or_not_there(tmp_path):
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "a") as part:
        (part / "file").write_text("half")
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    with whole_folder(tmp_path / "a") as part:
        (part / "file").write_text("whole")
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "file"]


# ---- workers


def test_a_worker_answers_and_what_raises_does_not_end_it(worker):
    with pytest.raises(WorkerFailed, match="^OSError: nothing to export$"):
        worker.ask({"export": {"models": "a", "folder": "b"}}, 20)
    found = worker.ask({"load": {"kind": "plain"}}, 20)["versions"]
    assert found["pip"] and found["no-such-distribution"] is None
    answer = worker.ask({"call": {"prompts": [[1], [2, 5]], "new_tokens": 3, "seed": None}}, 20)
    assert answer["texts"] == [[2, 3, 4], [6, 7, 8]] and answer["rounds"] == 3
    assert answer["wall"] >= 0.002 > answer["cpu"] and answer["peak"] > 1e6
    with pytest.raises(WorkerFailed, match="ended with status 3; last said: what an engine prints"):
        worker.ask({"call": {"prompts": [[1]], "new_tokens": 3, "seed": 13}}, 20)
    with pytest.raises(WorkerFailed, match="ended with status"):
        worker.ask({"load": {"kind": "plain"}}, 20)


def test_a_worker_that_takes_too_long_or_cannot_start_is_told(worker):
    with pytest.raises(WorkerFailed, match="took longer than 0 s"):
        worker.ask({"load": {"kind": "plain"}}, 0)
    with pytest.raises(WorkerFailed, match="No such file"):
        RemoteWorker(Path("engine.py"), "/no/such/python")


def test_calls_go_on_without_methods_that_fail(engine):
    options = options_of(["--repeats", "2", "--new-tokens", "4"])
    said: list[str] = []
    calls = Calls(20.0, said.append)

    def launcher(method: Method) -> RemoteWorker:
        if method.engine == "openvino":
            raise WorkerFailed("export: no")
        worker = RemoteWorker(engine)
        worker.ask({"load": {"kind": method.kind}}, 20)
        return worker

    methods = [Method("ours", kind) for kind in ("plain", "chain", "lookup")] + [Method("openvino", "plain")]
    calls.start(methods, launcher)
    try:
        records, texts = measure(calls, [[[1]], [[7]], [[3]]], options)
    finally:
        calls.close()
    assert calls.failed == {"openvino plain": "export: no", "ours lookup": "ValueError: cannot look up"}
    assert said == ["openvino plain: export: no", "ours lookup: ValueError: cannot look up"]
    assert texts == dict.fromkeys(("ours plain", "ours chain"), [[2, 3, 4, 5], [8, 9, 10, 11], [4, 5, 6, 7]])
    assert len(records) == 2 * 2 * 3
    rows = rows_of(methods, records, calls.failed)
    assert [row.get("tokens_per_round") for row in rows] == [1, 2, None, None] and rows[2]["error"]
    (wall,) = [row for row in ratios_of(pairs_of(methods[:2]), records) if row["clock"] == "wall"]
    assert (wall["above"], wall["below"]) == ("ours chain", "ours plain") and wall["value"] > 1.2


# ---- figures


def record(method, prompt, repeat, seconds, cpu=0.5):
    return {"method": method, "prompt": prompt, "repeat": repeat, "new_tokens": 8, "seconds": seconds,
            "cpu_seconds": cpu, "rounds": 4, "peak_bytes": 2**30}  # fmt: skip


def test_a_ratio_pairs_calls_of_a_prompt_in_a_pass():
    """Twice as fast on every prompt, however much slower a pass is; a call without a partner does not count."""
    times = [(prompt, repeat, (prompt + 1) * (1 + 9 * repeat)) for prompt in range(3) for repeat in range(2)]
    records = [record("a", *key, seconds) for *key, seconds in times]
    records += [record("b", *key, 2 * seconds) for *key, seconds in times] + [record("a", 3, 0, 1e-9)]
    wall, cpu = ratios_of([("a", "b"), ("a", "missing")], records)
    assert wall["value"] == pytest.approx(2) and wall["interval"] == pytest.approx([2, 2]) and wall["prompts"] == 3
    assert cpu["value"] == 1
    assert ratios_of([("a", "b")], records[:1] + records[6:7])[0]["interval"] is None


def test_a_report_needs_nothing_but_the_result():
    methods = [Method("ours", PLAIN), Method("openvino", CHAIN), Method("llama.cpp", PLAIN)]
    records = [record(method.name, 0, 0, 0.25) for method in methods[:2]]
    settings = vars(options_of(["--threads", "2"]))
    difference = {"row": 0, "position": 3, "tokens": [1, 2]}
    about = {"batch": 1, "reference": "ours plain", "texts": 4, "identical": 3, "differences": [difference]}
    drawn = {"failed": 1, "error": "ValueError: no", "tokens": 50, "gap": 0.4, "p_value": 1e-9, "own": False}
    result = {
        "methods": rows_of(methods, records, {"llama.cpp plain": "not installed"}), "settings": settings,
        "ratios": ratios_of([("ours plain", "openvino chain")], records), "versions": {"openvino": {"openvino": "1"}},
        "audit": [{"method": "openvino chain", **about}], "sampled": [{"method": "openvino chain", **drawn}],
    }  # fmt: skip
    said = report(json.loads(json.dumps(result, default=str)))
    for part in ("2 threads", "32.0 (32.0 … 32.0)", "3 of 4", "NO (0.400)", "1.00 (- … -)", "openvino: openvino 1",
                 "not measured: llama.cpp plain: not installed", "sampled text is not the target's own",
                 "1 sampled calls failed, the first: ValueError: no", "parts at new token 3"):  # fmt: skip
        assert part in said


# ---- sampled text


def test_places_are_uniform_where_tokens_come_from_the_target_and_not_otherwise():
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(4000, 12, dtype=torch.float64, generator=generator).log_softmax(-1) for _ in range(2))
    drawn = [torch.multinomial(logs.exp(), 1, generator=generator)[:, 0] for logs in (p, q)]
    gaps = [kolmogorov(places_of(p, q, tokens, generator).tolist()) for tokens in drawn]
    assert gaps[0][1] > 0.01 and gaps[1][1] < 1e-12
    distance = 0.5 * (p.exp() - q.exp()).abs().sum(-1).mean().item()
    assert 0.7 * distance < gaps[1][0] <= distance + 0.03


def test_the_p_value_is_that_of_the_tables():
    """Of Kolmogorov's distribution: 1.36 is exceeded with probability 0.05, 1.63 with 0.01."""
    for scaled, p in ((1.358, 0.05), (1.628, 0.01)):
        count = 400
        gap = scaled / (np.sqrt(count) + 0.12 + 0.11 / np.sqrt(count))
        places = (np.arange(count) + 0.5) / count * (1 - gap + 0.5 / count)
        found = kolmogorov(places.tolist())
        assert found[0] == pytest.approx(gap, abs=2e-3) and found[1] == pytest.approx(p, rel=0.2)


def test_drawn_texts_are_judged_and_calls_that_fail_are_counted(engine, tmp_path):
    """Of five calls one ends its worker and one writes too little; an engine that counts is no target."""
    options = options_of(["--prompts", "1", "--samples", "5", "--seed", "10", "--new-tokens", "6"])
    workload = replace(prepare(options, tmp_path), batches=[[[100]], [[2000]]])

    def launcher(method: Method, draft: str) -> RemoteWorker:
        if method.kind == LOOKUP:
            raise WorkerFailed("no")
        worker = RemoteWorker(engine)
        worker.ask({"load": {"kind": method.kind, "draft": draft}}, 20)
        return worker

    found = draw([Method("ours", PLAIN), Method("ours", LOOKUP)], launcher, workload, options)
    assert found[0]["failed"] == 2 and found[0]["tokens"] == 3 * 6 and "ended with status 3" in found[0]["error"]
    assert found[1] == {"method": "ours lookup", "failed": 5, "error": "no"}


def test_text_of_the_target_is_its_own_and_greedy_text_is_not():
    pair = specdec.load_tiny_pair()
    ids = pair.tokenizer([texts[0] for texts in pair.prompts.values()], return_tensors="pt", padding=True)
    prompts = [row[mask.bool()].tolist() for row, mask in zip(ids.input_ids, ids.attention_mask, strict=True)]
    generator = specdec.SpeculativeGenerator(pair.target, specdec.ModelDrafter(pair.draft, 3))
    for sampling, own in (({"do_sample": True, "temperature": 1.0, "top_k": 0}, True), ({"do_sample": False}, False)):
        out = generator.generate(ids.input_ids, ids.attention_mask, max_new_tokens=24, seed=0, **sampling)
        rows = out.sequences[:, ids.input_ids.shape[1] :]
        texts = [row[:length].tolist() for row, length in zip(rows, out.lengths, strict=True)]
        assert judge(pair.target, surer(pair.draft), prompts, texts)["own"] is own


# ---- the peers' files


def test_rows_of_rotated_projections_are_interleaved_head_by_head():
    rows = np.arange(8)[:, None] * np.ones((1, 2))
    assert interleaved(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_a_gguf_holds_all_weights(tmp_path):
    gguf = pytest.importorskip("gguf", reason="needs gguf, of the extra peers")
    workload = prepare(options_of([]), tmp_path)
    write_gguf(workload.models / "draft", tmp_path / "draft.gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "draft.gguf").tensors}
    weights = workload.load("draft", "float32").state_dict()
    assert np.array_equal(tensors["token_embd.weight"].data, weights["model.embed_tokens.weight"].numpy())
    assert len(tensors) == len([name for name in weights if name != "lm_head.weight"])


@pytest.mark.parametrize(("peer", "module"), [("openvino", "optimum.intel"), ("onnxruntime", "onnxruntime_genai"),
                                              ("llama.cpp", "llama_cpp")])  # fmt: skip
def test_a_peer_writes_the_targets_own_greedy_text(peer, module, tmp_path):
    pytest.importorskip(module, reason="needs the extra peers")
    options = options_of(["--peers", peer])
    workload = prepare(options, tmp_path)
    launcher, pair = Launcher(workload, options), specdec.load_tiny_pair()
    prompt = workload.batches[0][0]
    pair.target.generation_config.eos_token_id = None
    out = specdec.AutoregressiveGenerator(pair.target).generate(torch.tensor([prompt]), max_new_tokens=12)
    for kind in ("plain", "chain", "lookup"):
        worker = launcher(Method(peer, kind))
        answer = worker.ask({"call": {"prompts": [prompt], "new_tokens": 12, "seed": None}}, 60)
        worker.close()
        assert answer["texts"] == [out.sequences[0, len(prompt) :].tolist()]
