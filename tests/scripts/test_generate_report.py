"""The generation benchmark's differences, bars and tables, from rows alone."""

from functools import partial

import pytest

import specdec
from scripts.generate_bench.audit import compare, explain
from scripts.generate_bench.bars import bars, predicted
from scripts.generate_bench.models import load, prompts, unpadded
from scripts.generate_bench.options import options_of
from scripts.generate_bench.peers import ASSISTED, EAGER, STATIC
from scripts.generate_bench.report import bar_table, report
from scripts.generate_bench.rounds import PARTS
from tests.scripts.test_bench_generate import TOY


@pytest.fixture(scope="module")
def toy():
    options = options_of(TOY)
    return options, load(options)


def test_differences_are_found_and_explained(toy):
    options, models = toy
    tokens = (
        specdec.AutoregressiveGenerator(models.target)
        .generate(prompts(models, options, 2)[0], max_new_tokens=18)
        .sequences[:, 12:]
        .tolist()
    )
    changed = [tokens[0], [*tokens[1][:7], (tokens[1][7] + 1) % 512, *tokens[1][8:]]]
    rows = [
        {"method": "autoregressive-eager", "batch": 2, "tokens": tokens},
        {"method": "chain-graph", "batch": 2, "tokens": changed},
        {"method": "tree-graph", "batch": 8, "tokens": tokens},
        {"method": "costs-graph", "batch": 2},
    ]
    (entry,) = compare(rows)
    assert (entry["method"], entry["reference"], entry["texts"], entry["identical"]) == (
        "chain-graph",
        "autoregressive-eager",
        2,
        1,
    )
    assert entry["differences"] == [{"row": 1, "position": 7, "tokens": [changed[1][7], tokens[1][7]]}]
    (explained,) = explain(models.target, partial(unpadded, models, options), [entry], {"2": tokens})
    (one,) = explained["differences"]
    assert (
        not one["near_tie"]
        and one["behind"][1] == (0, 0)
        and min(one["behind"][0]) > 2 * one["noise"]
        and min(one["margins"]) > 0
    )


H200 = vars(options_of(["--device", "cuda"]))


def made_up(speed=1.0):
    ours = lambda method, batch, tokens, **more: {
        "method": method,
        "batch": batch,
        "tokens_per_second": tokens,
        "round_seconds": 0.005,
        "note": None,
        "parts": dict.fromkeys([*PARTS, "whole"], 0.001) | {"host": 0.0001},
        "range": [tokens, tokens],
        "first_token_seconds": 0.02,
        "peak_bytes": 2**34,
        "capture_seconds": 0.4,
        "graph_bytes": 300_000_000,
        "tokens_per_round": 6.0,
        **more,
    }
    theirs = lambda method, tokens: {
        "method": method,
        "batch": 1,
        "tokens_per_second": tokens,
        "range": [tokens, tokens],
        "first_token_seconds": 0.02,
        "peak_bytes": 2**34,
    }
    costs = lambda batch: {
        "method": "costs-graph",
        "batch": batch,
        "draft_seconds": 0.0005,
        "forward_seconds": {"1": 0.004, "6": 0.0042, "tree 64": 0.0045},
    }
    return [
        theirs(EAGER, 40.0),
        theirs(STATIC, 140.0),
        theirs(ASSISTED, 110.0),
        ours("autoregressive-graph", 1, 230.0 * speed),
        ours("autoregressive-compile", 1, 240.0 * speed, round_seconds=0.004),
        ours("chain-graph", 1, 800.0 * speed),
        ours("medusa-graph", 1, 200.0, round_seconds=0.0048),
        *(ours("autoregressive-graph", batch, 1000.0) for batch in (8, 32)),
        *(ours("chain-graph", batch, 3000.0) for batch in (8, 32)),
        *map(costs, (1, 8, 32)),
    ]


