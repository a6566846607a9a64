"""The shipped EAGLE-3 drafter: right for the shipped target, small, and as good as its record says."""

import json

import torch

import specdec
from specdec.drafters.eagle3.drafter import Eagle3Drafter
from specdec.tiny_eagle3 import FOLDER, load_tiny_eagle3, tiny_drafter
from specdec.training.acceptance import decode_prompts


def require_exact(pair, runner, drafters):
    """Greedy text of all drafters is the target's, on a prompt of each kind."""
    texts = [prompts[0] for prompts in pair.prompts.values()]
    batch = pair.tokenizer(texts, return_tensors="pt", padding=True)
    given = batch.input_ids, batch.attention_mask
    expected = specdec.AutoregressiveGenerator(runner).generate(*given, max_new_tokens=24).sequences
    for drafter in drafters:
        out = specdec.SpeculativeGenerator(runner, drafter).generate(*given, max_new_tokens=24)
        assert out.sequences.equal(expected)


def require_recorded(pair, runner, drafter, folder, name):
    """On some of the shipped prompts the acceptance length is about that of record.json."""
    prompts = [pair.tokenizer(text).input_ids for prompts in pair.prompts.values() for text in prompts[:3]]
    found = decode_prompts(runner, drafter, prompts, 96).tokens_per_round
    record = json.loads((folder / "record.json").read_text())["tokens_per_round"][name]["all"]
    assert abs(found - record) < 0.5


def test_greedy_text_is_the_targets_and_comes_in_as_many_rounds_as_recorded():
    pair = specdec.load_tiny_pair()
    runner = specdec.ModelRunner(pair.target)
    network = load_tiny_eagle3(runner)
    require_exact(pair, runner, [tiny_drafter(runner), Eagle3Drafter(network, dynamic=(25, 5, 4))])
    require_recorded(pair, runner, Eagle3Drafter(network, 5), FOLDER, "EAGLE-3, chain of 5")


def test_it_is_small_and_stored_in_16_bits():
    assert (FOLDER / "model.safetensors").stat().st_size < 3e6
    runner = specdec.ModelRunner(specdec.load_tiny_pair().target)
    assert load_tiny_eagle3(runner).fc.weight.dtype == torch.float32
    assert load_tiny_eagle3(runner, torch.bfloat16).fc.weight.dtype == torch.bfloat16
