"""A twin of a transformers model: same weights and hooks, own configuration, so that the user's model stays untouched.

Only modules that hold a configuration, and the modules that contain these, are copied, shallowly. All others
(projections, norms, adapters) are the model's own objects. Copies share the dictionaries of parameters, buffers and
hooks with the originals, so a change to either side is seen on both."""

import copy
from dataclasses import dataclass, field
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from transformers import PreTrainedConfig

from attention.hf.unpacking import unpack

if TYPE_CHECKING:  # importing it takes seconds
    from transformers import PreTrainedModel

SLOT = "_paged_call"  # attribute of the twin's modules that holds its `CallSlot`
ATTENTION_SETTING = "_attn_implementation_internal"  # field of a configuration that names the attention function
PADDING_CHECK = "warn_if_padding_and_no_attention_mask"  # method of transformers' models that only warns


@dataclass(slots=True)
class CallSlot:
    """State of the forward that a twin is running; a twin runs one at a time.

    batch: describes the packed tokens (an `AttentionBatch`; a `Probe` in the probe forward).
    attended: number of attention calls so far, which is the next layer of the cache.
    recurred: number of calls of recurrent functions so far, which is the next recurrent layer.
    hidden: input of the output layer.
    keep: packed indices `[M]` of the tokens that the output layer computes; None: all that it is called with.
    wanted, inputs: decoder blocks whose inputs are wanted, and these inputs.
    """

    batch: Any = None
    attended: int = 0
    recurred: int = 0
    hidden: Tensor | None = None
    keep: Tensor | None = None
    wanted: frozenset[int] = frozenset()
    inputs: dict[int, Tensor] = field(default_factory=dict)

    def forget(self) -> None:
        """Let go of the hidden states of a forward, and of what was wanted of them."""
        self.hidden, self.keep, self.wanted, self.inputs = None, None, frozenset(), {}


@dataclass(slots=True)
class Twin:
    """A `model` that shares weights with the original, its own `configs`, and the `slot` its attention calls read.

    originals: the configurations that `configs` are copies of.
    """

    model: "PreTrainedModel"
    configs: list[PreTrainedConfig]
    originals: list[PreTrainedConfig]
    slot: CallSlot = field(default_factory=CallSlot)

    def attend_through(self, name: str) -> None:
        """Use the attention and mask functions registered as `name`."""
        for config in self.configs:
            vars(config)[ATTENTION_SETTING] = name


def configs_of(model: "PreTrainedModel") -> list[PreTrainedConfig]:
    """All configurations that the modules of `model` hold, each once, that of the text part included."""
    found = [
        value for module in model.modules() for value in vars(module).values() if isinstance(value, PreTrainedConfig)
    ]
    found.append(model.config.get_text_config())
    return list({id(config): config for config in found}.values())


def make_twin(model: "PreTrainedModel", whole: bool = False) -> Twin:
    """The twin of `model`, which unpacks its weights first if it would do so in its own first forward (`unpack`).

    whole: copy all modules, with the hooks that they have now: for forwards that add some, as those of transformers do
        which return hidden states of a vision tower.

    A module whose `forward` was replaced by a closure over the module itself still calls the original.

    >>> layer = nn.Module()
    >>> layer.config, layer.inner = PreTrainedConfig(), nn.Linear(2, 2)
    >>> twin = make_twin(layer)
    >>> twin.model.inner is layer.inner, twin.model.config is layer.config
    (True, False)
    """
    unpack(model)
    memo: dict[int, object] = {}
    originals = configs_of(model)
    copies = [copy.deepcopy(config, memo) for config in originals]
    copy_of = {id(config): twin for config, twin in zip(originals, copies, strict=True)}
    slot = CallSlot()
    twins: dict[int, nn.Module] = {}

    def twin_of(module: nn.Module) -> nn.Module:
        if id(module) in twins:
            return twins[id(module)]
        children = {name: None if child is None else twin_of(child) for name, child in module._modules.items()}
        held = {name: copy_of[id(value)] for name, value in vars(module).items() if id(value) in copy_of}
        unchanged = all(children[name] is child for name, child in module._modules.items())
        if unchanged and not held and not whole:
            twins[id(module)] = module
            return module
        twin = copy.copy(module)
        vars(twin).update(held)
        vars(twin)[SLOT] = slot
        if hasattr(twin, PADDING_CHECK):  # packed tokens have no padding, and the check would synchronise
            vars(twin)[PADDING_CHECK] = _nothing
        if not unchanged:  # otherwise both share the dictionary, so a child replaced later is replaced in both
            twin._modules = children
        for name, value in vars(module).items():
            if whole and "hooks" in name and isinstance(value, dict):
                value = copy.copy(value)
            vars(twin)[name] = vars(twin)[name] if name in held or name == "_modules" else rebound(value, module, twin)
        twins[id(module)] = twin
        return twin

    twin = cast("PreTrainedModel", twin_of(model))
    if twin is model:  # no module of it holds a configuration
        twin = copy.copy(model)
        vars(twin)[SLOT] = slot
    return Twin(twin, copies, originals, slot)


def _nothing(*_, **__) -> None:
    pass


def rebound(value: Any, module: nn.Module, twin: nn.Module) -> Any:
    """`value`; a method of `module`, or a partial call with `module` as an argument, is bound to `twin` instead.

    accelerate's hooks are such partial calls."""
    if isinstance(value, MethodType) and value.__self__ is module:
        return MethodType(value.__func__, twin)
    if isinstance(value, partial) and any(argument is module for argument in value.args):
        arguments = (twin if argument is module else argument for argument in value.args)
        bound = partial(value.func, *arguments, **value.keywords)
        vars(bound).update(vars(value))
        return bound
    return value
