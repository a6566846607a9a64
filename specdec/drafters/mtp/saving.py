"""MTP modules to a checkpoint of their own, under the names that their format has in the target's checkpoint."""

import copy
import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from specdec.drafters.files.writing import write_drafter
from specdec.drafters.mtp.drafter import MtpModule
from specdec.drafters.mtp.layouts import EMBEDDING, FINAL_NORM, HEAD, HIDDEN_NORM, PROJECTION, TOKEN_NORM
from specdec.drafters.mtp.network import MtpInput, final_norm
from specdec.loading import read_weights, weight_places
from specdec.model.decoder_layers import name_of_layers


def save_mtp(modules: Sequence[MtpModule], folder: str | Path) -> None:
    """Write config.json, the target's own, and model.safetensors, which has the weights of all `modules` alone.

    `specdec.load_drafter(folder, target, kind="mtp")` reads them; other engines look for them in the target's
    checkpoint, to which the file is one more shard. The modules are numbered in their order. Raises ValueError for
    weights that the layout has no name for, and for modules of several targets or layouts."""
    first, several = modules[0], [(module.model, module.layout.name) for module in modules]
    if any(model is not first.model or name != first.layout.name for model, name in several):
        raise ValueError(f"modules of one target and layout are saved together, got {[name for _, name in several]}")
    config = copy.deepcopy(first.model.config)
    text = config.get_text_config()
    if first.layout.count_field is not None:
        setattr(text, first.layout.count_field, len(modules))
    held = dict[str, Tensor]()
    for number, module in enumerate(modules):
        weights = weights_of(module)
        last = max(int(name.split(".")[1]) for name in weights if name.startswith("layers."))
        for name, weight in weights.items():
            held[first.layout.written(number, name, text.num_hidden_layers, last)] = weight
    write_drafter(folder, json.loads(config.to_json_string(use_diff=False)), held, _dtype(first))


def weights_of(module: MtpModule) -> dict[str, Tensor]:
    """The weights of a module, named as by `find_modules`; embeddings and output layer only where they are its own.

    transformers writes those of the decoder layers, which its models may hold in another form than checkpoints do."""
    network, target = module.network, module.model
    layers, first = name_of_layers(network), network.get_input_embeddings()
    assert isinstance(first, MtpInput)
    state = {name: value for name, value in network.state_dict().items() if name.startswith(f"{layers}.")}
    with tempfile.TemporaryDirectory() as folder:
        network.save_pretrained(folder, state_dict=state)
        places = weight_places(Path(folder))
        written = read_weights(places, places)
    found = dict[str, Tensor]()
    for name, value in written.items():
        place = re.search(
            r"(?:^|\.)(layers\.\d+\..+)", name
        )  # checkpoints may say "backbone.layers" for "model.layers"
        if place is None:
            raise ValueError(f"{type(network).__name__} writes a weight of its layers under the name {name}")
        found[place[1]] = value
    parts: dict[str, nn.Module | None] = {
        TOKEN_NORM: first.token_norm, HIDDEN_NORM: first.hidden_norm, PROJECTION: first.projection,
        FINAL_NORM: final_norm(network), EMBEDDING: first.own_embedding,
    }  # fmt: skip
    head = network.get_output_embeddings()
    parts[HEAD] = None if head is target.get_output_embeddings() else head
    for part, one in parts.items():
        found |= {f"{part}.{leaf}": value for leaf, value in (one.state_dict() if one is not None else {}).items()}
    return found


def _dtype(module: MtpModule) -> torch.dtype:
    return next(module.network.parameters()).dtype
