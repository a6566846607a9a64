"""The layers of a frozen model, spread over the processes that train a drafter for it (Zhao et al. 2023, FSDP)."""

from typing import TYPE_CHECKING

from specdec.model.decoder_layers import name_of_layers

if TYPE_CHECKING:  # importing it takes seconds
    from transformers import PreTrainedModel


def is_fsdp(accelerator) -> bool:
    """Whether `accelerate launch --use_fsdp` has started this process (on GPUs: accelerate has no FSDP of CPUs)."""
    return accelerator.distributed_type == "FSDP"


def shard_layers(model: "PreTrainedModel", accelerator) -> None:
    """Keep on each process its share of every decoder layer, by torch's `fully_shard`.

    A forward then gathers one layer after the other, so all processes must run the same forwards. Embeddings and output
    layer, which losses read as often as a process has labels, stay whole everywhere. `model` stays spread: load it
    again for anything else. Raises ValueError for one process, or weights that learn."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if accelerator.num_processes < 2:
        raise ValueError("a model's layers are spread over at least 2 processes, got 1")
    layers = model.get_submodule(name_of_layers(model))
    if any(parameter.requires_grad for parameter in layers.parameters()):
        raise ValueError(f"{type(model).__name__} learns too (joint steps), so its layers cannot be spread")
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for layer in layers.children():
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
