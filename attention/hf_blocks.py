"""The decoder blocks of a model through torch.compile: those of one kind share what the compiler made for the first.

Compiling 32 equal blocks as one graph takes minutes. Each block is handed the cache as if it had one layer, its own, so that nothing
that the compiler sees tells one block from the next.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import nn

from attention.hf_fusion import shallow_copy

COMPILER = {"backend": "inductor"}
SHAPES = 1024  # that torch.compile may meet, over all models: each is compiled anew


def compile_blocks(model: nn.Module) -> nn.Module:
    """A twin of `model`, with the same weights, whose decoder blocks are compiled, each shape when it is first met.

    Blocks are the members of a ModuleList that attend; what stands beside such a list (final norm, rotary embedding) is compiled too, except for
    embeddings. What the compiler cannot take whole is an error, and so are more shapes than SHAPES. Hand the twin its batch as `paged`.
    """
    twin, stacked = shallow_copy(model), any(map(_is_stack, model._modules.values()))
    for name, child in model._modules.items():
        if _is_stack(child):
            stack = twin._modules[name] = shallow_copy(child)
            stack._modules = {key: _compiled(block, _layer(block)) for key, block in child._modules.items()}
        elif child is not None and not isinstance(child, nn.Embedding | nn.ModuleList):
            if stacked:
                twin._modules[name] = _compiled(child)
            elif _layer(child) is not None:
                twin._modules[name] = compile_blocks(child)
    return twin


def _is_stack(module: nn.Module | None) -> bool:
    return isinstance(module, nn.ModuleList) and len(module) > 0 and None not in map(_layer, module)


def _layer(module: nn.Module) -> int | None:
    """The number of the first layer that attends in a module; None if none does."""
    return next((m.layer_idx for m in module.modules() if getattr(m, "layer_idx", None) is not None), None)


def _compiled(module: nn.Module, layer: int | None = None) -> nn.Module:
    """A twin of a module whose forward is compiled; that of a `layer` sees one layer of the cache."""
    twin = shallow_copy(module)

    def forward(*arguments, **keywords):
        if layer is not None:
            keywords["paged"] = keywords["paged"].of_layer(layer)
        return _compiler()(module, *arguments, **keywords)

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
