"""Whether a model has changed since its twins and CUDA graphs were made."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedConfig

from attention.hf.twin import ATTENTION_SETTING, configs_of

if TYPE_CHECKING:  # importing it takes seconds
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What twins and graphs of a model depend on, for comparison only; `hooked`: whether any module has hooks."""

    values: tuple
    hooked: bool


def fingerprint(model: "PreTrainedModel") -> Fingerprint:
    """Addresses of all weights and buffers, modules and their settings, hooks, replaced forwards, active adapters."""
    values: list[object] = []
    hooked = False
    for module in model.modules():
        own = vars(module)
        values.append(id(module))
        values += [x.data_ptr() for kind in ("_parameters", "_buffers") for x in own[kind].values() if x is not None]
        hooks = (*own["_forward_hooks"], *own["_forward_pre_hooks"])
        hooked = hooked or bool(hooks)
        if hooks or "forward" in own or "_active_adapter" in own:
            values.append((id(module), hooks, id(own.get("forward")), *_adapter_state(module)))
        if isinstance(own.get("config"), PreTrainedConfig):  # its twin holds copies of these values
            values.append(tuple(value for value in own.values() if type(value) in (int, float, bool, str)))
    for config in configs_of(model):
        values.append({name: value for name, value in vars(config).items() if name != ATTENTION_SETTING})
    return Fingerprint(tuple(values), hooked)


def _adapter_state(module: nn.Module) -> list[str]:
    """The adapters of a PEFT layer that are switched on or merged."""
    return [repr(vars(module).get(name)) for name in ("_active_adapter", "_disable_adapters", "merged_adapters")]
