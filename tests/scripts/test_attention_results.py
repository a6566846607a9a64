"""The attention benchmark's saved results, its command line, its timing and the kernels' resources."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scripts import bench_attention, bench_table, kernel_resources
from scripts.attention_bench import cases as attention_cases
from scripts.attention_bench.bench import bar
from scripts.common import gpu_timing
from tests.scripts.test_bench_attention import CASES, CPU, LIMITS, PEERS, bench


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    file = tmp_path_factory.mktemp("bench") / "results" / "toy.json"
    arguments = ["--no-kernels", "--json", str(file), *(f"--case={name}" for name in CASES)]
    if torch.cuda.is_available():
        pytest.skip("toy sizes run where there is no GPU")
    bench_attention.main(arguments)
    return file


def test_the_result_has_one_schema(saved):
    results = json.loads(saved.read_text())
    assert set(results) == {
        "schema",
        "created",
        "device",
        "versions",
        "git_sha",
        "settings",
        "ceilings",
        "peers",
        "records",
        "kernels",
        "wall_seconds",
    }
    assert (
        results["schema"] == 1
        and results["versions"]["torch"] == torch.__version__
        and set(results["peers"]) == set(PEERS)
    )
    assert {record["case"] for record in results["records"]} == set(CASES)
    for record in results["records"]:
        assert {"case", "label", "ours", "peers", "bytes", "flops", "limit_seconds", "limited_by", "bars"} <= set(
            record
        )
        assert record["ours"]["seconds"] > 0 and record["ours"]["error"] < 8e-2 and record["ours"]["fraction"] > 0
        assert all(set(b) == {"what", "value", "limit", "at_most", "met"} for b in record["bars"])


def test_the_table_redraws_from_the_json_and_names_the_absent(saved, capsys):
    bench_table.main([str(saved), "--rows", "--bars"])
    out = capsys.readouterr().out
    assert all(f"absent: {name}: " in out for name in PEERS)
    assert "tree     time over FA3 causal" in out and "5 nodes, B 2, context 70, page 16" in out


def test_every_case_has_a_name_on_the_command_line(capsys):
    assert {"decode", "verify", "tree", "prefill", "write", "mixed", "quant", "shapes"} == set(bench_attention.CASES)
    with pytest.raises(SystemExit):
        bench_attention.main(["--case", "nothing"])
    assert "invalid choice: 'nothing'" in capsys.readouterr().err


def test_a_case_that_breaks_is_a_row_and_the_next_one_runs(monkeypatch):
    def broken(_):
        yield {"case": "decode", "label": "first"}
        raise RuntimeError("no memory")

    monkeypatch.setitem(bench_attention.CASES, "decode", broken)
    monkeypatch.setitem(bench_attention.CASES, "tree", lambda _: [{"case": "tree", "label": "x"}])
    rows = list(bench_attention.run_cases(bench(), ["decode", "tree"]))
    assert [row["label"] for row in rows] == ["first", "the rest of this case", "x"]
    assert "failed (RuntimeError: no memory)" in bench_table.row_line(rows[1])


def test_the_summary_counts_and_names_the_worst():
    def row(label, value):
        return {"case": "tree", "label": label, "bars": [bar("ratio", value, 1.25)]}

    assert bench_table.summary([row("a", 1.2), row("b", 1.5), row("c", None)]) == [
        f"tree     {'ratio':62} <= 1.25   1/3  met, worst 1.5 (b), 1 unknown"
    ]


def test_copies_outgrow_the_cache():
    assert gpu_timing.copies_beyond_cache(1 << 30, 60 << 20) == 1
    assert gpu_timing.copies_beyond_cache(32 << 20, 60 << 20) == 6
    assert gpu_timing.copies_beyond_cache(1, 60 << 20) == gpu_timing.COPIES
    assert gpu_timing.copies_beyond_cache(1, 0) == 1 and gpu_timing.cache_bytes(CPU) == 0


def test_a_timing_is_a_median_a_call():
    timing = gpu_timing._summary([3.0, 1.0, 2.0], calls=2)
    assert timing.seconds == 1.0 and timing.spread == pytest.approx(0.4) and timing.replays == 3
    called = []
    assert gpu_timing.time_on_cpu(lambda i: called.append(i) or i, 3)[1] == [0, 1, 2] == called


def test_ceilings_are_rates():
    assert set(gpu_timing.ceilings(CPU, megabytes=1, size=32)) == set(LIMITS)


@pytest.mark.gpu
def test_graph_timing_returns_what_the_last_replay_wrote():
    x = torch.randn(8, 1024, device="cuda")
    timing, outputs = gpu_timing.time_graph(lambda i: x[i % 8] * 2, 10)
    assert timing.calls == 10 and 0 < timing.seconds < 1e-3
    assert all(torch.equal(out, x[i % 8] * 2) for i, out in enumerate(outputs))
    kept = torch.zeros(4, device="cuda")
    _, (out, *_) = gpu_timing.time_graph(lambda i: (x * 2, kept)[1], 1)
    assert bool(out.isnan().all())  # nothing wrote it: the poison stays


def test_registers_are_read_without_a_gpu():
    """In a process of its own: kernels that were defined for the interpreter cannot be compiled."""
    pytest.importorskip("triton")
    labels = [f"paged decode, {kind}" for kind in ("D 128", "D 512", "20 heads over latents")]
    labels += ["commit", "flash, D 64"]
    code = f"import json; from scripts.kernel_resources import collect; print(json.dumps(collect({labels})))"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2]
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found, failed = json.loads(run.stdout)
    rows = [kernel_resources.Resources(*row) for row in found]
    assert not failed and {row.label for row in rows} == set(labels)
    assert all(8 <= row.registers <= 255 and row.warps >= 1 and row.shared <= 227 * 1024 for row in rows)


def test_resources_need_compiled_kernels(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"), kernel_resources.compile_only(90):
        pass
    found, failed = kernel_resources.collect(["commit"])
    assert not found and "TRITON_INTERPRET" in failed["commit"]
    assert any("commit: not read" in line for line in bench_table.kernel_lines({"kernels": [], "not_read": failed}))


def test_the_default_page_is_the_librarys():
    assert attention_cases.TOKEN_MULTIPLE % attention_cases.DEFAULT_PAGE_SIZE == 0
