"""Whether a model has changed since its twins and CUDA graphs were made."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedConfig

from attention.hf.twin import ATTENTION_SETTING

if TYPE_CHECKING:  # importing it takes seconds
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What twins and graphs of a model depend on, for comparison only; `hooked`: whether any module has hooks."""

    values: tuple
    hooked: bool


def fingerprint(model: "PreTrainedModel", configs: Sequence[PreTrainedConfig]) -> Fingerprint:
    """Addresses of all weights and buffers, modules and their settings, hooks, replaced forwards, active adapters.

    configs: all that the model's modules hold."""
    values: list[object] = []
    hooked = False
    for module in model.modules():
        own = vars(module)
        values.append(id(module))
        for tensors in (own["_parameters"], own["_buffers"]):
            if tensors:
                values += [x.data_ptr() for x in tensors.values() if x is not None]
        hooks = own["_forward_hooks"] or own["_forward_pre_hooks"]
        if hooks:
            hooks = (*own["_forward_hooks"], *own["_forward_pre_hooks"])
        hooked = hooked or bool(hooks)
        if hooks or "forward" in own or "_active_adapter" in own:
            values.append((id(module), hooks or (), id(own.get("forward")), *_adapter_state(module)))
        if isinstance(own.get("config"), PreTrainedConfig):  # its twin holds copies of these values
            values.append(id(own["config"]))
            values.append(tuple(value for value in own.values() if type(value) in (int, float, bool, str)))
    for config in configs:
        values.append({name: value for name, value in vars(config).items() if name != ATTENTION_SETTING})
    return Fingerprint(tuple(values), hooked)


def _adapter_state(module: nn.Module) -> list[str]:
    """The adapters of a PEFT layer that are switched on or merged."""
    return [repr(vars(module).get(name)) for name in ("_active_adapter", "_disable_adapters", "merged_adapters")]
