"""Runs of all kinds of networks: validations change nothing, killed runs go on bit for bit, the best weights remain."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from specdec.training.network_learner import NetworkLearner
from tests.families import build
from tests.specdec.training.block import test_training as block
from tests.specdec.training.eagle3 import test_parallel as peagle
from tests.specdec.training.eagle3 import test_training as eagle3
from tests.specdec.training.eagle3.test_training import PROMPTS, equal, untimed
from tests.specdec.training.mtp import test_training as mtp

KINDS = {
    "EAGLE-3": (eagle3.trained, eagle3.SETTINGS),
    "P-EAGLE": (peagle.trained, peagle.SETTINGS),
    "MTP": (mtp.trained, mtp.SETTINGS),
    "DSpark": (block.trained, block.SETTINGS),
}
DEEP = {"MTP, one module a depth": (partial(mtp.trained, count=3), mtp.SETTINGS)}
every_kind = pytest.mark.parametrize(("trained", "settings"), KINDS.values(), ids=KINDS)


def last_weights(folder) -> list[torch.Tensor]:
    """Those after the last step, whichever validation was the best."""
    return torch.load(folder / "checkpoint.pt", weights_only=True)["network"]


@pytest.mark.parametrize(("trained", "settings"), (KINDS | DEEP).values(), ids=KINDS | DEEP)
def test_rows_at_once_change_nothing(trained, settings, tmp_path):
    """8 rows in one forward, in two of four, one by one, in double precision."""
    found = []
    for at_once in (8, 4, 1):
        wanted = replace(settings, steps=3, batch=8, rows_at_once=at_once)
        network, records = trained(tmp_path / str(at_once), wanted, build("llama").double())
        found.append(([record["loss"] for record in records], list(network.parameters())))
    for of_steps, weights in found[1:]:
        assert of_steps == pytest.approx(found[0][0], abs=1e-6)
        for one, other in zip(weights, found[0][1], strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


@every_kind
def test_a_model_in_16_bits_trains_a_drafter_in_32_and_stays_as_it_is(trained, settings, tmp_path):
    model = build("llama").bfloat16()
    before = [weight.clone() for weight in model.parameters()]
    low = replace(settings, steps=12, validate_every=12)
    network, (first, *_, last) = trained(tmp_path / "low", low, model, PROMPTS)
    _, (same, *_) = trained(tmp_path / "high", replace(settings, steps=1))
    assert first["loss"] == pytest.approx(same["loss"], rel=0.05) and last["loss"] < first["loss"]
    assert equal(model.parameters(), before) and {p.dtype for p in network.parameters()} == {torch.float32}


@every_kind
def test_a_validation_in_between_changes_no_later_step(trained, settings, tmp_path):
    _, without = trained(tmp_path / "without")
    _, within = trained(tmp_path / "with", replace(settings, validate_every=1), prompts=PROMPTS)
    assert all(record.pop("tokens_per_round") >= 1 for record in within)
    assert untimed(within) == untimed(without)
    assert equal(last_weights(tmp_path / "with"), last_weights(tmp_path / "without"))


@every_kind
def test_a_killed_run_goes_on_bit_for_bit(trained, settings, tmp_path, monkeypatch):
    settings = replace(settings, save_every=2, validate_every=2, patience=5)
    whole, records = trained(tmp_path / "whole", settings, prompts=PROMPTS)
    backward = NetworkLearner.backward

    def killed(learner, part, counts, step):
        if step == 3:
            raise KeyboardInterrupt
        return backward(learner, part, counts, step)

    with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
        broken.setattr(NetworkLearner, "backward", killed)
        trained(tmp_path / "parts", settings, prompts=PROMPTS)
    assert torch.load(tmp_path / "parts/checkpoint.pt", weights_only=True)["step"] == 2
    resumed, again = trained(tmp_path / "parts", settings, prompts=PROMPTS)
    assert untimed(again) == untimed(records) and equal(resumed.parameters(), whole.parameters())
    assert equal(last_weights(tmp_path / "parts"), last_weights(tmp_path / "whole"))


@every_kind
def test_a_run_stops_when_acceptance_gets_no_better_and_keeps_the_best(trained, settings, tmp_path, monkeypatch):
    lengths, best = iter([1.5, 2.0, 1.9, 1.8, 9.0]), []

    def measured(learner):
        length = next(lengths)
        if length == 2.0:
            best.extend(parameter.detach().clone() for parameter in learner.module.parameters())
        return {"tokens_per_round": length}

    monkeypatch.setattr(NetworkLearner, "validate", measured)
    settings = replace(settings, steps=20, validate_every=2, patience=2)
    network, records = trained(tmp_path, settings, prompts=PROMPTS)
    assert [record["step"] for record in records] == list(range(8)) and equal(network.parameters(), best)
    again, same = trained(tmp_path, settings, prompts=PROMPTS)  # a finished run is not gone on with
    assert same == records and equal(again.parameters(), best)
    with pytest.raises(ValueError, match=r"other settings .*'lr': "):
        trained(tmp_path, replace(settings, lr=7.0), prompts=PROMPTS)


@every_kind
def test_a_patience_needs_prompts(trained, settings, tmp_path):
    with pytest.raises(ValueError, match="patience 2 needs held-out prompts"):
        trained(tmp_path, replace(settings, patience=2))
