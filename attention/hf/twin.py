"""A twin of a transformers model: the same weights and hooks, but a configuration of its own, so that the user's model
is never touched.

Only modules that hold a configuration, and the modules around those, are copied, shallowly; all others (projections,
norms, adapters) are the very objects of the model. Parameters, buffers and hooks lie in dictionaries that both sides
share, so what is done to one is done to the other."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import MethodType

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

SLOT = "_paged_call"  # the attribute of a twin's modules that holds its `CallSlot`


ATTENTION_SETTING = "_attn_implementation_internal"  # the field of a configuration that says which attention runs
PADDING_CHECK = "warn_if_padding_and_no_attention_mask"  # a method of transformers' models that only warns


@dataclass(slots=True)
class CallSlot:
    """What one forward of a twin is told and what it leaves: one per twin, used by one forward at a time.

    `batch` describes the packed tokens; `attended` counts the attention calls so far, which are the cache's layers in
    order; `hidden` is what the output layer read."""

    batch: object | None = None
    attended: int = 0
    hidden: Tensor | None = None


@dataclass(slots=True)
class Twin:
    """`model` shares its weights with the model that it was made of; `configs` are its own configurations, `slot` is
    read by its attention calls.
    """

    model: nn.Module
    configs: list[PreTrainedConfig]
    slot: CallSlot = field(default_factory=CallSlot)

    def attend_through(self, name: str) -> None:
        """Make the twin's modules look up the attention (and mask) function that is registered as `name`."""
        for config in self.configs:
            vars(config)[ATTENTION_SETTING] = name


def configs_of(model: nn.Module) -> list[PreTrainedConfig]:
    """All configurations that the modules of `model` hold, each once, that of the text included."""
    found = [
        value for module in model.modules() for value in vars(module).values() if isinstance(value, PreTrainedConfig)
    ]
    found.append(model.config.get_text_config())
    return list({id(config): config for config in found}.values())


def make_twin(model: nn.Module) -> Twin:
    """The twin of `model`. Modules whose `forward` was replaced by a function that keeps hold of the module itself go
    on with the original.

    >>> layer = nn.Module()
    >>> layer.config, layer.inner = PreTrainedConfig(), nn.Linear(2, 2)
    >>> twin = make_twin(layer)
    >>> twin.model.inner is layer.inner, twin.model.config is layer.config
    (True, False)
    """
    memo: dict[int, object] = {}
    originals = configs_of(model)
    copies = [copy.deepcopy(config, memo) for config in originals]
    of_config = {id(config): twin for config, twin in zip(originals, copies, strict=True)}
    slot = CallSlot()
    twins: dict[int, nn.Module] = {}

    def twin_of(module: nn.Module) -> nn.Module:
        if id(module) in twins:
            return twins[id(module)]
        children = {name: None if child is None else twin_of(child) for name, child in module._modules.items()}
        held = {name: of_config[id(value)] for name, value in vars(module).items() if id(value) in of_config}
        unchanged = all(children[name] is child for name, child in module._modules.items())
        if unchanged and not held:
            twins[id(module)] = module
            return module
        twin = copy.copy(module)
        vars(twin).update(held)
        vars(twin)[SLOT] = slot
        if hasattr(twin, PADDING_CHECK):  # packed tokens hold no padding, and to look for it would wait for the device
            vars(twin)[PADDING_CHECK] = _nothing
        if not unchanged:  # else both sides share the dictionary, and with it whatever replaces a child later
            twin._modules = children
        for name, value in vars(module).items():
            vars(twin)[name] = vars(twin)[name] if name in held or name == "_modules" else rebound(value, module, twin)
        twins[id(module)] = twin
        return twin

    twin = twin_of(model)
    if twin is model:  # nothing in it holds a configuration
        twin = copy.copy(model)
        vars(twin)[SLOT] = slot
    return Twin(twin, copies, slot)


def _nothing(*_, **__) -> None:
    pass


def rebound(value, module: nn.Module, twin: nn.Module):
    """`value`, or where it is a method of `module` or a partial call that was given it (as accelerate's hooks are), the
    same for `twin`.
    """
    if isinstance(value, MethodType) and value.__self__ is module:
        return MethodType(value.__func__, twin)
    if isinstance(value, partial) and any(argument is module for argument in value.args):
        bound = partial(
            value.func, *(twin if argument is module else argument for argument in value.args), **value.keywords
        )
        vars(bound).update(vars(value))
        return bound
    return value


def tap_output_layer(twin: nn.Module, slot: CallSlot) -> None:
    """Let the output layer of a twin leave what it reads in `slot.hidden`. The layer itself is not touched; its parent
    in the twin gets a copy.
    """
    layer = twin.get_output_embeddings()
    if layer is None:
        return
    parent, name = next(
        ((parent, name) for parent in twin.modules() for name, child in parent._modules.items() if child is layer),
        (None, None),
    )
    if parent is None:
        return
    tapped = copy.copy(layer)
    forward: Callable = layer.forward

    def remember(hidden: Tensor, *arguments, **keywords) -> Tensor:
        if not torch.compiler.is_compiling():
            slot.hidden = hidden
        return forward(hidden, *arguments, **keywords)

    tapped.forward = remember
    parent._modules = {**parent._modules, name: tapped}
