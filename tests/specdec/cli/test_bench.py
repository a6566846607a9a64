"""`specdec bench`: one table and one verdict a drafter, a result that prints again, prompts of every kind of file."""

import pytest

from specdec.__main__ import main
from specdec.cli.results import SCHEMA, read_result, write_result
from specdec.evaluation.methods import OURS, PLAIN
from specdec.evaluation.summary import expected_speedup
from specdec.planning.costs import Costs
from specdec.report.stats import RoundStats


@pytest.fixture(scope="module")
def bench(folders, tmp_path_factory):
    """The result of a small run, with what it printed."""
    base = tmp_path_factory.mktemp("bench")
    (base / "prompts.jsonl").write_text(
        '{"prompt": "def add(a, b):", "kind": "code"}\n{"messages": [{"role": "user", "content": "Hi"}]}\n'
    )
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", lambda *values, **_: printed.append(" ".join(map(str, values))))
        drafters = ("--drafter", str(folders / "draft"), "--drafter", "lookup:length=3")
        files = (
            "--prompts",
            str(base / "prompts.jsonl"),
            "--plot",
            str(base / "p.png"),
            "--json",
            str(base / "r.json"),
        )
        sizes = ("--max-new-tokens", "8", "--repeats", "2", "--temperature", "0", "1", "--device", "cpu")
        assert main(["bench", "--target", str(folders / "target"), *drafters, *files, *sizes]) == 0
    return base, "\n".join(printed)


def test_methods_kinds_and_temperatures_are_all_there(bench):
    result = read_result(bench[0] / "r.json")
    assert result["schema"] == SCHEMA and result["kind"] == "bench" and result["settings"]["repeats"] == 2
    found = {(row["name"], row["kind"], row["temperature"]) for row in result["methods"]}
    names = {PLAIN, OURS, "draft", "draft in transformers", "lookup:length=3", "lookup:length=3 in transformers"}
    assert found == {(name, kind, t) for name in names for kind in ("code", "own", "all") for t in (0.0, 1.0)}
    assert len(result["records"]) == len(names) * 2 * 2 * 2  # prompts, temperatures, repeats
    assert all(record["seconds"] > 0 and record["new_tokens"] <= 8 for record in result["records"])
    for row in result["methods"]:
        assert row["identical"] is (None if row["temperature"] else True), row
        assert (row["tokens_per_round"] is None) == ("transformers" in row["name"])
        assert ("expected_speedup" in row) == (row["name"] in ("draft", "lookup:length=3"))
    plain = [row for row in result["methods"] if row["name"] == PLAIN]
    assert {row["speedup"] for row in plain} == {1.0}


def test_a_verdict_a_drafter_and_temperature(bench):
    result = read_result(bench[0] / "r.json")
    assert len(result["verdicts"]) == 4
    for said in result["verdicts"]:
        assert said in bench[1] and any(f": {word}. " in said for word in ("worth it", "not worth it", "undecided"))
    assert (bench[0] / "p.png").read_bytes().startswith(b"\x89PNG")


def test_definitions_of_other_projects_are_printed_on_request(bench, tmp_path, capsys):
    result = read_result(bench[0] / "r.json")
    assert set(result["definitions"]) == {
        f"{name}, temperature {t}" for name in ("draft", "lookup:length=3") for t in "01"
    }
    again = ("--from", str(bench[0] / "r.json"), "--plot", str(tmp_path / "p.png"))
    assert main(["bench", *again, "--definitions"]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("draft, temperature 1", "mean acceptance length", "spec_accept_length"))
    assert "spec_accept_length" not in bench[1]


def test_a_result_prints_and_draws_again(bench, tmp_path, capsys):
    base, printed = bench
    assert main(["bench", "--from", str(base / "r.json"), "--plot", str(tmp_path / "again.png")]) == 0
    again = capsys.readouterr().out
    assert printed.split("plot:")[0] == again.split("plot:")[0]
    assert (tmp_path / "again.png").read_bytes() == (base / "p.png").read_bytes()


def test_what_the_parts_of_a_round_allow():
    """Two tokens a round; three drafted tokens cost 3 x 0.1 to draft, and 1.3 steps to verify with the root."""
    stats = RoundStats((3, 3), (1, 1), (2, 2), (), depths=(3, 3))
    assert expected_speedup(stats, Costs(0.01, 0.1, (1, 4), (1.0, 1.3))) == pytest.approx(2 / 1.6)
    assert expected_speedup(RoundStats((), (), (), ()), Costs(0.01, 0.1, (1, 4), (1.0, 1.3))) is None


def test_results_of_another_schema_are_refused(tmp_path):
    for text, said in (("[1]", "must be of schema"), ('{"schema": "other 9"}', "got 'other 9'"), ("{", "is no JSON")):
        (tmp_path / "r.json").write_text(text)
        with pytest.raises(ValueError, match=said):
            read_result(tmp_path / "r.json")
    with pytest.raises(ValueError, match="lacks kind, created"):
        write_result({"schema": SCHEMA}, tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()
