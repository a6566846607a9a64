"""Drafters that speculators 0.9.0 and SpecForge 0.2.0 wrote, against what their own forward in float64 makes of them.

`python -m scripts.golden_block` and `scripts.golden_domino` write the folders."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from specdec.drafters.block.dense import block_places, slot_logits
from specdec.drafters.block.loading import load_block

GOLDEN = Path(__file__).parent / "golden"
NAMES = sorted(folder.name for folder in GOLDEN.iterdir())
SPECFORGE = GOLDEN.with_name("golden_specforge")
FOLDERS = {name: GOLDEN / name for name in NAMES} | {folder.name: folder for folder in SPECFORGE.iterdir()}


def expected_of(name):
    return load_file(FOLDERS[name] / "expected.safetensors")


def places_and_tokens(model, expected):
    """The states of all places, and the text's tokens before each slot."""
    anchors, tokens = expected["anchors"], expected["tokens"]
    places = block_places(model, expected["features"].float(), tokens, anchors)
    return places, tokens[anchors[:, None] + torch.arange(model.config.num_slots)]


@pytest.mark.parametrize("name", sorted(FOLDERS))
@torch.no_grad()
def test_logits_and_drafted_tokens_are_those_of_the_library(lender, name):
    expected = expected_of(name)
    model, _ = load_block(lender(expected), FOLDERS[name])
    places, before = places_and_tokens(model, expected)
    logits = slot_logits(model, places, before)
    torch.testing.assert_close(logits, expected["logits"], atol=2e-4, rtol=0)
    over_target = model.over_target(logits)
    assert torch.equal(over_target.argmax(-1), expected["drafted"])
    most = model.config.candidates or model.config.draft_vocab_size
    assert bool((over_target.isfinite().sum(-1) == most).all())
    if "confidence" in expected:
        sure = model.accepted(model.slots(places), before)
        torch.testing.assert_close(sure, expected["confidence"], atol=2e-4, rtol=0)
    assert ("confidence" in expected) == (model.config.confidence != "none") == name.startswith("dspark")
    best = expected["logits"].topk(2, -1).values
    assert (best[..., 0] - best[..., 1]).min() > 0.02, "drafts that could go either way would prove nothing"


READINGS = [("dflash", "windows"), ("dflash", "causal"), ("dspark_rnn", "from_anchor"), ("domino", "plain_slots")]


@pytest.mark.parametrize(("name", "field"), READINGS)
@torch.no_grad()
def test_another_reading_is_caught(lender, name, field):

    expected = expected_of(name)
    model, _ = load_block(lender(expected), FOLDERS[name])
    other = {"windows": (None, 4), "causal": None, "from_anchor": True, "plain_slots": 0}[field]
    model.config = replace(model.config, **{field: other})
    size = expected["logits"].shape[1]
    places, before = places_and_tokens(model, expected)
    logits = slot_logits(model, places, before)[:, :size]
    assert not torch.allclose(logits, expected["logits"], atol=1e-2)
