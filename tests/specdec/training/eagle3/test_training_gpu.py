"""Training EAGLE-3 on a GPU: the Triton kernels give the losses and gradients of the CPU; a run measures and learns."""

from dataclasses import replace

import pytest
import torch

from specdec.training.backbone import Backbone
from specdec.training.eagle3.training import train_eagle3
from specdec.training.eagle3.unrolled import unroll
from specdec.training.unrolled.loss import DraftLoss
from tests.families import build
from tests.specdec.training.eagle3.test_training import PROMPTS, SETTINGS, network_for, some_rows

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


def loss_and_gradients(model, network, low: bool):
    rows = some_rows(4).take(slice(None))
    device = model.device
    with torch.autocast(device.type, torch.bfloat16, enabled=low):
        with torch.no_grad():
            features, states = Backbone(model).features(rows.tokens.to(device), (0, 1, 2), rows.documents)
        outputs = unroll(network, rows.tokens.to(device), rows.documents, features, 3)
        loss = DraftLoss(network, model.lm_head, "kl", chunk=13)
        total, _ = loss(outputs, states, loss.positions(rows, [0.1, 0.08, 0.064], device))
    return total.item(), [gradient.cpu() for gradient in torch.autograd.grad(total, list(network.parameters()))]


@pytest.mark.parametrize(("low", "tolerance"), [(False, 1e-3), (True, 5e-2)])
def test_losses_and_gradients_are_those_of_the_cpu(low, tolerance):
    model = build("llama", spread=1.0)
    network = network_for(model)
    expected, gradients = loss_and_gradients(model, network, False)
    model.to(DEVICE), network.to(DEVICE)
    loss, ours = loss_and_gradients(model, network, low)
    assert loss == pytest.approx(expected, rel=tolerance)
    for one, other in zip(ours, gradients, strict=True):
        assert (one - other).norm() <= tolerance * other.norm() + 1e-6


def test_a_run_in_16_bits_learns_and_repeats(tmp_path):
    runs = []
    for name in ("one", "other"):
        model = build("llama").to(DEVICE, torch.bfloat16)
        network = network_for(model).float()
        settings = replace(SETTINGS, steps=20, validate_every=10)
        runs.append(train_eagle3(model, network, some_rows(), tmp_path / name, settings, PROMPTS, progress=False))
    losses = [[record["loss"] for record in records] for records in runs]
    assert losses[0][-1] < losses[0][0] and losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert runs[0][-1]["tokens_per_round"] >= 1
