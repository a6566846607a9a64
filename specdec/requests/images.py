"""Images of a call: which inputs of the model's forward belong to them, and whether the target can see them."""

import inspect
import re
from collections.abc import Mapping

from torch import Tensor

from attention.hf.prompt import Prompts
from specdec.model.runner import ModelRunner

SEEN = re.compile(r"pixel_values")  # in the names of inputs without which there is no image
OTHERWISE = ("cache", "past_key_values", "inputs_embeds", "labels")  # no processor gives these


def has_images(inputs: Mapping[str, object]) -> bool:
    """Whether there are images or videos among the inputs of a model's forward."""
    encoded = inputs.get("mm_encoder_outputs")  # by which transformers replaces pixels that have gone through the tower
    return bool(encoded) or any(SEEN.search(name) and given is not None for name, given in inputs.items())


def image_prompts(target: ModelRunner, ids: Tensor, mask: Tensor, inputs: Mapping[str, object]) -> Prompts:
    """Prompts `ids [B, S]`, with `mask [B, S]` bool, and their `inputs`, on the target's device.

    Raises ValueError for a target that takes no images, and for inputs that lie elsewhere or that it does not take."""
    model = type(target.model).__name__
    known = inspect.signature(target.model.forward).parameters
    for name, given in inputs.items():
        if name not in known:
            pixels = [name for name in known if SEEN.search(name)]
            reads = f"an image is its {' or '.join(pixels)}" if pixels else "it reads text alone"
            raise ValueError(f"{name} cannot be used: {model} takes none, {reads}")
        if isinstance(given, Tensor) and given.device != target.device:
            raise ValueError(f"{name} are on {given.device}, the model on {target.device}")
    return Prompts(ids.to(target.device), mask.long().to(target.device), inputs)


def split_inputs(inputs: Mapping[str, object]) -> tuple[dict, dict]:
    """Inputs of a forward that sees images, and others, which may change nothing; without images all are others."""
    if not has_images(inputs):
        return {}, dict(inputs)
    others = {name: x for name, x in inputs.items() if x is None or isinstance(x, int) or name in OTHERWISE}
    return {name: given for name, given in inputs.items() if name not in others}, others