def test_bars_are_judged_as_asked():
    parted = {"row": 0, "position": 3, "tokens": [1, 2], "near_tie": True}
    compared = [
        {
            "method": "chain-graph",
            "batch": 1,
            "reference": "autoregressive-eager",
            "texts": 4,
            "identical": 3,
            "differences": [parted],
        }
    ]
    judged = {bar["what"]: bar for bar in bars(made_up(), compared, H200)}
    values = [bar["value"] for bar in judged.values()]
    chains = 3000 / (6 / (5 * 0.125 + 1.05) * 1000)
    assert values == pytest.approx(
        [240, 6, 240 / 140, 800, 800 / 110, 0.025, 1.05, 1.125, 1.2, chains, chains, 0.4, 0.9, 1.0, None],
        abs=1e-9,
        nan_ok=True,
    )
    assert predicted(made_up(), 8, 5) == pytest.approx(6 / (5 * 0.125 + 1.05) * 1000)
    verdicts = [bar["met"] for bar in judged.values()]
    assert verdicts == [True] * 14 + [None] and "not measured" in bar_table(list(judged.values()))

    slow = bars(made_up(speed=0.9), [compared[0] | {"differences": [parted | {"near_tie": False}]}], H200)
    assert (
        [bar["met"] for bar in slow[:5]] == [False, True, True, False, True]
        and slow[13]["met"] is False
        and "NOT MET" in bar_table(slow)
    )
    for other in ({"shape": "toy"}, {"device": "cpu"}, {"dtype": "float32"}, {"acceptance": 0.5}, {"prompt": 64}):
        assert all(bar["met"] is None for bar in bars(made_up(), compared, H200 | other)[:13])
    exact = bars(made_up(), compared, H200 | {"dtype": "float32"})[13]
    assert exact["value"] == 0.75 and exact["met"] is False  # in float32 a near-tie is no excuse
    assert (
        bars(made_up(), compared, H200 | {"weights": "counting"})[13]["met"] is None
        and bars(made_up(), [], H200 | {"weights": "counting"})[0]["met"]
    )
    assert all(bar["value"] is None and bar["met"] is None for bar in bars([], [], H200))


def test_a_long_run_must_not_grow():
    grown = lambda more: {
        "method": "long-run-graph",
        "batch": 1,
        "rounds": 10_000,
        "before": {"allocated": 0},
        "after": {"allocated": more},
    }
    assert [bars([grown(more)], [], H200)[-1]["met"] for more in (0, 2**21)] == [True, False]


def test_the_report_shows_controls_failures_and_differences():
    parted = [
        {"row": row, "position": 3, "tokens": [1, 2], "margins": [0.0, 0.03], "noise": 0.02, "near_tie": True}
        for row in range(5)
    ]
    compared = [
        {
            "method": "chain-graph",
            "batch": 1,
            "reference": "autoregressive-eager",
            "texts": 8,
            "identical": 3,
            "differences": parted,
        },
        {
            "method": EAGER,
            "batch": 1,
            "reference": "autoregressive-eager",
            "texts": 1,
            "identical": 1,
            "differences": [],
        },
    ]
    rows = [*made_up(), {"method": "tree-graph", "batch": 32, "error": "OutOfMemoryError: no"}]
    rows[5] |= {"note": "exact 2-layer draft", "host_rounds": "not all pages could be taken"}
    result = {
        "rows": rows,
        "settings": H200,
        "note": "Synthetic control",
        "skipped": ["lookup-graph"],
        "audit": compared,
    }
    text = report(result | {"bars": bars(rows, compared, H200)}, bars=True)
    for part in (
        "chain-graph (exact 2-layer draft)",
        "not measured: tree-graph, batch 32: OutOfMemoryError: no",
        "skipped, the time was up: lookup-graph",
        "3 of 8 greedy texts",
        "a near-tie",
        "and 2 more, 2 of them near-ties",
        "rounds through the host: chain-graph, batch 1: not all pages",
        f"all greedy texts as autoregressive-eager: {EAGER}, batch 1",
        "roofline: not measured",
    ):
        assert part in text, part
