"""Heads know the model that they were made for: by a few of its numbers in any dtype, by its name without them."""

import warnings
from dataclasses import replace

import pytest
import torch

from medusa import MedusaDrafter, MedusaGenerator, MedusaHeads, head_ranks
from medusa.base_model import check_base, with_base
from tests.families import CONFIGS, build

TOKENS = [torch.arange(5, 14)]


def named(model, name: str):
    """The model under the name that it would have been loaded from."""
    model.config._name_or_path = name
    return model


@pytest.fixture
def no_warnings():
    """Any warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_the_same_model_is_known_in_every_dtype_and_folder(family, dtype, no_warnings, tmp_path):
    heads = MedusaHeads.for_model(named(build(family), "org/model"), 2)
    heads.save_pretrained(tmp_path)
    again = named(build(family).to(dtype), "/data/copies/another-name")
    config = MedusaHeads.from_pretrained(tmp_path).config
    assert config.base_model == "org/model" and len(config.base_weights) > 4
    check_base(config, again)


def test_a_second_reading_of_half_a_model_agrees_too(no_warnings):
    """Made on the 16-bit weights, used with the model as it was in 32 bits."""
    model = build("llama")
    check_base(MedusaHeads.for_model(build("llama").to(torch.bfloat16), 2).config, model)


def test_another_model_of_the_same_shape_is_named():
    heads = MedusaHeads.for_model(named(build("llama"), "org/base"), 2)
    other = named(build("llama", seed=1), "org/chat")
    said = "made for org/base, whose weights differ from those of org/chat: the text stays right, but fewer drafts"
    with pytest.warns(UserWarning, match=said):
        MedusaGenerator(other, heads)
    with pytest.warns(UserWarning, match=said):
        head_ranks(heads, other, TOKENS)


def test_a_model_that_was_trained_on_is_another_one_under_the_same_name():
    """A few matrices changed by some percent, as merging an adapter does; norms and embeddings did not."""
    model = named(build("llama"), "model")
    config = MedusaHeads.for_model(model, 2).config
    with torch.no_grad():
        for layer in model.model.layers:
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                weight = getattr(layer.self_attn, name).weight
                weight.add_(0.05 * weight.std() * torch.randn_like(weight))
    with pytest.warns(UserWarning, match="made for model, whose weights differ from those of model"):
        check_base(config, model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_base(with_base(config, model), model)
        moved = with_base(config, model, name="runs/model-2")
        check_base(moved, model)
    assert (moved.base_model, moved.base_revision) == ("runs/model-2", None)


def test_numbers_of_a_model_that_the_config_no_longer_names_do_not_count(no_warnings):
    """Heads whose config was given another base by hand: names are all there is to compare."""
    config = replace(MedusaHeads.for_model(named(build("llama"), "org/base"), 2).config, base_model="runs/tuned")
    check_base(config, named(build("llama", seed=1), "tuned"))
    with pytest.raises(UserWarning, match="made for runs/tuned, and are used with org/base"):
        check_base(config, named(build("llama"), "org/base"))


@pytest.mark.parametrize(("stored", "used", "same"), [
    ("lmsys/vicuna-7b-v1.3", "/models/vicuna-7b-v1.3", True),
    ("lmsys/vicuna-7b-v1.3", "/cache/models--lmsys--vicuna-7b-v1.3/snapshots/0a1b2c", True),
    ("Org/Model", "org/model/", True),
    ("lmsys/vicuna-7b-v1.3", "lmsys/vicuna-13b-v1.3", False),
    ("", "anything", True),
    ("anything", "", True),
])  # fmt: skip
def test_heads_without_numbers_compare_names(stored, used, same):
    model = named(build("llama"), used)
    config = replace(MedusaHeads.for_model(model, 2).config, base_model=stored, base_weights=None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_base(config, model)
    assert [
        str(one.message).startswith(f"the heads were made for {stored}, and are used with {used}") for one in caught
    ] == ([] if same else [True])


def test_weights_that_have_other_names_or_are_quantised_are_left_out(no_warnings):
    model = build("llama")
    config = MedusaHeads.for_model(model, 2).config
    for layer in model.model.layers:
        layer.mlp.down_proj.weight = torch.nn.Parameter(
            layer.mlp.down_proj.weight.round().to(torch.int8), requires_grad=False
        )
        layer.self_attn.renamed = layer.self_attn.q_proj
        del layer.self_attn.q_proj
    check_base(config, model)


def test_other_sizes_are_an_error_that_names_both():
    heads = MedusaHeads.for_model(named(build("llama"), "org/base"), 2)
    other = named(build("llama"), "org/wider")
    other.resize_token_embeddings(110)
    said = r"another model: \[V, H\] is \(97, 32\) for the heads of org/base and \(110, 32\) for org/wider"
    for use in (lambda: MedusaGenerator(other, heads), lambda: head_ranks(heads, other, TOKENS)):
        with pytest.raises(ValueError, match=said):
            use()


def test_heads_in_another_dtype_are_an_error_of_their_own():
    model = build("llama")
    heads = MedusaHeads.for_model(model, 2).to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"dtype is torch\.bfloat16 for the heads and torch\.float32 for the target"):
        MedusaGenerator(model, heads)
    assert MedusaDrafter(heads).heads is heads
