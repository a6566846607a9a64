"""Prompts over workers: what one engine does with a batch, and two of Ray's on this machine."""

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest

import specdec
from scripts import generate_with_ray
from scripts.generate_with_ray import EngineWorker

FOLDER = Path(specdec.__file__).parent / "tiny_pair"
PROMPTS = ["def add(a, b):", "import os", "class Point:", "The quick brown", "for i in range("]


@pytest.fixture(scope="module")
def solo():
    """The greedy texts of the target alone."""
    pair = specdec.load_tiny_pair()
    generator = specdec.AutoregressiveGenerator(pair.target)
    found = []
    for prompt in PROMPTS:
        ids = pair.tokenizer(prompt, return_tensors="pt").input_ids
        out = generator.generate(ids, max_new_tokens=12, do_sample=False)
        found.append(out.sequences[0, ids.shape[1] : ids.shape[1] + int(out.lengths[0])].tolist())
    return found


def column(*values):
    made = np.empty(len(values), dtype=object)
    made[:] = values
    return made


def test_a_batch_gets_the_texts_of_its_prompts_and_a_bad_one_its_error_alone(solo):
    worker = EngineWorker(
        str(FOLDER / "target"), f"model:path={FOLDER / 'draft'}", options={"max_new_tokens": 12, "do_sample": False}
    )
    given = {"prompt": column(*PROMPTS, ""), "name": column(*"abcdef"), "seed": np.array([1, 2, 3, 4, 5, np.nan])}
    out = worker(given)
    assert [list(tokens) for tokens in out["tokens"][:5]] == solo and out["name"].tolist() == list("abcdef")
    assert out["error"][:5].tolist() == [None] * 5 and out["reason"][5] == "error" and "prompt" in out["error"][5]
    assert all(out["text"][:5]) and worker.engine.idle


def test_seeds_repeat_a_text_beside_other_prompts():
    worker = EngineWorker(str(FOLDER / "target"), options={"max_new_tokens": 12, "do_sample": True, "temperature": 1.0})
    alone = worker({"prompt": column(PROMPTS[0]), "seed": np.array([7])})
    beside = worker({"prompt": column(PROMPTS[1], PROMPTS[0]), "seed": np.array([3, 7])})
    free = worker({"prompt": column(*PROMPTS[:1] * 4)})
    assert alone["tokens"][0] == beside["tokens"][1]
    assert len({tuple(tokens) for tokens in free["tokens"]}) > 1


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray, the extra `ray`")
def test_two_workers_of_ray_write_the_same_texts(tmp_path, solo, monkeypatch):
    import ray

    root = str(Path(generate_with_ray.__file__).parent.parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]))
    lines = [json.dumps({"prompt": prompt, "number": number}) for number, prompt in enumerate(PROMPTS)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    # reading and writing need a CPU beside those of the workers
    ray.init(num_cpus=4, include_dashboard=False, logging_level="error")
    try:
        generate_with_ray.main([
            str(tmp_path / "prompts.jsonl"), str(tmp_path / "texts"), "--target", str(FOLDER / "target"), "--drafter",
            f"model:path={FOLDER / 'draft'}", "--workers", "2", "--batch", "2", "--max-new-tokens", "12",
        ])  # fmt: skip
    finally:
        ray.shutdown()
    rows = [json.loads(line) for path in (tmp_path / "texts").glob("*.json") for line in path.read_text().splitlines()]
    rows.sort(key=lambda row: row["number"])
    assert [row["tokens"] for row in rows] == solo and all(row["error"] is None for row in rows)


def test_counts_below_one_are_refused():
    with pytest.raises(SystemExit):
        generate_with_ray.main(["in", "out", "--target", "x", "--workers", "0"])
