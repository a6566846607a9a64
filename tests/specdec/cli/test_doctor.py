"""`specdec doctor`: measures, predicts, writes the prediction, then compares; and draws again from its file."""

import pytest

from specdec.__main__ import main
from specdec.cli import doctor
from specdec.cli.results import read_result

SIZES = ("--batch", "1", "2", "--max-new-tokens", "6", "--limit", "4", "--device", "cpu", "--mode", "eager")


def examined(folders, tmp_path, *more):
    places = ("--json", str(tmp_path / "d.json"), "--plot", str(tmp_path / "d.png"))
    models = ("--target", str(folders / "target"), "--drafter", str(folders / "draft"))
    return main(["doctor", *models, *places, *SIZES, *more])


def test_a_prediction_is_written_before_whole_calls_are_compared(folders, tmp_path, capsys, monkeypatch):
    there = []
    check = doctor._check
    monkeypatch.setattr(
        doctor, "_check", lambda *given: there.append(read_result(tmp_path / "d.json")) or check(*given)
    )
    monkeypatch.setattr("specdec.evaluation.doctor.FORWARDS", (1, 4))
    assert examined(folders, tmp_path, "--check", "--repeats", "1") == 0
    printed, result = capsys.readouterr().out, read_result(tmp_path / "d.json")
    assert len(there) == 1 and there[0]["check"] == [] and there[0]["diagnosis"] == result["diagnosis"]
    shapes = {row["name"] for row in result["methods"]}
    assert {"own", "chain 1", "chain 3", "chain 8"} <= shapes and "chain 5" not in shapes, "its own is a chain of 5"
    assert {row["batch"] for row in result["methods"]} == {1, 2}
    assert {(row["name"], row["batch"]) for row in result["check"]} >= {("own", 1), ("own", 2)}
    for row in result["check"]:
        assert row["off"] == pytest.approx(row["predicted"] / row["speedup"] - 1)
    for part in ("Costs of forwards", "Acceptance by position", "batch 1: ", "product", "beside whole calls"):
        assert part in printed
    (tmp_path / "d.png").unlink()
    again = ("--from", str(tmp_path / "d.json"), "--plot", str(tmp_path / "again.png"))
    assert main(["doctor", *again]) == 0
    assert capsys.readouterr().out.split("plot:")[0] == printed.split("plot:")[0]
    assert (tmp_path / "again.png").read_bytes().startswith(b"\x89PNG")
    assert main(["report", str(tmp_path / "d.json")]) == 0
    reported, pictures = capsys.readouterr().out, {path.name for path in (tmp_path / "report").glob("*.png")}
    assert pictures >= {"doctor.png", "prediction.png"} and "![](prediction.png)" in reported
    assert "### Costs of forwards" in reported and "- batch 1: " in reported


@pytest.mark.parametrize(
    ("more", "said"),
    [(("--batch", "0"), "--batch must be at least 1"), (("--limit", "1"), "--limit at least 2"),
     (("--from", "x.json"), "x.json")],
)  # fmt: skip
def test_bad_input_is_one_line(folders, tmp_path, capsys, more, said):
    assert examined(folders, tmp_path, *more) == 2
    assert said in capsys.readouterr().err
