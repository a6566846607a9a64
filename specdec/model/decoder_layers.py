"""Where a model keeps its decoder layers, and what beside them is no part of its text model."""

from typing import TYPE_CHECKING, cast

from torch import nn

if TYPE_CHECKING:  # importing it takes seconds
    from transformers import PreTrainedModel


def name_of_layers(model: "PreTrainedModel") -> str:
    """The name of the list of decoder layers; a vision tower may have one of the same length.

    Raises ValueError for a model that does not have exactly one."""
    total = model.config.get_text_config().num_hidden_layers
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    names = [name for name, module in lists if len(module) == total]
    if len(names) > 1:
        decoder = {id(module) for module in model.get_decoder().modules()}
        names = [name for name in names if id(model.get_submodule(name)) in decoder] or names
    if len(names) != 1:
        raise ValueError(
            f"{type(model).__name__} must have one list of {total} layers, got {len(names)}: {', '.join(names)}"
        )
    return names[0]


def other_parts(model: "PreTrainedModel") -> list[str]:
    """The names of a composite model's modules that text alone does not run through: a vision tower, its projector.

    None where it cannot be told which list of layers is that of the text model."""
    if model.config is model.config.get_text_config():
        return []
    try:
        layers = name_of_layers(model)
    except ValueError:
        return []
    found, prefix, outer = list[str](), "", cast(nn.Module, model)
    for name in layers.split(".")[:-1]:
        kept = name, *(key for key, child in outer.named_children() if child is model.get_output_embeddings())
        decoder = outer is model.get_decoder()
        found += [] if decoder else [f"{prefix}{key}" for key, _ in outer.named_children() if key not in kept]
        prefix, outer = f"{prefix}{name}.", outer.get_submodule(name)
    return found
