"""`specdec report`: every table and figure from result files alone, and two runs compared."""

from dataclasses import replace

import pytest

from specdec.__main__ import main
from specdec.cli.results import make_result, write_result
from specdec.evaluation.methods import OURS, PLAIN
from specdec.evaluation.reporting import agreement, reasons, runs_of, speed_tables
from specdec.evaluation.runs import Run, record_of
from specdec.evaluation.summary import summarise
from specdec.report.stats import RoundStats

OWN = RoundStats(proposed=(3, 3), accepted=(3, 1), emitted=(4, 2), seconds=(0.02,), step_seconds=0.01)
STEPS = RoundStats((0,) * 6, (0,) * 6, (1,) * 6, seconds=(0.01,) * 5)


def evaluation(speed=2.0, prompts=4):
    """Runs whose draft is `speed` times as fast, half of that in batches of 4, at two temperatures."""
    runs = []
    for batch in (1, 4):
        for temperature in (0.0, 1.0):
            for prompt in range(prompts):
                base = Run(OURS, "code", temperature, prompt, 0, 6, "x", 0.1 + 0.01 * prompt, STEPS, model="m",
                           task="t", batch=batch, group=f"code {prompt}")  # fmt: skip
                seconds = base.seconds / (speed if batch == 1 else speed / 4)
                runs += [base, replace(base, method=PLAIN, seconds=3 * base.seconds, rounds=None),
                         replace(base, method="draft", seconds=seconds, rounds=OWN)]  # fmt: skip
    return runs


def saved(path, runs):
    result = make_result("evaluation", {"repeats": 1}, summarise(runs), [record_of(r) for r in runs], notes=["mind"])
    write_result(result, path)
    return path


def test_tables_figures_and_reasons_come_from_the_file(tmp_path, capsys):
    path = saved(tmp_path / "result.json", evaluation())
    assert main(["report", str(tmp_path)]) == 0
    printed, folder = capsys.readouterr().out, tmp_path / "report"
    assert (folder / "report.md").read_text() in printed and str(path) in printed
    assert "- mind" in printed and "vLLM: mean acceptance length" in printed
    assert "2.00 [2.00, 2.00]" in printed and "m, t, batch 4, temperature 1" in printed
    assert "draft (m, t, batch 4, greedy): 0.50x, since rounds alone would give 1.50x" in printed
    assert r"\begin{tabular}" in (folder / "report.tex").read_text()
    names = ("speedup_by_task", "tokens_by_task", "acceptance_conditional", "acceptance_marginal", "ecdf",
             "speedup_by_batch", "tokens_by_budget")  # fmt: skip
    for name in names:
        assert (folder / f"m_{name}.png").read_bytes().startswith(b"\x89PNG") and f"![](m_{name}.png)" in printed


def test_two_runs_are_compared_cell_by_cell(tmp_path, capsys):
    files = [str(saved(tmp_path / f"{n}.json", evaluation(speed))) for n, speed in enumerate((2.0, 2.2))]
    assert main(["report", *files, "--no-figures"]) == 0
    assert "Two runs: 4 of 8 cells" in capsys.readouterr().out  # transformers' are the same, the draft's differ
    title, _, lines = agreement(evaluation(), evaluation())
    assert title.startswith("Two runs: 8 of 8") and "8 of the 8 of all prompts" in title and len(lines) == 8


def test_few_prompts_have_a_value_and_no_interval():
    (_, _, lines), *_ = speed_tables(summarise(evaluation(prompts=2)))
    assert [line[6] for line in lines] == ["1.00", "0.33", "2.00"]
    assert reasons(summarise(evaluation(8.0))) == []


def test_an_audit_is_drawn_with_its_negative_control(tmp_path, capsys):
    test = {"part": "sampled", "prefix": 0, "token": 1, "rows": 300, "variation": 0.02, "detectable": None}
    records = [test | {"p_value": p, "verdict": "passed"} for p in (0.3, 0.8)]
    records.append(test | {"part": "control", "p_value": 0.0, "verdict": "failed"})
    part = {"name": "sampled", "verdict": "passed", "drafted": 9, "level_of_each": 1e-5}
    write_result(make_result("audit", {}, [part], records, verdict="passed"), tmp_path / "a.json")
    assert main(["report", str(tmp_path / "a.json")]) == 0
    printed = capsys.readouterr().out
    assert "Audit: passed" in printed and "| control | 0 | 1 | 300 | 0 |" in printed
    assert (tmp_path / "report/losslessness.png").read_bytes().startswith(b"\x89PNG")


def test_other_results_are_refused(tmp_path, capsys):
    write_result(make_result("serving", {}, [], []), tmp_path / "a.json")
    assert main(["report", str(tmp_path / "a.json")]) == 2
    assert "a result of kind 'serving' has no records of an evaluation" in capsys.readouterr().err
    with pytest.raises(ValueError, match="lacks model, task"):
        runs_of({"kind": "evaluation", "records": [{"of_rounds": None}]})
