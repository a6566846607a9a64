"""The Medusa experiment runs from end to end on next to nothing, resumes, and keeps held-out packages out of
training.
"""

import json
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from scripts.bench_medusa import DRAFT, MEDUSA, bars, main
from scripts.common.side_by_side import ALL, OURS, PLAIN, differences, summarise
from scripts.medusa_bench import corpus as medusa_corpus
from scripts.medusa_bench import models as medusa_models
from scripts.medusa_bench.corpus import HELD_OUT, within

torch.set_num_threads(1)

PACKAGES = {
    "rich": "asyncio",
    "email": "email",
    "logging": "logging",
    "other/_vendor/rich": "json",
}  # name there: what it is copied from
MARK = "unmistakable_marigold"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A folder of packages, one of them held out and vendored by another, and a small standard library."""
    stdlib, folder = Path(sysconfig.get_paths()["stdlib"]), tmp_path_factory.mktemp("sources")
    for name, origin in PACKAGES.items():
        (folder / "packages" / name).mkdir(parents=True)
        for file in (stdlib / origin).glob("*.py"):
            (folder / "packages" / name / file.name).write_text(
                file.read_text() + (f"\n{MARK} = 1\n" if name.endswith("rich") else "")
            )
    (folder / "stdlib").mkdir()
    for name in ("argparse.py", "abc.py", "ast.py"):
        (folder / "stdlib" / name).write_text((stdlib / name).read_text())
    return folder


def arguments(sources, output, *more):
    return [
        "--output",
        str(output),
        "--packages",
        str(sources / "packages"),
        "--stdlib",
        str(sources / "stdlib"),
        "--preset",
        "smoke",
        "--device",
        "cpu",
        *more,
    ]


def test_it_runs_resumes_and_writes_what_it_measured(sources, tmp_path, monkeypatch):
    main(arguments(sources, tmp_path, "--json", str(tmp_path / "made" / "first.json")))
    result = json.loads((tmp_path / "made" / "first.json").read_text())
    corpus, kinds = result["corpus"], list(result["corpus"]["prompts"])
    assert corpus["held_out_packages"] == ["rich"] and sorted(kinds + corpus["kinds_left_out"]) == [
        "code",
        "data",
        "editing",
        "prose",
    ]
    assert all(source.startswith("rich/") for sources_of in corpus["prompts"].values() for source in sources_of)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "target")
    assert MARK not in tokenizer.decode(np.load(tmp_path / "train.npy").tolist()) and MARK in tokenizer.decode(
        np.load(tmp_path / "held_out.npy").tolist()
    )
    chosen = json.loads((tmp_path / "prompts.json").read_text())
    files = [
        {entry["source"] for entries in chosen[part].values() for entry in entries}
        for part in ("evaluation", "calibration")
    ]
    assert all(files) and not files[0] & files[1]

    assert (
        result["target"]["log"][-1]["loss"] < result["target"]["log"][0]["loss"]
        and len(result["calibration"]["accuracies"]) == 5
    )
    assert [len(shares) for shares in result["heads"]["accuracies"].values()] == [5, 5, 5]
    assert result["complete"] and {
        (row["batch"], row["temperature"], row["kind"], row["method"]) for row in result["rows"]
    } == {
        (batch, temperature, kind, method)
        for temperature in (0.0, 0.7)
        for kind in (*kinds, ALL)
        for batch, methods in ((1, (PLAIN, OURS, MEDUSA, DRAFT)), (2, (OURS, MEDUSA, DRAFT)))
        for method in methods
    }
    for row in result["rows"]:
        assert row["method"] != OURS or row["tokens_per_round"] == 1 and row["over_ours"]["pooled"] == 1
        assert (
            row["tokens_per_second"] > 0
            and row["repeats"] == 1
            and (row["over_transformers"] is None) == (row["batch"] == 2)
        )
    for pair in result["differences"]:  # in float32 on a CPU nothing may differ
        assert pair["identical"] == pair["texts"] == 2 * len(kinds) and pair["first_differences"] == []
    assert len(result["bars"]) == 4 and set(result["seconds"]) == {
        "corpus",
        "target",
        "heads",
        "draft",
        "calibration",
        "evaluation",
    }

    monkeypatch.setattr(medusa_corpus, "load_corpus", None)  # nothing that is done is done again
    for name in ("train", "train_medusa", "measure_costs"):
        monkeypatch.setattr(medusa_models, name, None)
    runs = (tmp_path / "runs-eager.jsonl").read_text()
    (tmp_path / "runs-eager.jsonl").write_text(runs + runs[: len(runs) // 40])  # killed in the middle of a line
    main(arguments(sources, tmp_path, "--repeats", "2"))
    again = json.loads((tmp_path / "result-eager.json").read_text())
    assert (tmp_path / "runs-eager.jsonl").read_text().startswith(runs) and {
        row["repeats"] for row in again["rows"]
    } == {2}
    assert again["heads"] == result["heads"] and {len(record["seconds"]) for record in again["prompts"]} == {2}
    main(arguments(sources, tmp_path, "--repeats", "3", "--seconds", "0"))
    assert not json.loads((tmp_path / "result-eager.json").read_text())["complete"]
    with pytest.raises(ValueError, match="other settings"):
        main(arguments(sources, tmp_path, "--prompts", "1"))


def test_without_a_package_to_hold_out_it_says_which_it_looked_for(sources, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{sources}.*{HELD_OUT[0]}"):
        main(["--output", str(tmp_path), "--packages", str(sources / "stdlib"), "--preset", "smoke", "--device", "cpu"])


def test_texts_are_counted_up_to_the_size():
    assert [within(["ab", "cé", "e"], size) for size in (0, 1, 2, 4, 5, 6)] == [0, 0, 1, 1, 2, 3]


def run_of(method, prompt, tokens, seconds, repeat=0):
    rounds = {"proposed": (2,), "accepted": (1,), "emitted": (len(tokens),), "seconds": (seconds,), "step_seconds": 1.0}
    return {
        "method": method,
        "temperature": 0.0,
        "kind": "code",
        "prompt": prompt,
        "repeat": repeat,
        "new_tokens": [tokens],
        "seconds": seconds,
        "stats": None if method == PLAIN else rounds,
    }


def test_the_pass_of_median_time_counts_and_speeds_are_pooled():
    runs = [run_of(MEDUSA, 0, [1, 2, 3, 4], seconds, i) for i, seconds in enumerate((9.0, 1.0, 2.0))]
    runs += [run_of(OURS, 0, [1, 2, 3, 4], 4.0), run_of(PLAIN, 0, [1, 2, 3, 4], 5.0)]
    runs += [run_of(MEDUSA, 1, [1, 2], 2.0), run_of(OURS, 1, [1, 2], 6.0), run_of(PLAIN, 1, [1, 2], 8.0)]
    rows = summarise(runs, (PLAIN, OURS, MEDUSA), (0.0,), ("code",))
    row = next(row for row in rows if row["method"] == MEDUSA and row["kind"] == ALL)
    assert row["tokens_per_second"] == 1.5 and row["tokens_per_round"] == 3 and row["overhead"] == 2
    assert row["over_ours"]["pooled"] == pytest.approx(2.5) and row["over_transformers"]["pooled"] == pytest.approx(
        3.25
    )
    assert row["over_ours"]["median"] == pytest.approx(2.5) and row["repeats"] == 1 and row["calls"] == 2
    assert [bar["met"] for bar in bars(rows)] == [True, True, True] and [
        bar["value"] for bar in bars(rows)
    ] == pytest.approx([3.0, 2.5, 3.25])


def test_a_difference_is_shown_where_it_begins_with_the_margin_there():
    seen = []

    def model(tokens):
        seen.append(tokens.tolist())
        return SimpleNamespace(logits=torch.tensor([[[0.0, 0.0, 0.0], [1.0, 3.0, 2.5]]]))

    model.device = torch.device("cpu")
    tokenizer = lambda text: SimpleNamespace(input_ids=[7, 8])
    runs = [
        run_of(OURS, 0, [5, 1, 0], 1.0),
        run_of(PLAIN, 0, [5, 2, 0], 1.0),
        run_of(OURS, 1, [3], 1.0),
        run_of(PLAIN, 1, [3], 1.0),
    ]
    (found,) = differences(model, tokenizer, runs, {"code": ["a", "b"]}, [(OURS, PLAIN)])
    assert seen == [[[7, 8, 5]]] and found["texts"] == 2 and found["identical"] == 1
    (first,) = found["first_differences"]
    assert (first["prompt"], first["position"], first["margin"], first["best_two"]) == (0, 1, 0.5, [1, 2])
    assert first["sides"] == [{"token": 1, "logit": 3.0}, {"token": 2, "logit": 2.5}]
