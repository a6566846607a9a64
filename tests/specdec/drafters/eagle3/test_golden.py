"""Drafters that speculators 0.9.0 wrote, against what its own forward in float64 makes of them.

`python -m scripts.golden_eagle3` writes the folders."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from specdec.drafters.eagle3.dense import DenseAttention
from specdec.drafters.eagle3.loading import load_eagle3

GOLDEN = Path(__file__).parent / "golden"
CHAINS = ("plain", "each_norm", "whole_norm", "two_layers")
PARALLEL = ("parallel", "parallel_plain")


def chain_outputs(model, expected):
    """What the drafter makes of each step, fed with its own features and the text's tokens, `[STEPS, TOKENS, h]`."""
    steps, count = expected["logits"].shape[:2]
    places, attend, outputs = torch.arange(count), DenseAttention(model.config), []
    tokens, hidden = expected["tokens"], model.fuse(expected["features"].float())
    for step in range(steps):
        attend.place(places, torch.full_like(places, step))
        output, hidden = model(model.embed(tokens), hidden, places + step, attend)
        outputs.append(output)
        tokens = torch.cat([tokens[1:], tokens.new_zeros(1)])
    return torch.stack(outputs)


def parallel_outputs(model, expected):
    """What the drafter makes of all slots in one pass, `[N, h]`."""
    anchors, depths = expected["anchors"], expected["depths"]
    text = depths == 0
    tokens, features = (part.clone() for part in model.mask_steps(len(anchors)))
    tokens[text], features[text] = expected["tokens"], expected["features"].float()
    embedded, hidden = model.embed(tokens), model.fuse(features)
    attend = DenseAttention(model.config)
    attend.place(anchors, depths)
    return model(embedded, hidden, anchors + depths, attend)[0]


def outputs_of(model, expected):
    return parallel_outputs(model, expected) if "anchors" in expected else chain_outputs(model, expected)


@pytest.mark.parametrize("name", CHAINS + PARALLEL)
@torch.no_grad()
def test_logits_and_drafted_tokens_are_those_of_the_library(runner, name):
    model, _ = load_eagle3(runner, GOLDEN / name)
    expected = load_file(GOLDEN / name / "expected.safetensors")
    output = outputs_of(model, expected)
    torch.testing.assert_close(model.logits(output), expected["logits"], atol=2e-4, rtol=0)
    over_target = model.target_logits(output)
    assert torch.equal(over_target.argmax(-1), expected["drafted"])
    drafted = model.config.draft_vocab_size
    assert bool((over_target.isfinite().sum(-1) == drafted).all()), "what is not in the draft vocabulary has no chance"
    best = expected["logits"].topk(2, -1).values
    assert (best[..., 0] - best[..., 1]).min() > 0.02, "drafts that could go either way would prove nothing"
