import json
from statistics import mean

import pytest
import torch

from scripts.common.tiny_corpus import HELD_OUT
from specdec import load_tiny_pair
from specdec.tiny_pair import FOLDER

torch.set_num_threads(1)  # tiny tensors: waiting threads would cost ten times more on shared cores

KINDS = ["code", "prose", "data", "editing"]
BAND = 0.1
# The record's figure is a mean over windows of the full 1024 tokens, the prompts are short (about 100 tokens), and
# short contexts are harder to agree on. One prompt strays by 0.12 from the mean of all (standard deviation), so the
# mean of 32 by 0.02: a band of 0.1 leaves room for the shift and still catches swapped, truncated or mismatched
# weights, which end far below 0.3.


@pytest.fixture(scope="module")
def pair():
    return load_tiny_pair()


@pytest.fixture(scope="module")
def texts(pair):
    return [text for kind in KINDS for text in pair.prompts[kind]]


@pytest.fixture(scope="module")
def measured(pair, texts):
    """For each prompt its mean Σ min(p, q) and the losses of target and draft, from float64 log-probabilities."""
    found = []
    with torch.inference_mode():
        for text in texts:
            ids = pair.tokenizer(text, return_tensors="pt").input_ids
            log_p, log_q = (model(ids).logits[0].double().log_softmax(-1) for model in (pair.target, pair.draft))
            losses = [-logs[:-1].gather(1, ids[0, 1:, None]).mean().item() for logs in (log_p, log_q)]
            found.append((torch.minimum(log_p, log_q).exp().sum(-1).mean().item(), *losses))
    return found


def test_models_are_small_and_ready_to_run(pair):
    assert pair.target.num_parameters() <= 8e6 and pair.draft.num_parameters() <= 1e6
    for model in (pair.target, pair.draft):
        assert not model.training and model.dtype == torch.float32
        assert all(weight.isfinite().all() for weight in model.parameters())


def test_files_are_small():
    files = [file for name in ("target", "draft") for file in (FOLDER / name).rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 18e6
    assert {file.suffix for file in files} == {".json", ".safetensors"}


def test_dtype_follows_the_argument(pair):
    half = load_tiny_pair(torch.bfloat16)
    assert half.target.dtype == half.draft.dtype == torch.bfloat16
    assert torch.equal(
        half.draft.lm_head.weight.float(), pair.draft.lm_head.weight
    )  # stored in bf16, so nothing is lost


def test_vocabularies_are_equal(pair):
    sizes = {len(pair.tokenizer), pair.target.config.vocab_size, pair.draft.config.vocab_size}
    sizes |= {len(model.get_output_embeddings().weight) for model in (pair.target, pair.draft)}
    assert sizes == {4096}
    assert {model.generation_config.eos_token_id for model in (pair.target, pair.draft)} == {
        pair.tokenizer.eos_token_id
    }


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_distinct_and_fit_the_context(pair, kind):
    assert sorted(pair.prompts) == sorted(KINDS)
    prompts = pair.prompts[kind]
    assert len(prompts) >= 8 and len(set(prompts)) == len(prompts) and all(text.strip() for text in prompts)
    longest = max(len(ids) for ids in pair.tokenizer(prompts).input_ids)
    room = min(model.config.max_position_embeddings for model in (pair.target, pair.draft))
    assert longest + 512 <= room  # the demo's largest --max-new-tokens


def test_prompts_come_from_held_out_files_only():
    prompts = json.loads((FOLDER / "prompts.json").read_text())
    sources = {entry["source"] for entries in prompts.values() for entry in entries}
    assert sources and sources <= set(HELD_OUT)


def test_the_tokenizer_gives_text_back(pair, texts):
    for text in [*texts, "naïve ☃ 1234\t\r\n  x", " leading , spaces . kept !"]:
        assert pair.tokenizer.decode(pair.tokenizer(text).input_ids) == text
    assert len(pair.tokenizer("1234567").input_ids) == 7  # single digits


def test_the_record_says_how_the_pair_was_trained(pair):
    record = pair.record
    for name, model in (("target", pair.target), ("draft", pair.draft)):
        assert record[name]["parameters"] == model.num_parameters()
        assert 0 < record[name]["held_out_loss"] < record[name]["log"][0]["held_out_loss"]
        assert record[name]["tokens_seen"] > record["training_tokens"]
    assert record["target"]["held_out_loss"] < record["draft"]["held_out_loss"]
    assert isinstance(record["seed"], int) and set(record["versions"]) == {"python", "torch", "transformers"}
    assert 0 < record["expected_acceptance"] < 1 and 0 < record["share_of_greedy_completions_that_parse"] <= 1
    assert record["held_out_files"] == list(HELD_OUT) and record["settings"] and record["device"]


def test_expected_acceptance_recomputed_on_the_prompts(pair, measured):
    acceptance = [row[0] for row in measured]
    assert all(0 < value < 1 for value in acceptance)
    assert mean(acceptance) == pytest.approx(pair.record["expected_acceptance"], abs=BAND)


def test_losses_on_the_prompts_are_those_of_trained_models(pair, measured):
    target, draft = (mean(row[i] for row in measured) for i in (1, 2))
    assert target < draft
    # short contexts cost up to a nat; a wrong tokenizer or wrong weights would give about ln 4096 = 8.3
    assert target == pytest.approx(pair.record["target"]["held_out_loss"], abs=1)
    assert draft == pytest.approx(pair.record["draft"]["held_out_loss"], abs=1)
