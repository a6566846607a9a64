"""The first weights of a block drafter: those of the target's last blocks, which know how to read its states.

A block drafter sees what the target has computed by attention alone, where EAGLE-3 has it in its residual stream. From
random weights it must first learn to look at the last tokens at all: attention is even over the text at first, and
through a frozen output layer it cannot make logits as large as the target's before its final norm has grown as far. So
the context begins as the last state that is read, normed; each layer's keys, values, queries and MLP are those of one
of the target's last blocks, which made theirs of about this state; and the final norm is the target's. On the shipped
target, after 160 steps on the same rows of source code, the first slot's divergence fell from 4.30 to 3.02 and its
acceptance rose from 0.10 to 0.22, where EAGLE-3's first step had 0.18. With a first layer that sees four tokens, after
400 steps, a chain of five gave 1.50 tokens a round and EAGLE-3's 1.41."""

from typing import Any

import torch
from torch import Tensor, nn

from attention.hf.hidden_states import blocks_name, num_blocks
from attention.hf.probe import UnsupportedArchitecture
from specdec.drafters.block.module import BlockLayer, BlockModel
from specdec.drafters.network.parts import RMSNorm
from specdec.training.network import plain_weight

PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
ATTENTION, HEAD_NORMS = ("q_proj", "k_proj", "v_proj", "o_proj"), ("q_norm", "k_norm")
MLP = ("gate_proj", "up_proj", "down_proj")
NOISE = 0.3  # of the random weights that are left beside the state that the context begins as


@torch.no_grad()
def begin_as_last_blocks(network: BlockModel, model) -> tuple[int, ...]:
    """Let the layers of a new `network` begin as the last blocks of `model`; returns which ones, counted from 0.

    That is done for models whose blocks add attention, then a gated MLP, each after an RMS norm, to their input (Llama,
    Qwen, Mistral); an MLP of another width stays as it is. Other models, and those with fewer blocks than `network` has
    layers or other shapes of attention, give their final norm alone, if that is an RMS norm, and ()."""
    try:
        name = blocks_name(model, ())
    except UnsupportedArchitecture:
        return ()
    size = network.config.hidden_size
    around = model.get_submodule(name.rpartition(".")[0])
    norms = [child for child in around.children() if _is_rms_norm(child, size)]
    if len(norms) != 1:
        return ()
    network.norm.weight.copy_(_norm_weight(norms[0], size))
    layers = [layer for layer in network.layers if isinstance(layer, BlockLayer)]
    chosen = [*model.get_submodule(name).children()][-len(layers) :]
    if len(chosen) < len(layers) or not all(map(_can_begin, layers, chosen)):
        return ()
    size = network.config.hidden_size
    network.fc.weight.mul_(NOISE)
    network.fc.weight[:, -size:] += torch.eye(size, dtype=network.fc.weight.dtype, device=network.fc.weight.device)
    for layer, block in zip(layers, chosen, strict=True):
        _begin_layer(layer, block)
    return tuple(range(num_blocks(model) - len(chosen), num_blocks(model)))


def _begin_layer(layer: BlockLayer, block: Any) -> None:
    """The weights of `block`, whose norms' weights are multiplied into the matrices after them.

    The context has one norm for all layers, so that a layer's own norm has to be like it."""
    size = layer.input_layernorm.weight.shape[0]
    read = _norm_weight(block.input_layernorm, size)
    for name in ATTENTION[:3]:
        _copy(getattr(layer.self_attn, name), getattr(block.self_attn, name), read)
    _copy(layer.self_attn.o_proj, block.self_attn.o_proj)
    for name in HEAD_NORMS:
        own, theirs = getattr(layer.self_attn, name), dict(block.self_attn.named_children()).get(name)
        if isinstance(own, RMSNorm) and theirs is not None and _is_rms_norm(theirs, len(own.weight)):
            own.weight.copy_(_norm_weight(theirs, len(own.weight)))
    if _fits(layer.mlp, block.mlp, MLP):
        read = _norm_weight(block.post_attention_layernorm, size)
        for name in MLP[:2]:
            _copy(getattr(layer.mlp, name), getattr(block.mlp, name), read)
        _copy(layer.mlp.down_proj, block.mlp.down_proj)


def _copy(own: nn.Linear, theirs: nn.Module, read: Tensor | None = None) -> None:
    """Take the weight of `theirs`, its columns times `read`, and its bias where both have one."""
    weight = plain_weight(theirs).to(own.weight.dtype)
    own.weight.copy_(weight if read is None else weight * read)
    bias = dict(theirs.named_parameters(recurse=False)).get("bias")
    if own.bias is not None and bias is not None:
        own.bias.copy_(bias)


def _fits(own: nn.Module, theirs: nn.Module, names: tuple[str, ...]) -> bool:
    """Whether these products are plain ones of the same shapes in both."""
    mine, other = dict(own.named_children()), dict(theirs.named_children())
    pairs = [(mine[name], other.get(name)) for name in names]
    return all(isinstance(one, nn.Linear) and one.weight.shape == product.weight.shape for product, one in pairs)


def _can_begin(layer: BlockLayer, block: nn.Module) -> bool:
    """Whether a decoder block has the norms and products of `layer`, its attention's in the same shapes."""
    size = layer.input_layernorm.weight.shape[0]
    parts = {part: child for part, child in block.named_children() if any(True for _ in child.parameters())}
    if {*parts} != {*PARTS} or not all(_is_rms_norm(parts[part], size) for part in (PARTS[0], PARTS[2])):
        return False
    return _fits(layer.self_attn, parts["self_attn"], ATTENTION)


def _is_rms_norm(module: nn.Module, size: int) -> bool:
    """Whether it holds one weight `[size]`, and has numbers that are all alike times it, whatever their size."""
    shapes = [weight.shape for weight in module.parameters()]
    if shapes != [(size,)]:
        return False
    once, other = _norm_weight(module, size), _norm_weight(module, size, -2.0)
    return bool(once.any()) and torch.allclose(once, -other, rtol=1e-2)


def _norm_weight(norm: nn.Module, size: int, number: float = 1.0) -> Tensor:
    """What an RMS norm multiplies by, `[size]` float32: the weight that it holds, or one more than that (Gemma)."""
    weight = next(norm.parameters())
    return norm(torch.full((1, 1, size), number, dtype=weight.dtype, device=weight.device))[0, 0].float()
