"""The names under which Medusa heads are published, as a table of rules: published name -> ours.

Ours are Medusa's own: `{head}.{block}.linear.weight` and `.bias` for residual blocks, and for the output layer after
them `{head}.{number of blocks}.weight`. Sources: FasterDecoding/Medusa `medusa/model/medusa_model.py`; NVIDIA ModelOpt
`modelopt/torch/speculative/plugins/transformers.py`; vLLM `vllm/model_executor/models/medusa.py` and
`vllm/transformers_utils/configs/medusa.py`."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

TOKEN_MAP = "token_map"  # which tokens the rows of a truncated output layer stand for
SHARED_OUTPUT = "output.weight"  # one output layer for all heads
QUANTISED = re.compile(r".*(scales?|scale_inv|scale_\d|qweight|qzeros|zero_point|weight_packed|absmax|g_idx)")
_PLAIN = r"(\d+\.\d+\.(?:(?:linear|down|up)\.)?(?:weight|bias))"
_MEDUSA = ("medusa_num_heads", "medusa_num_layers")


@dataclass(frozen=True, slots=True)
class Layout:
    """One published layout.

    name, example   for messages
    rules           regular expressions of whole names, and our names, where `{layers}` is the number of blocks; the
                    first rule is the one that a layout is recognised by
    counts          names in config.json of the numbers of heads and of blocks, and where else they may be
    in_model        whether heads may lie among the weights of their whole model
    counts_heads    whether the config's number of heads counts, not that of the weights
    """

    name: str
    example: str
    rules: tuple[tuple[str, str], ...]
    counts: tuple[tuple[str, str], ...] = (_MEDUSA,)
    in_model: bool = False
    counts_heads: bool = False


LAYOUTS = (
    Layout("Medusa", "0.0.linear.weight", ((_PLAIN, r"\1"),)),
    Layout("Medusa in a model", "medusa_head.0.0.linear.weight", ((rf"medusa_head\.{_PLAIN}", r"\1"),), in_model=True),
    Layout(
        "ModelOpt", "medusa_heads.0.0.linear.weight", ((rf"medusa_heads\.{_PLAIN}", r"\1"),),
        counts=(_MEDUSA, ("medusa.num_medusa_heads", "medusa.num_medusa_layers")), in_model=True,
    ),
    Layout(
        "vLLM", "blocks.0.layers.0.weight",
        (
            (r"(?:medusa_heads\.)?blocks\.(\d+)\.layers\.(\d+)\.(weight|bias)", r"\1.\2.linear.\3"),
            (r"(?:medusa_heads\.)?lm_heads\.(\d+)\.weight", r"\1.{layers}.weight"),
            (r"(?:medusa_heads\.)?lm_head\.weight", SHARED_OUTPUT),
            (r"(?:medusa_heads\.)?token_map", TOKEN_MAP),
        ),
        counts=(("num_heads", "num_hidden_layers"), _MEDUSA), counts_heads=True,
    ),
)  # fmt: skip


def find_layout(names: Iterable[str], source: str) -> Layout:
    """The layout of these names. Raises ValueError, naming `source`, where none or two of them fit."""
    names = sorted(names)
    found = [layout for layout in LAYOUTS if any(re.fullmatch(layout.rules[0][0], name) for name in names)]
    if len(found) == 1:
        return found[0]
    if found:
        examples = [next(name for name in names if re.fullmatch(layout.rules[0][0], name)) for layout in found]
        raise ValueError(
            f"{source} has heads in {len(found)} layouts, {_listed(found)}: its weights are, for instance, "
            f"{_some(examples)}"
        )
    raise ValueError(
        f"{source} has no heads in a layout that is known here: its weights are {_some(names)}; known are "
        f"{_listed(LAYOUTS)}"
    )


def renamed(layout: Layout, names: Iterable[str], layers: int, whole: bool, source: str) -> dict[str, str]:
    """Our name of each weight of the heads; with `whole` the weights of a model beside them are left out.

    Raises ValueError, naming `source`, for names that the layout does not have."""
    found, unknown = dict[str, str](), []
    for name in sorted(names):
        ours = next((match.expand(to) for rule, to in layout.rules if (match := re.fullmatch(rule, name))), None)
        if ours is not None:
            found[name] = ours.replace("{layers}", str(layers))
        elif not (whole and layout.in_model) or name.startswith("medusa"):
            unknown.append(name)
    if unknown:
        quantised = " (quantised heads are not read)" if any(map(QUANTISED.fullmatch, unknown)) else ""
        raise ValueError(
            f"the heads in {source} have unknown weights: {_some(unknown)}{quantised}; their layout is "
            f"{_listed([layout])}"
        )
    return found


def _listed(layouts: Iterable[Layout]) -> str:
    return ", ".join(f"{layout.name} ({layout.example})" for layout in layouts)


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
