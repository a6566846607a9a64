"""Checkpoints that unpack their weights before the model's first forward."""

from torch import nn

HOOK = "ct_decompress_hook"  # the attribute in which compressed-tensors keeps the handle of its hook


def unpack(model: nn.Module) -> None:
    """Let a compressed-tensors model unpack its weights now, as its own first forward would.

    A forward of a twin would otherwise unpack the twin, whose modules share their weights with the model's."""
    hook = model._forward_pre_hooks.get(getattr(vars(model).get(HOOK), "id", -1))
    if hook is not None:
        hook(model, ())
