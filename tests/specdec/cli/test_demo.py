"""`specdec demo`: every method on every kind of prompt, a table, a plot and a result."""

import json

import pytest

from specdec.__main__ import main
from specdec.cli.results import SCHEMA, read_result
from specdec.drafters import PromptLookupDrafter

pytestmark = pytest.mark.scripts

METHODS = {"transformers generate", "transformers assisted", "specdec autoregressive", "specdec speculative", "lookup"}
KINDS = {"code", "prose", "data", "editing", "all"}
FIELDS = {"name", "kind", "temperature", "tokens_per_second", "tokens_per_round", "acceptance_rate", "overhead",
          "speedup", "identical"}  # fmt: skip


def lookup_drafter(target):
    """One more method for the demo below."""
    assert target.model is not None
    return PromptLookupDrafter()


@pytest.mark.parametrize(
    "option",
    ["--prompts=0", "--prompts=9", "--max-new-tokens=1", "--max-new-tokens=513", "--num-tokens=0", "--num-tokens=17"],
)
def test_the_demo_names_an_option_out_of_range(capsys, option):
    assert main(["demo", option]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    name, value = option.split("=")
    assert line.startswith("error: ") and name in line and line.endswith(f"got {value}")


@pytest.mark.parametrize(
    "place", ["x", "x=nowhere.to_be_found:f", "x=specdec:no_such_function", "specdec speculative=lookup"]
)
def test_the_demo_names_a_drafter_that_is_none(capsys, place):
    assert main(["demo", "--drafter", place]) == 2
    assert place.partition("=")[2] in capsys.readouterr().err


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """What the demo printed, line by line, and the plot it wrote."""
    plot = tmp_path_factory.mktemp("demo") / "plot.png"
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda *values, **_: printed.append(" ".join(map(str, values))))
        more = ["--drafter", f"lookup={__name__}:lookup_drafter"]
        assert (
            main(["demo", "--prompts", "1", "--max-new-tokens", "8", "--num-tokens", "3", "--plot", str(plot), *more])
            == 0
        )
    return "\n".join(printed).split("\n"), plot


def rows_of(demo):
    return json.loads(demo[0][-1])["methods"]


def test_with_a_file_the_json_goes_there(tmp_path, capsys):
    small = ("--prompts", "1", "--max-new-tokens", "8", "--plot", str(tmp_path / "p.png"))
    assert main(["demo", *small, "--json", str(tmp_path / "demo.json")]) == 0
    assert not any(line.startswith("{") for line in capsys.readouterr().out.splitlines())
    assert read_result(tmp_path / "demo.json")["kind"] == "demo"


def test_the_demo_ends_with_a_line_of_json_for_every_method_kind_and_temperature(demo):
    found = json.loads(demo[0][-1])
    assert found["schema"] == SCHEMA and found["kind"] == "demo" and found["pooled_speedup_over"]
    assert all(cost > 0 for cost in found["costs"].values())
    assert len(found["records"]) == 5 * 4 * 2
    keys = [(row["name"], row["kind"], row["temperature"]) for row in found["methods"]]
    assert len(keys) == 5 * 5 * 2 and set(keys) == {(m, k, t) for m in METHODS for k in KINDS for t in (0, 1)}
    assert all(set(row) >= FIELDS for row in found["methods"])


def test_the_demo_finds_every_greedy_output_identical_and_claims_nothing_about_samples(demo):
    assert [row["identical"] for row in rows_of(demo)] == [
        True if row["temperature"] == 0 else None for row in rows_of(demo)
    ]


def test_the_demos_baseline_is_our_own_autoregressive_decoding(demo):
    baseline = [row for row in rows_of(demo) if row["name"] == "specdec autoregressive"]
    assert (
        {row["speedup"] for row in baseline}
        == {row["overhead"] for row in baseline}
        == {row["tokens_per_round"] for row in baseline}
        == {1}
    )
    assert {row["acceptance_rate"] for row in baseline} == {None}


def test_the_demos_numbers_are_possible(demo):
    for row in rows_of(demo):
        assert row["tokens_per_second"] > 0 and row["speedup"] > 0
        if row["name"].startswith("transformers"):
            assert row["tokens_per_round"] is row["acceptance_rate"] is row["overhead"] is None
        elif row["name"] == "specdec speculative":
            assert 1 <= row["tokens_per_round"] <= 4 and 0 <= row["acceptance_rate"] <= 1 and row["overhead"] > 0


def test_the_demo_prints_its_text_and_table_and_draws_its_plot(demo):
    lines, plot = demo
    text = "\n".join(lines)
    assert "\x1b" not in text and text.count("tokens written by the draft") == 2 and f"plot: {plot}" in lines
    header = next(i for i, line in enumerate(lines) if line.startswith("method "))
    table = lines[header : header + 2 + 5 * 5 * 2]
    assert table[0].endswith("identical to target greedy") and set(table[1]) <= set("- ")
    assert [line.split("  ")[0] for line in table[2:]] == [row["name"] for row in rows_of(demo)]
    assert [line.split()[-1] for line in table[2:]] == ["yes"] * 25 + ["-"] * 25
    assert plot.read_bytes().startswith(b"\x89PNG") and plot.stat().st_size > 10_000
