"""The decoder blocks of a model through torch.compile: those of one kind share what the compiler made for the first.

Compiling 32 equal blocks as one graph takes minutes. Each block is handed the cache as if it had one layer, its own, so
that nothing that the compiler sees tells one block from the next."""

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import nn

from attention.hf.twin import CallSlot
from specdec.model.fusion.projections import shallow_copy

COMPILER = {"backend": "inductor"}
SHAPES = 1024  # that torch.compile may meet, over all models: each is compiled anew


def compile_blocks(model: nn.Module, layers: Sequence[str], slot: CallSlot) -> nn.Module:
    """A twin of `model`, with the same weights, whose decoder blocks are compiled, each shape when it is first met.

    `layers` names the modules that attend, in the order of the cache's layers; `slot` is what they read. Blocks are the
    members of a ModuleList that attend; what stands beside such a list (final norm, rotary embedding) is compiled too,
    except for embeddings. What the compiler cannot take whole is an error, and so are more shapes than SHAPES. Raises
    ValueError for a block that attends more than once, or not in the order of the blocks."""
    return _with_compiled(model, "", layers, slot)


def _with_compiled(model: nn.Module, prefix: str, layers: Sequence[str], slot: CallSlot) -> nn.Module:
    inside = {name: _attending(f"{prefix}{name}.", layers) for name in model._modules}
    stacks = {
        name: child for name, child in model._modules.items() if isinstance(child, nn.ModuleList) and inside[name]
    }
    twin = shallow_copy(model)
    for name, child in model._modules.items():
        if name in stacks:
            stack = twin._modules[name] = shallow_copy(child)
            stack._modules = {
                key: _compiled(block, _attending(f"{prefix}{name}.{key}.", layers), slot)
                for key, block in child._modules.items()
            }
        elif child is not None and not isinstance(child, nn.Embedding | nn.ModuleList):
            if stacks:
                twin._modules[name] = _compiled(child, inside[name], slot)
            elif inside[name]:
                twin._modules[name] = _with_compiled(child, f"{prefix}{name}.", layers, slot)
    return twin


def _attending(prefix: str, layers: Sequence[str]) -> list[int]:
    """Which layers of the cache belong to modules below `prefix`."""
    return [layer for layer, name in enumerate(layers) if f"{name}.".startswith(prefix)]


def _compiled(module: nn.Module, own: Sequence[int], slot: CallSlot) -> nn.Module:
    """A twin of a module whose forward is compiled; one that attends sees its `own` layer of the cache, alone."""
    if len(own) > 1:
        raise ValueError(
            f"{type(module).__name__} attends {len(own)} times in a forward, so its blocks cannot be "
            'compiled: use mode="graph" or "eager"'
        )
    twin = shallow_copy(module)

    def forward(*arguments, **keywords):
        if not own:
            return _compiler()(module, *arguments, **keywords)
        whole, before = slot.batch, slot.attended
        slot.batch = whole.of_layer(own[0])
        try:
            return _compiler()(module, *arguments, **keywords)
        finally:
            slot.batch, slot.attended = whole, before + 1

    twin.forward = forward
    return twin


@cache
def _compiler() -> Callable:
    compiled = torch.compile(_call, fullgraph=True, dynamic=False, **COMPILER)

    def run(*arguments, **keywords):
        with torch._dynamo.config.patch(recompile_limit=SHAPES, accumulated_recompile_limit=SHAPES):
            return compiled(*arguments, **keywords)

    return run


def _call(module: nn.Module, *arguments, **keywords):
    return module.forward(*arguments, **keywords)
