"""Quantised targets and drafts for `scripts.bench_generate`: what is refused, and what stays in 16 bits."""

import copy
from collections.abc import Mapping

from torch import Tensor, nn

from scripts.common.quantise import GROUP, KINDS, linear_layers, misfits, quantise, require_torchao

NONE = "none"
CHOICES = (NONE, *KINDS)


def kinds_of(settings: Mapping) -> tuple[str, str]:
    """The kinds of target and draft; results of older runs name none."""
    return settings.get("target_quant", NONE), settings.get("draft_quant", NONE)


def refusal(options, has_draft: bool) -> str | None:
    """Why the kinds of the command line cannot work, before any model is made; None where they can.

    Raises ImportError without torchao."""
    target, draft = kinds = kinds_of(vars(options))
    if set(kinds) == {NONE}:
        return None
    require_torchao()
    if draft != NONE and not has_draft:
        return f"--draft-quant {draft} needs a draft model: --draft"
    if options.acceptance is not None and target != draft:
        return (
            f"--acceptance plants wrong tokens in an exactly right draft, which one of kind {draft!r} is not for a "
            f"target of kind {target!r}: quantise both alike"
        )
    if "int4" in kinds and options.device == "cuda" and options.dtype != "bfloat16":
        return f"int4 on a GPU multiplies in bfloat16 only, got --dtype {options.dtype}"
    return None


def require_layers(model, kind: str, what: str) -> None:
    """Raise ValueError where quantising `model`, called `what`, as `kind` would change nothing or break it."""
    if kind == NONE:
        return
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(f"the {what} is a checkpoint that is quantised already, so it cannot become {kind}")
    if kind == "int4" and len(misfits(model)) == len(linear_layers(model)):
        raise ValueError(f"no linear layer of the {what} divides into groups of {GROUP}, so {kind} would change none")


def quantise_pair(target, draft, target_kind: str, draft_kind: str):
    """Quantise both in place -> (draft, {"target" and "draft": names of layers that stay in 16 bits}).

    A draft that shares layers with the target gets layers of its own first, unless both become the same.

    Raises ValueError for a model that cannot become what is asked."""
    shares = draft is not None and not set(draft.parameters()).isdisjoint(target.parameters())
    if shares and target_kind != draft_kind:
        stay = {id(module): module for module in (draft.get_input_embeddings(), draft.get_output_embeddings())}
        draft, shares = copy.deepcopy(draft, stay), False
    kept = {}
    for what, model, kind in (("target", target, target_kind), ("draft", draft, draft_kind)):
        if model is None or kind == NONE:
            continue
        if shares and what == "draft":  # quantised with the target
            kept[what] = [name for name in kept["target"] if name in linear_layers(model)]
            continue
        require_layers(model, kind, what)
        kept[what] = quantise(model, kind)
    return draft, kept


def stored_bytes(weight: Tensor | nn.Parameter) -> int:
    """Bytes that a weight takes: of a quantised one, its numbers and scales."""
    if not hasattr(weight, "__tensor_flatten__"):
        return weight.numel() * weight.element_size()
    names, _ = weight.__tensor_flatten__()
    return sum(stored_bytes(getattr(weight, name)) for name in names)
