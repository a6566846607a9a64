"""What tasks of lm-evaluation-harness ask for: equal texts with and without drafts, log-likelihoods of the target."""

import json

import pytest
import torch

import specdec
from specdec.evaluation.lm_eval_model import Answers, lm_eval_model

GREEDY = {"until": ["\n\n", "def "], "max_gen_toks": 12, "do_sample": False, "temperature": 0.0}


@pytest.fixture(scope="module")
def pair():
    return specdec.load_tiny_pair()


@pytest.fixture(scope="module")
def generators(pair):
    plain = specdec.AutoregressiveGenerator(pair.target, mode="eager")
    return plain, specdec.SpeculativeGenerator(plain.target, specdec.ModelDrafter(pair.draft, 3))


def test_texts_are_the_same_with_drafts_in_batches_and_end_at_stop_strings(pair, generators):
    plain, drafting = generators
    asked = [(texts[0][:80], GREEDY) for texts in pair.prompts.values()]
    asked[1] = (asked[1][0], GREEDY | {"until": [], "max_gen_toks": 5})
    found = Answers(plain, pair.tokenizer).texts(asked)
    assert found == Answers(drafting, pair.tokenizer, batch=3).texts(asked)
    assert not any(stop in text for text in (found[0], *found[2:]) for stop in GREEDY["until"])
    ids = pair.tokenizer(asked[1][0], return_tensors="pt").input_ids
    theirs = pair.target.generate(ids, do_sample=False, max_new_tokens=5)[0, ids.shape[1] :]
    assert found[1] == pair.tokenizer.decode(theirs, skip_special_tokens=True)


def test_log_likelihoods_are_the_targets_whatever_the_batch(pair, generators):
    pairs = [([5, 6, 7], [8, 9]), ([11], [12]), ([5, 6, 7, 8, 9, 10], [11, 12, 13])]
    found = Answers(generators[0], pair.tokenizer, batch=3).log_likelihoods(pairs)
    for (context, new), (score, greedy) in zip(pairs, found, strict=True):
        with torch.inference_mode():
            logits = pair.target(torch.tensor([context + new])).logits[0, len(context) - 1 : -1]
        logs = logits.log_softmax(-1)
        assert score == pytest.approx(sum(float(logs[i, token]) for i, token in enumerate(new)), abs=1e-4)
        assert greedy == (logits.argmax(-1).tolist() == new)
    best = [int(pair.target(torch.tensor([[5, 6, 7]])).logits[0, -1].argmax())]
    assert Answers(generators[0], pair.tokenizer).log_likelihoods([([5, 6, 7], best)])[0][1]


def test_a_limit_that_leaves_no_room_is_named(pair, generators):
    with pytest.raises(ValueError, match="max_gen_toks=99999 leaves no room"):
        Answers(generators[0], pair.tokenizer).texts([("x", GREEDY | {"max_gen_toks": 99999})])


def test_the_harness_gives_equal_scores_with_and_without_drafts(pair, generators, tmp_path):
    lm_eval = pytest.importorskip("lm_eval")
    rows = [{"q": texts[0][:200], "a": texts[0][200:230]} for texts in pair.prompts.values()]
    (tmp_path / "t.json").write_text("\n".join(map(json.dumps, rows)))
    files = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "t.json")}}}
    task = files | {
        "task": "continue", "test_split": "test", "doc_to_text": "{{q}}", "doc_to_target": "{{a}}",
        "output_type": "generate_until", "metric_list": [{"metric": "bleu"}],
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False},
    }  # fmt: skip
    scores = [
        lm_eval.simple_evaluate(lm_eval_model(one, pair.tokenizer), tasks=[dict(task)], bootstrap_iters=0)["results"]
        for one in generators
    ]
    assert scores[0]["continue"]["bleu,none"] == scores[1]["continue"]["bleu,none"] > 0
