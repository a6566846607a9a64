"""Whether a model has changed since its twins and CUDA graphs were made."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers import PreTrainedConfig

from attention.hf.device import offloads
from attention.hf.split import local_part
from attention.hf.twin import ATTENTION_SETTING
from specdec.model.streaming import streamed_by

if TYPE_CHECKING:  # importing it takes seconds
    from transformers import PreTrainedModel


PLAIN = {nn.Linear, nn.Embedding, nn.ModuleList, nn.Dropout, nn.Identity, nn.SiLU}  # which read no other settings
SCALARS = (int, float, bool, str)
SMALL = 256  # numbers of a buffer
# transformers' own hooks, which do nothing unless its caller wants hidden states, once one has wanted some
INACTIVE = "transformers.utils.output_capturing"


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What twins and graphs of a model depend on, for comparison only.

    hooked: whether any module has hooks, or weights that are offloaded or streamed, which no replay would call or
        bring.
    """

    values: tuple
    hooked: bool


def fingerprint(model: "PreTrainedModel", configs: Sequence[PreTrainedConfig]) -> Fingerprint:
    """Addresses of all weights and buffers, modules and their settings, hooks, replaced forwards, active adapters.

    configs: all that the model's modules hold."""
    values: list[object] = []
    kinds: set[type[nn.Module]] = set()
    hooked = bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)
    for module in model.modules():
        own = vars(module)
        values.append(id(module))
        kind = type(module)
        kinds.add(kind)
        if kind not in PLAIN:
            values += [value for value in own.values() if type(value) in SCALARS]
        for tensors in (own["_parameters"], own["_buffers"]):
            if tensors:
                values += [_place(x) for x in tensors.values() if x is not None]
        hooked = hooked or brings_weights(module)
        hooks = _hooks_of(module)
        hooked = hooked or bool(hooks)
        if hooks or "forward" in own or "_active_adapter" in own:
            values.append((id(module), hooks, id(own.get("forward")), *_adapter_state(module)))
        if isinstance(own.get("config"), PreTrainedConfig):  # its twin holds copies of these values
            values.append(id(own["config"]))
    for config in configs:
        values.append({name: value for name, value in vars(config).items() if name != ATTENTION_SETTING})
    values.append({(kind, id(kind.forward)) for kind in kinds})  # a forward may be replaced in the class
    return Fingerprint(tuple(values), hooked)


def has_hooks(model: nn.Module) -> bool:
    """Whether any module has hooks or offloaded weights, or PyTorch has hooks for all modules."""
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return True
    return any(_hooks_of(module) or brings_weights(module) for module in model.modules())


def _hooks_of(module: nn.Module) -> tuple[int, ...]:
    """The numbers of its hooks that may do something in our forwards."""
    own = vars(module)
    if not (own["_forward_hooks"] or own["_forward_pre_hooks"]):
        return ()
    hooks = [*own["_forward_hooks"].items(), *own["_forward_pre_hooks"].items()]
    return tuple(number for number, hook in hooks if getattr(hook, "__module__", None) != INACTIVE)


def brings_weights(module: nn.Module) -> bool:
    """Whether this very module's weights are brought to the device for each forward (offloaded, or streamed)."""
    return offloads(module) or streamed_by(module) is not None


def brings_weights_of(model: nn.Module) -> bool:
    """Whether weights of some module of `model` are, so that a pass costs the same for one token or hundreds."""
    return any(map(brings_weights, model.modules()))


def _place(x: Tensor) -> object:
    """Where and how a tensor lies; on a CPU also a small buffer's numbers, from which tables may have been made."""
    small = type(x) is Tensor and x.device.type == "cpu" and x.numel() <= SMALL
    where = local_part(x).data_ptr(), x.shape, x.stride()
    return (*where, repr(x.tolist())) if small else where  # as text, in which NaN equals itself


def _adapter_state(module: nn.Module) -> list[str]:
    """The adapters of a PEFT layer that are switched on or merged, and their scales."""
    names = "_active_adapter", "_disable_adapters", "merged_adapters", "scaling"
    return [repr(vars(module).get(name)) for name in names]
