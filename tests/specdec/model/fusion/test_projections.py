"""Joined projections: the same values from the same memory, and the model that they were taken from is none the
worse.
"""

import pytest
import torch
from torch import nn

from specdec.model.fusion.projections import FusedProjections, fuse_projections, project
from tests.families import CONFIGS, build

pytestmark = pytest.mark.seam
JOINED = {"llama", "qwen3", "mistral", "mixtral", "gemma2", "gemma3", "opt", "gpt_oss"}
TOKENS = torch.arange(5, 17).view(2, 6)


def fused(model):
    return [module for module in model.modules() if isinstance(module, FusedProjections)]


@pytest.mark.parametrize("family", CONFIGS)
def test_twin_and_model_give_the_same_logits(family):
    model = build(family)
    with torch.inference_mode():
        expected = model(TOKENS).logits
        twin = fuse_projections(model)
        torch.testing.assert_close(twin(TOKENS).logits, expected)
        assert model(TOKENS).logits.equal(expected)
    assert bool(fused(twin)) == (family in JOINED) and (twin is not model) == (family in JOINED)
    assert not fused(model) and {name for name, _ in model.named_parameters()} == {
        name for name, _ in build(family).named_parameters()
    }


def test_weights_are_held_once_and_joining_twice_moves_nothing():
    model = build("llama")
    before = {name: p.clone() for name, p in model.named_parameters()}
    first, second = fused(fuse_projections(model)), fused(fuse_projections(model))
    assert [a.fused.data_ptr() for a in first] == [b.fused.data_ptr() for b in second]
    attention = model.model.layers[0].self_attn
    storages = {p.weight.untyped_storage().data_ptr() for p in (attention.q_proj, attention.k_proj, attention.v_proj)}
    assert storages == {first[0].fused.untyped_storage().data_ptr()}
    for name, parameter in model.named_parameters():
        assert parameter.equal(before[name]), name


def test_new_weights_reach_the_twin():
    model = build("llama")
    twin = fuse_projections(model)
    other = build("llama")
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.load_state_dict(other.state_dict())
    with torch.inference_mode():
        torch.testing.assert_close(twin(TOKENS).logits, other(TOKENS).logits)


def test_a_projection_that_is_asked_for_another_input_computes_its_own():
    torch.manual_seed(0)
    layer = nn.ModuleDict({name: nn.Linear(4, size) for name, size in (("q_proj", 6), ("k_proj", 2), ("v_proj", 3))})
    twin, x, y = fuse_projections(layer), torch.randn(5, 4), torch.randn(5, 4)
    twin["q_proj"](x)
    assert twin["k_proj"](y).equal(layer["k_proj"](y))
    torch.testing.assert_close(twin["v_proj"](x), layer["v_proj"](x))
    assert twin["q_proj"].source is None, "inputs must not be kept alive"
    assert twin["k_proj"](x).equal(layer["k_proj"](x))
    assert twin["q_proj"].weight is layer["q_proj"].weight and twin["v_proj"].weight is layer["v_proj"].weight


def test_what_is_no_plain_layer_or_reads_another_input_is_left_alone():
    class Quantised(nn.Linear):
        pass

    for layers in (
        {"gate_proj": Quantised(4, 6), "up_proj": nn.Linear(4, 6)},
        {"gate_proj": nn.Linear(4, 6), "up_proj": nn.Linear(5, 6)},
        {"gate_proj": nn.Linear(4, 6), "up_proj": nn.Linear(4, 6, bias=False)},
        {"gate_proj": nn.Linear(4, 6)},
    ):
        module = nn.ModuleDict(layers)
        assert fuse_projections(module) is module
    module = nn.ModuleDict({"gate_proj": nn.Linear(4, 6), "up_proj": nn.Linear(4, 6)})
    module["up_proj"].register_forward_hook(lambda *_: None)
    assert fuse_projections(module) is module


def test_a_product_of_ones_own_is_asked_by_every_ordinary_layer():
    """Joined ones once, the rest one by one; what is more than an nn.Linear, and what has a hook, multiplies as it
    did.
    """

    class Quantised(nn.Linear):
        pass

    model, seen = build("llama"), []
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[1].mlp
    attention.o_proj.register_forward_hook(lambda *_: None)
    mlp.down_proj.__class__ = Quantised
    twin = fuse_projections(
        model, lambda x, weight, bias: seen.append(len(weight)) or nn.functional.linear(x, weight, bias)
    )
    with torch.inference_mode():
        torch.testing.assert_close(twin(TOKENS).logits, model(TOKENS).logits)
    layers = len(model.model.layers)
    assert (
        len(seen) == 4 * layers + 1 - 2 and seen[-1] == model.config.vocab_size
    )  # qkv, o, gate and up, down; the output layer


def test_an_adapters_layers_are_left_to_it():
    """Their owner switches them on and off."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        build("llama"), peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    ).eval()
    twin = fuse_projections(model, lambda *args: nn.functional.linear(*args))
    with torch.inference_mode():
        adapted = twin(TOKENS).logits
        with model.disable_adapter():
            torch.testing.assert_close(twin(TOKENS).logits, model(TOKENS).logits)
            assert not torch.allclose(twin(TOKENS).logits, adapted)
        torch.testing.assert_close(twin(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("bias", [False, True])
def test_the_last_projections_alone_take_one_product_and_leave_nothing_behind(bias):
    """Keys and values of rows whose queries nobody wants, as of a context that others attend to."""
    sizes, asked = {"q_proj": 6, "k_proj": 2, "v_proj": 3}, []
    layer = nn.ModuleDict({name: nn.Linear(4, size, bias) for name, size in sizes.items()})

    def product(x, weight, bias=None):
        asked.append(len(weight))
        return nn.functional.linear(x, weight, bias)

    twin, x = fuse_projections(layer, product), torch.randn(5, 4)
    of = lambda names, of: [of[name] for name in names]
    for names, products in ((("k_proj", "v_proj"), [5]), (("v_proj", "k_proj"), []), (("q_proj", "k_proj"), [11])):
        asked.clear()
        found = project(x, of(names, twin))
        assert asked == products and twin["q_proj"].source is (x if "q_proj" in names else None)
        for mine, own in zip(found, of(names, layer), strict=True):
            torch.testing.assert_close(mine, own(x))
    torch.testing.assert_close(project(x, of(sizes, layer))[2], layer["v_proj"](x))
