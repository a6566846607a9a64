"""Where a model keeps its decoder layers."""

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:  # importing it takes seconds
    from transformers import PreTrainedModel


def name_of_layers(model: "PreTrainedModel") -> str:
    """The name of the list of decoder layers. Raises ValueError for a model that does not have exactly one."""
    total = model.config.get_text_config().num_hidden_layers
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    names = [name for name, module in lists if len(module) == total]
    if len(names) != 1:
        raise ValueError(
            f"{type(model).__name__} must have one list of {total} layers, got {len(names)}: {', '.join(names)}"
        )
    return names[0]
