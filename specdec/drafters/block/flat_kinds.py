"""What a flat config decides by its architecture: heads, which places predict, states that are read, causal layers.

Sources: z-lab's DFlash, DeepSpec, SpecForge 0.2.0 (Domino, arXiv 2605.29707) and NeMo AutoModel (DFlash, Domino and
JetSpec, arXiv 2606.18394, whose blocks are causal)."""

from typing import Any

from specdec.drafters.block.reading import heads_of, selector_of
from specdec.drafters.files.fields import REQUIRED, Fields
from specdec.drafters.files.reading import TargetShape

NEMO = "Qwen3DFlashDraftModel"
FROM_ANCHOR = {
    "DFlashDraftModel": False,
    "DFlash2DraftModel": False,
    "Qwen3DSparkModel": True,
    "DominoDraftModel": False,
    NEMO: False,
}
"""The architectures, and whether place k of a block predicts the token after it."""
PROJECTORS = {"DominoDraftModel": ("domino",), "DFlashDraftModel": ("dflash", "domino"), NEMO: ("dflash", "domino")}
"""The heads that the field `projector_type` of an architecture may name, its own first; others: DFlash's, none."""


class Either:
    """Fields that lie at top level or in `dflash_config`."""

    def __init__(self, outer: Fields, inner: Fields):
        self._outer, self._inner = outer, inner

    def take(self, name: str, kind: type, default: Any = REQUIRED) -> Any:
        """The field `name`. Raises ValueError for two values of it, and as `Fields.take` does."""
        found = [some.take(name, kind) for some in (self._outer, self._inner) if name in some]
        if len(found) == 2 and found[0] != found[1]:
            raise ValueError(f"{name} is {found[0]!r} in {self._outer.where} and {found[1]!r} in {self._inner.where}")
        return found[0] if found else self._outer.take(name, kind, default)


def architecture(fields: Fields) -> str:
    """The one of `FROM_ANCHOR` that a file names. Raises ValueError for others."""
    names = fields.take("architectures", list)
    if len(names) != 1 or names[0] not in FROM_ANCHOR:
        raise ValueError(f"config.json: architectures must be one of {', '.join(FROM_ANCHOR)}, got {names!r}")
    if (kind := fields.take("model_type", str, "qwen3")) != "qwen3":
        raise ValueError(f"config.json: model_type must be 'qwen3', got {kind!r}")
    return names[0]


def is_domino(both: Either, name: str) -> bool:
    """Whether a file of this architecture has Domino's head. Raises ValueError for heads that it cannot have."""
    known = PROJECTORS.get(name, ("dflash",))
    if (kind := both.take("projector_type", str, known[0])) not in known:
        raise ValueError(f"config.json: projector_type of {name} must be one of {', '.join(known)}, got {kind!r}")
    return kind == "domino"


def read_heads(both: Either, name: str, domino: bool) -> tuple[dict[str, Any], str]:
    """The heads and `from_anchor` as fields of `BlockConfig`, and what says which places predict."""
    if domino:
        shifted = both.take("shift_label", bool, False)
        head = dict(
            markov="domino", markov_rank=both.take("emb_dim", int), memory_size=both.take("gru_hidden_dim", int),
            plain_slots=both.take("pure_draft_prefix_len", int, 0), confidence="none", from_anchor=shifted,
        )  # fmt: skip
        return head, f"shift_label {shifted}"
    from_anchor = dict(from_anchor=both.take("sample_from_anchor", bool, FROM_ANCHOR[name]))
    if name == "DFlash2DraftModel":
        names = ("selector_rank", "selector_top_k", "conv_kernel_size", "conv_group_size")
        return selector_of(*(both.take(field, int) for field in names)) | from_anchor, "as this architecture has it"
    rank, kind = both.take("markov_rank", int, 0), both.take("markov_head_type", str, "vanilla")
    confident = both.take("enable_confidence_head", bool, False)
    heads = heads_of(rank, kind, confident, both.take("confidence_head_with_markov", bool, False))
    return heads | from_anchor, "as this architecture has it"


def read_layers(both: Either, name: str, count: int, target: TargetShape) -> list[int]:
    """The target's layers that a drafter of `count` layers reads: the file's, else what DFlash's classes begin with."""
    given = both.take("target_layer_ids", list, REQUIRED if name not in PROJECTORS else None)
    if given is not None:
        return given
    if count == 1:
        return [target.num_layers // 2]
    span = target.num_layers - 4
    return [round(1 + index * span / (count - 1)) for index in range(count)]


def read_causal(fields: Fields, block: Fields, name: str, count: int) -> tuple[tuple[bool, ...] | None, str]:
    """Which layers are causal in a block: what the file says of all, else those with a window; and a note.

    JetSpec says `causal_head` in `dflash_config`, and NeMo `causal`, beside an `is_causal` that it writes as false for
    all its kinds. Raises ValueError where the fields contradict each other."""
    said = {"is_causal": fields.take("is_causal", bool, None), "causal": block.take("causal", bool, None)}
    said["causal_head"] = block.take("causal_head", bool, False) or None
    if name == NEMO and said["causal"] is not None:
        del said["is_causal"]
    given = {field: value for field, value in said.items() if value is not None}
    if len({*given.values()}) > 1:
        shown = " and ".join(f"{field} is {value}" for field, value in given.items())
        raise ValueError(f"config.json: {shown}, which contradict each other: is a block causal?")
    if given:
        field, value = next(iter(given.items()))
        note = f"a place of a block sees {'only those up to itself' if value else 'all others'} ({field} {value})"
        return (value,) * count if value else None, note
    kinds = fields.take("layer_types", list, ["full_attention"] * count)
    causal = tuple(kind == "sliding_attention" for kind in kinds)
    return (causal if any(causal) else None), f"causal in a block: layers with windows, {causal}"
