"""The right reading of a drafter is the one whose guesses are the target's own tokens most often."""

import copy

import pytest
import torch

import specdec
from specdec.drafters.check import _Teacher
from specdec.drafters.eagle3.dense import DenseAttention
from specdec.drafters.eagle3.drafter import Eagle3Drafter, Eagle3Steps
from specdec.model.runner import ModelRunner
from tests.families import build
from tests.learned import fitted, mtp, own_texts


@pytest.fixture(scope="module")
def target():
    return build("llama")


@pytest.fixture(scope="module")
def texts(target):
    return list(own_texts(target, count=16))


def fitted_as(target, **options):
    return fitted(target, target_layers=(1,), **options)


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        (dict(), dict(target_layers=(0,))),
        (dict(norm_before_residual=True), dict(norm_before_residual=False)),
        (dict(), dict(norm_before_residual=True, target_layers=(2,))),
    ],
)
def test_a_wrong_reading_is_found_and_the_right_one_kept(target, texts, options, wrong):
    network = fitted_as(target, **options)
    kept = specdec.check_drafter(Eagle3Drafter(network), target, texts)
    assert kept.right and kept.best.rates[0] > 0.3 and "it is read rightly" in str(kept)
    check = specdec.check_drafter(Eagle3Drafter(network.read_as(**wrong)), target, texts)
    assert check.best.fields == {name: getattr(network.config, name) for name in wrong}
    assert check.best.rates == kept.best.rates and not check.right
    assert check.readings[0].accepted < check.best.accepted and "read it with" in str(check)


def test_which_norm_is_read_by_deeper_layers_is_found(target, texts):
    network = fitted_as(target, num_layers=2)
    name = "layers.1.input_layernorm.weight"
    swapped = copy.deepcopy(network)
    swapped.spare = {name: network.state_dict()[name].clone()}
    with torch.no_grad():
        swapped.layers[1].input_layernorm.weight.copy_(3 * torch.randn(network.config.hidden_size))
    check = specdec.check_drafter(Eagle3Drafter(swapped), target, texts)
    assert check.best.fields == dict(deeper_norm="hidden_norm")
    with pytest.raises(ValueError, match="deeper_norm cannot be hidden_norm"):
        network.read_as(deeper_norm="hidden_norm")


def test_the_readings_of_mtp_are_measured(target, texts):
    drafter = mtp(target)
    check = specdec.check_drafter(drafter, target, texts)
    assert check.right and check.best.rates[0] > 0.2
    assert {repr(dict(reading.fields)) for reading in check.readings} >= {
        "{}",
        "{'normed': False}",
        "{'zero_first': True}",
    }


@torch.no_grad()
def dense_rates(network, target, texts, depth):
    """The same shares by dense attention and transformers' own states."""
    right = places = 0
    for text in texts:
        out = target(input_ids=text[None], output_hidden_states=True)
        features = torch.cat([out.hidden_states[layer][0] for layer in network.config.target_layers], -1)
        likely, count = out.logits[0].argmax(-1), len(text) - depth
        anchors, attend, found = torch.arange(count), DenseAttention(network.config), []
        hidden = None
        for step in range(depth):
            if network.config.parallel and step:
                tokens, masks = network.mask_steps(count)
                embedded, hidden = network.embed(tokens), network.fuse(masks)
            else:
                embedded = network.embed(text[1 + step : 1 + step + count])
                hidden = network.fuse(features[:count]) if hidden is None else hidden
            attend.place(anchors, torch.full_like(anchors, step))
            output, hidden = network(embedded, hidden, anchors + step, attend)
            found.append(network.target_logits(output).argmax(-1) == likely[1 + step : 1 + step + count])
        right, places = right + torch.stack(found).sum(1), places + count
    return (right / places).tolist()


@pytest.mark.parametrize("options", [dict(), dict(mask_token=1), dict(num_layers=2)])
def test_rates_are_those_of_dense_attention(target, texts, options):
    network, runner = fitted_as(target, **options), ModelRunner(target, mode="eager")
    rows = [texts[0], texts[1][:9], texts[2][:17]]
    rates = _Teacher(runner, rows, 3).right_guesses(Eagle3Steps(network)).mean(0)
    torch.testing.assert_close(rates.tolist(), dense_rates(network, target, rows, 3))
    assert runner.cache.sequences == (), "the target's cache is given back"


def test_what_cannot_be_checked_is_refused(target, texts):
    drafter = Eagle3Drafter(fitted_as(target))
    with pytest.raises(ValueError, match="PromptLookupDrafter leave nothing open"):
        specdec.check_drafter(specdec.PromptLookupDrafter(), target, texts)
    with pytest.raises(ValueError, match="at least 4 tokens"):
        specdec.check_drafter(drafter, target, [[1, 2, 3]])
    with pytest.raises(ValueError, match="needs a tokenizer, got none for 'a text'"):
        specdec.check_drafter(drafter, target, ["a text"])
    with pytest.raises(ValueError, match="what can be read otherwise is .*, got hidden_size"):
        drafter.model.read_as(hidden_size=3)
