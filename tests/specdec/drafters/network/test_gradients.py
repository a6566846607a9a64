"""What keeps little for its gradients has those of the plain writing."""

import pytest
import torch
from torch import nn
from torch.nn.functional import silu

from specdec.drafters.network import gradients
from specdec.drafters.network.gradients import computed_again, gated_product, rms_norm, working_dtype


def numbers(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).requires_grad_()


def plain_norm(x, weight, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6)])
def test_a_norm_has_the_gradients_of_the_plain_one(shape):
    x, weight = numbers(*shape), numbers(6, seed=1)
    assert torch.equal(rms_norm(x, weight, 1e-5), rms_norm(x.detach(), weight.detach(), 1e-5))
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), plain_norm(x, weight, 1e-5))
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, 1e-5), (x, weight))
    frozen = weight.detach()  # a part that does not learn costs nothing
    (ours,) = torch.autograd.grad(rms_norm(x, frozen, 1e-5).square().sum(), x)
    (theirs,) = torch.autograd.grad(plain_norm(x, frozen, 1e-5).square().sum(), x)
    torch.testing.assert_close(ours, theirs)


def test_a_norm_of_16_bits_is_computed_in_32_and_stays_in_16():
    x, weight = numbers(7, 64, dtype=torch.bfloat16), numbers(64, seed=1, dtype=torch.float32)
    out = rms_norm(x, weight, 1e-5)
    assert out.dtype == torch.bfloat16
    ours = torch.autograd.grad(out.float().square().sum(), (x, weight))
    wide = plain_norm(x.float(), weight, 1e-5)
    assert (out.float() - wide).norm() < 0.01 * wide.norm()
    for one, other in zip(ours, torch.autograd.grad(wide.square().sum(), (x, weight)), strict=True):
        assert one.dtype == other.dtype and (one - other).norm() < 0.02 * other.norm()


@pytest.mark.parametrize(
    "activation", [silu, nn.GELU(), nn.PReLU(dtype=torch.float64)], ids=["silu", "gelu", "learned"]
)
def test_a_gated_product_has_the_gradients_of_the_plain_one(activation):
    gate, up = numbers(4, 5), numbers(4, 5, seed=1)
    learned = list(activation.parameters()) if isinstance(activation, nn.Module) else []
    ours = torch.autograd.grad(gated_product(activation, gate, up).square().sum(), (gate, up, *learned))
    theirs = torch.autograd.grad((activation(gate) * up).square().sum(), (gate, up, *learned))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def kept_by(run):
    """Numbers of 4 tokens that a forward keeps for its gradients, each memory counted once."""
    kept = {}

    def note(tensor):
        if len(tensor) == 4:
            kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run()
    return sum(kept.values())


def test_what_is_computed_again_is_not_kept():
    down, gate, up = nn.Linear(8, 3).double(), numbers(4, 8) * 2, numbers(4, 8, seed=1) * 2
    again, calls = [], gated_product(silu, gate, up)
    with computed_again(calls, lambda: again.append(1) or silu(gate) * up):
        out = down(calls)
    assert not again
    ours = torch.autograd.grad(out.square().sum(), [down.weight, down.bias])
    theirs = torch.autograd.grad(down(silu(gate) * up).square().sum(), [down.weight, down.bias])
    assert again == [1] and all(torch.allclose(one, other) for one, other in zip(ours, theirs, strict=True))

    def lean():
        product = gated_product(silu, gate, up)
        with computed_again(product, lambda: silu(gate) * up):
            return down(product)

    assert kept_by(lambda: down(silu(gate) * up)) == 4 * 32 and kept_by(lean) == 2 * 32


def test_a_wrong_writing_is_caught(monkeypatch):
    """The planted fault: a norm whose gradient ignores that its scale depends on x."""
    x, weight = numbers(5, 6), numbers(6, seed=1)

    def forgetful(ctx, by_output):
        _, weight, scale = ctx.saved_tensors
        return by_output * weight * scale, None, None

    monkeypatch.setattr(gradients._RMSNorm, "backward", staticmethod(forgetful))
    with pytest.raises(RuntimeError):
        torch.autograd.gradcheck(lambda x: rms_norm(x, weight, 1e-5), (x,))


def test_products_are_computed_in_autocasts_dtype():
    weight = torch.zeros(2)
    assert working_dtype(weight) == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert working_dtype(weight) == torch.bfloat16 and working_dtype(weight.double()) == torch.float64
