"""Decoder blocks of a model through torch.compile; blocks of one kind share the code compiled for the first.

Compiling 32 equal blocks as one graph takes minutes. Therefore each block is compiled alone and sees the cache as if it
had one layer only, so that nothing the compiler reads differs from block to block."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import TypeVar

import torch
from torch import nn

from attention.hf.twin import CallSlot
from specdec.model.fusion.projections import shallow_copy

M = TypeVar("M", bound=nn.Module)
BACKEND = "inductor"
SHAPES = 1024  # input shapes, over all models, each of which is compiled separately


def compile_blocks(model: M, layers: Sequence[str], slot: CallSlot) -> M:
    """A twin of `model`, with the same weights, whose decoder blocks are compiled, for each shape on its first use.

    layers: names of the modules that attend, in the order of the cache's layers.
    slot: the state of a forward that these modules read.

    Blocks are the members of a ModuleList that attend. Modules beside that list (final norm, rotary embedding) are
    compiled too, embeddings are not. A forward fails where the compiler cannot compile a block as a whole, and after
    SHAPES shapes. Raises ValueError for a block that attends more than once."""
    return _with_compiled(model, "", layers, slot)


def _with_compiled(model: M, prefix: str, layers: Sequence[str], slot: CallSlot) -> M:
    attending = {name: _attending(f"{prefix}{name}.", layers) for name in model._modules}
    has_blocks = any(isinstance(child, nn.ModuleList) and attending[name] for name, child in model._modules.items())
    twin = shallow_copy(model)
    for name, child in model._modules.items():
        if isinstance(child, nn.ModuleList) and attending[name]:
            blocks = twin._modules[name] = shallow_copy(child)
            blocks._modules = {
                key: _compiled(block, _attending(f"{prefix}{name}.{key}.", layers), slot)
                for key, block in child._modules.items()
                if block is not None
            }
        elif child is not None and not isinstance(child, nn.Embedding | nn.ModuleList):
            if has_blocks:
                twin._modules[name] = _compiled(child, attending[name], slot)
            elif attending[name]:
                twin._modules[name] = _with_compiled(child, f"{prefix}{name}.", layers, slot)
    return twin


def _attending(prefix: str, layers: Sequence[str]) -> list[int]:
    """Which layers of the cache belong to modules whose names begin with `prefix`."""
    return [layer for layer, name in enumerate(layers) if f"{name}.".startswith(prefix)]


def _compiled(module: nn.Module, layers: Sequence[int], slot: CallSlot) -> nn.Module:
    """A twin of a module with a compiled forward, which sees only its own layer of the cache, if it has one."""
    if len(layers) > 1:
        raise ValueError(
            f"{type(module).__name__} attends {len(layers)} times in a forward, so its blocks cannot be "
            'compiled: use mode="graph" or "eager"'
        )
    twin = shallow_copy(module)

    def forward(*arguments, **keywords):
        if not layers:
            return _compiler()(module, *arguments, **keywords)
        whole, attended = slot.batch, slot.attended
        slot.batch = whole.of_layer(layers[0])
        try:
            return _compiler()(module, *arguments, **keywords)
        finally:
            slot.batch, slot.attended = whole, attended + 1

    vars(twin)["forward"] = forward
    return twin


@cache
def _compiler() -> Callable:
    compiled = torch.compile(_call, fullgraph=True, dynamic=False, backend=BACKEND)

    def run(*arguments, **keywords):
        with torch._dynamo.config.patch(recompile_limit=SHAPES, accumulated_recompile_limit=SHAPES):
            return compiled(*arguments, **keywords)

    return run


def _call(module: nn.Module, *arguments, **keywords):
    return module.forward(*arguments, **keywords)
