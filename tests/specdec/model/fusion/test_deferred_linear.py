"""Products that wait for what is added to them."""

import copy

import pytest
import torch
from torch import Tensor, nn

from specdec.model.fusion import deferred_linear as module
from specdec.model.fusion.deferred_linear import DeferredLinear, materialise
from specdec.model.fusion.product_inputs import Norm
from specdec.model.fusion.skinny_linear import skinny_linear
from tests.attention.devices import DEVICE


@pytest.fixture
def factors() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(*shape, generator=generator).to(DEVICE) for shape in ((1, 3, 8), (5, 8), (5,)))


@pytest.fixture
def products(monkeypatch) -> list:
    """What was added to each product that was computed."""
    seen = []

    def product(*factors, **options):
        seen.append(options.get("added"))
        return skinny_linear(*factors, **options)

    monkeypatch.setattr(module, "skinny_linear", product)
    return seen


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_a_sum_is_one_product(factors, products, mode):
    plain, other = nn.functional.linear(*factors), torch.ones(1, 3, 5, device=DEVICE)
    with mode():
        for add in (lambda x: other + x, lambda x: x + other, lambda x: torch.add(other, x)):
            out = add(DeferredLinear(*factors))
            assert isinstance(out, DeferredLinear) and not products
            assert (
                type(materialise(out)) is Tensor and materialise(out).equal(plain + other) and type(out + 1) is Tensor
            )
            assert products.pop() is other and not products
        materialise(other + nn.Dropout(0.5).eval()(DeferredLinear(*factors)))
        assert products.pop() is other


@torch.inference_mode()
def test_a_sum_takes_no_second_summand(factors, products):
    plain, other = nn.functional.linear(*factors), torch.ones(1, 3, 5, device=DEVICE)
    one, two = other + DeferredLinear(*factors), DeferredLinear(*factors)
    assert type(one + other) is Tensor and (one + other).equal(plain + other + other) and len(products) == 1
    both = one + two  # what is there is added to what waits
    assert (
        isinstance(both, DeferredLinear)
        and materialise(both).equal(plain + plain + other)
        and len(products) == 2
        and products[1] is materialise(one)
    )


@torch.inference_mode()
@pytest.mark.parametrize("split", [False, True])
def test_a_norm_comes_with_the_product_or_not_at_all(factors, products, split, monkeypatch):
    plain, other, seen = nn.functional.linear(*factors), torch.ones(1, 3, 5, device=DEVICE), []
    norm = Norm(torch.ones(5, device=DEVICE), 1e-5, False)

    def product(x, weight, bias, added, norm):
        seen.append((added, norm))
        return nn.functional.linear(x, weight, bias) + added, added if split else None

    monkeypatch.setattr(module, "skinny_linear_and_norm", product)
    x = other + DeferredLinear(*factors)
    assert x.normed(norm) is (other if split else None) and seen == [(other, norm)]
    assert x.normed(norm) is None and materialise(x).equal(plain + other) and len(seen) == 1 and not products


@torch.inference_mode()
def test_everything_else_is_done_with_the_product_which_is_computed_once(factors, products):
    plain, other, x = nn.functional.linear(*factors), torch.ones(1, 3, 5, device=DEVICE), DeferredLinear(*factors)
    assert isinstance(x, Tensor) and (x.shape, x.dtype, x.device, x.ndim) == (plain.shape, plain.dtype, plain.device, 3)
    for operation in (
        lambda x: x * 2,
        lambda x: other[:, :1] + x,
        lambda x: torch.add(other, x, alpha=2),
        lambda x: x.double() + 1,
        lambda x: x[0, 1:],
        lambda x: other.clone().add_(x),
        lambda x: torch.cat([x, x]),
        lambda x: x.view(3, 5).T @ x[0],
        lambda x: x + x,
        materialise,
        lambda x: other + x,
    ):
        out = operation(x)
        assert type(out) is Tensor and out.equal(operation(plain))
    assert products == [None]
    assert repr(x) == "DeferredLinear(shape=[1, 3, 5], dtype=torch.float32)" and materialise(plain) is plain


@torch.inference_mode()
def test_whoever_reads_its_memory_finds_the_product(factors, products):
    plain, x = nn.functional.linear(*factors), DeferredLinear(*factors)
    assert x.contiguous().data_ptr() == x.product().data_ptr() != 0
    assert x.tolist() == plain.tolist() and copy.deepcopy(x).equal(plain) and len(products) == 1
    assert (x.cpu().numpy() == plain.cpu().numpy()).all() and (DEVICE == "cuda" or (x.numpy() == plain.numpy()).all())


def test_a_sum_of_two_that_wait_computes_both(factors, products):
    one, two, plain = DeferredLinear(*factors), DeferredLinear(*factors), nn.functional.linear(*factors)
    with torch.inference_mode():
        assert materialise(one + two).equal(plain + plain)
    assert len(products) == 2
