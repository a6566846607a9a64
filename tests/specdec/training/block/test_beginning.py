"""The first weights of a block drafter: its layers do with the target's states what the target's last blocks do."""

import pytest
import torch

from specdec.training.block.beginning import begin_as_last_blocks
from specdec.training.block.network import DSPARK, new_block
from tests.families import build


def begun(model, **fields):
    """A DSpark network of one layer, which reads the state before the model's last block alone."""
    torch.manual_seed(0)
    last = model.config.num_hidden_layers - 1
    return new_block(model, 2, None, 4, 1, target_layers=(last,), **DSPARK | dict(markov_rank=8) | fields)


def differences(network, model) -> dict[str, float]:
    """How far keys, values, queries, the MLP and the final norm are from those of the model's last block."""
    model_norm, block, layer = model.model.norm, model.model.layers[-1], network.layers[0]
    state = torch.randn(5, network.config.hidden_size)
    network.fc.weight.data.copy_(torch.eye(network.config.hidden_size))  # without the noise beside it
    read, theirs = network.fuse(state), block.input_layernorm(state)
    pairs = {name: (getattr(layer.self_attn, name)(read), getattr(block.self_attn, name)(theirs))
             for name in ("q_proj", "k_proj", "v_proj")}  # fmt: skip
    pairs["own norm"] = layer.self_attn.v_proj(layer.input_layernorm(state)), block.self_attn.v_proj(theirs)
    pairs["o_proj"] = layer.self_attn.o_proj.weight, block.self_attn.o_proj.weight
    pairs["mlp"] = (part.mlp(part.post_attention_layernorm(state)) for part in (layer, block))
    pairs["norm"] = network.norm(state), model_norm(state)
    if "q_norm" in dict(block.self_attn.named_children()):
        pairs["q_norm"] = layer.self_attn.q_norm.weight, block.self_attn.q_norm.weight
    return {name: float((own - other).abs().max() / other.abs().max()) for name, (own, other) in pairs.items()}


def unlike(name: str):
    """A model whose norms are no ones, so that a forgotten one shows."""
    model = build(name)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.uniform_(0.5, 3.0)
    return model


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
def test_a_layer_begins_as_the_last_block(name):
    model = unlike(name)
    with torch.no_grad():
        found = differences(begun(model), model)
    assert max(found.values()) < 1e-5, found


def test_random_weights_and_forgotten_norms_are_noticed():
    """What the test above compares does differ: without the beginning, and for another block's norm."""
    model = unlike("llama")
    with torch.no_grad():
        assert min(differences(begun(model, from_blocks=False), model).values()) > 0.1
        network = begun(model)
        model.model.layers[-1].input_layernorm.weight.mul_(1.1)
        assert differences(network, model)["v_proj"] > 0.05


@pytest.mark.parametrize("name", ["gemma2", "phi3", "gpt2", "mixtral"])
def test_other_models_keep_their_random_weights(name):
    """Blocks with other norms or products; of a mixture of experts attention and norms are taken, its MLP is not.

    RMS norms are taken in any case, also those that multiply by one more than they hold (Gemma)."""
    model = unlike(name)
    network, same = begun(model, from_blocks=False), begun(model)
    last = model.config.num_hidden_layers - 1
    assert begin_as_last_blocks(network, model) == ((last,) if name == "mixtral" else ())
    assert network.layers[0].mlp.gate_proj.weight.equal(same.layers[0].mlp.gate_proj.weight)
    assert network.fc.weight.equal(same.fc.weight)
    if name != "gpt2":
        state = torch.randn(5, network.config.hidden_size)
        torch.testing.assert_close(network.norm(state), model.model.norm(state), rtol=1e-4, atol=1e-4)


def test_more_layers_than_blocks_and_another_attention_begin_at_random():
    model = build("llama")
    count = model.config.num_hidden_layers
    wide = new_block(model, 2, None, 4, count + 1, from_blocks=False)
    assert begin_as_last_blocks(wide, model) == ()
    assert begin_as_last_blocks(begun(model, from_blocks=False, num_heads=8), model) == ()
    narrow = begun(model, from_blocks=False, intermediate_size=24)
    assert begin_as_last_blocks(narrow, model) == (count - 1,)
