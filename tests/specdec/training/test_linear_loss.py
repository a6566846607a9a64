"""Distances from a teacher: one teacher for several positions, and the kernel beside the reference."""

import pytest
import torch

from specdec.training import linear_loss
from specdec.training.linear_loss import Teacher, divergence, total_variation
from tests.attention.devices import DEVICE

DISTANCES = {"kl": divergence, "tv": total_variation}


def problem(dtype, size=53, indexed=True):
    """Logits `[9, size]`, and their teacher of four rows, or nine."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, size, generator=generator, dtype=torch.float64).mul(3).to(dtype)
    if not indexed:
        return logits, Teacher(lambda x: x, torch.randn(9, size, generator=generator, dtype=torch.float64).to(dtype))
    states, rows = torch.randn(4, size, generator=generator, dtype=torch.float64).mul(3).to(dtype), [0, 0, 1, 1, 1, 2]
    rows = torch.tensor([*rows, 3, 3, 3])
    return logits, Teacher(lambda x: x, states, rows, rows.int())


def plain(kind, logits, teacher):
    """Losses and their gradient by autograd."""
    states = teacher.states if teacher.rows is None else teacher.states[teacher.rows]
    logits = logits.double().requires_grad_()
    log_q, log_p = logits.log_softmax(-1), states.double().log_softmax(-1)
    distance = log_p.exp() * (log_p - log_q) if kind == "kl" else (log_p.exp() - log_q.exp()).abs() / 2
    return distance.sum(1).detach(), torch.autograd.grad(distance.sum(), logits)[0]


@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("in_fp32", [1, 110, 2**24])
def test_positions_share_their_teacher(kind, indexed, in_fp32, monkeypatch):
    monkeypatch.setattr(linear_loss, "LOGITS_IN_FP32", in_fp32)
    logits, teacher = problem(torch.float64, indexed=indexed)
    losses, gradient = plain(kind, logits, teacher)
    seen = []
    counted = Teacher(lambda x: seen.append(len(x)) or x, teacher.states, teacher.rows, teacher.on_device)
    slope = logits.clone()
    found = torch.cat([DISTANCES[kind](counted)(part, start) for part, start in ((slope[:4], 0), (slope[4:], 4))])
    torch.testing.assert_close(found, losses)
    torch.testing.assert_close(slope, gradient)
    assert sum(seen) <= (9 if in_fp32 < 2**24 or not indexed else 5), "each teacher once a part"


@pytest.mark.covering
@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 2e-3)])
@pytest.mark.parametrize("block", [16, 4096])
def test_the_kernel_is_the_reference(kind, indexed, dtype, tolerance, block, monkeypatch):
    kernel = pytest.importorskip("specdec.training.distance_kernel")
    monkeypatch.setattr(kernel, "BLOCK", block)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logits, teacher = problem(dtype, indexed=indexed)
    losses, gradient = plain(kind, logits, teacher)
    held = [None if x is None else x.to(device) for x in (teacher.states, teacher.on_device)]
    wide = torch.zeros(9, 60, dtype=dtype, device=device)  # rows that do not follow each other
    slope = wide[:, :53].copy_(logits)
    found = DISTANCES[kind](Teacher(teacher.layer, held[0], teacher.rows, held[1]), impl="triton")(slope, 0)
    torch.testing.assert_close(found.cpu().double(), losses, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(slope.cpu().double(), gradient, atol=tolerance, rtol=tolerance)
    assert not wide[:, 53:].any()


def test_the_kernel_takes_no_float64():
    logits, teacher = problem(torch.float64)
    with pytest.raises(ValueError, match="takes no float64"):
        divergence(teacher, impl="triton")(logits.to(DEVICE), 0)
