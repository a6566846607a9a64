"""How checkpoints name the weights of their MTP modules.

Every module has the same four parts around decoder layers: a norm of the token's embedding, a norm of the hidden state
before it, a projection of both to one hidden state, and a norm before the target's output layer. Names and order are
those of the released checkpoints, as vLLM 0.33 reads them (`vllm/model_executor/models/*_mtp.py`)."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

TOKEN_NORM, HIDDEN_NORM, PROJECTION, FINAL_NORM = PARTS = "token_norm", "hidden_norm", "projection", "final_norm"
EMBEDDING, HEAD = "embedding", "head"  # copies of the target's, or own ones


@dataclass(frozen=True, slots=True)
class MtpLayout:
    """The names of one format.

    pattern: what precedes a name in a module. Its group "module" is the number of the module, its group "layer" that of
        a decoder layer in the only module; without one there is one module, or one layer.
    names: of `PARTS`, and of embedding and head.
    prefix: what precedes a part's name where one is written; of a {module}, or a decoder {layer}.
    layer_prefix: the same of a decoder layer's weights (None: `prefix`).
    count_field: the field of the target's config that says how many modules there are (None: there is none).
    after_layers: whether modules are numbered from the number of the target's layers on.
    hidden_first: whether the projection reads [hidden; token] and not [token; hidden].
    renamed: parts of names that the decoder layer has under another name.
    """

    name: str
    pattern: str
    names: Mapping[str, str]
    prefix: str
    layer_prefix: str | None = None
    count_field: str | None = "num_nextn_predict_layers"
    after_layers: bool = False
    hidden_first: bool = False
    renamed: Mapping[str, str] | None = None

    def place(self, name: str, num_layers: int) -> tuple[int, str] | None:
        """The module that a weight is of and its name there, "layers.0.…" if a decoder layer's; None: of no module."""
        match = re.match(self.pattern, name)
        if match is None:
            return None
        groups, rest = match.groupdict(), name[match.end() :]
        number = int(groups.get("module") or 0) - (num_layers if self.after_layers else 0)
        if number < 0:
            return None
        part, _, leaf = rest.rpartition(".")
        role = next((role for role, known in self.names.items() if known == part), None)
        if role is not None:
            return number, f"{role}.{leaf}"
        for old, new in (self.renamed or {}).items():
            rest = rest.replace(old, new)
        return number, rest if rest.startswith("layers.") else f"layers.{groups.get('layer') or 0}.{rest}"

    @property
    def short_name(self) -> str:
        """Its name as an option: "deepseek-v3"."""
        return self.name.partition(",")[0].lower()

    def written(self, number: int, name: str, num_layers: int, last: int = 0) -> str:
        """The name in a checkpoint of the weight `name` of module `number`, for which `place` gives both again.

        last: the module's last decoder layer. Raises ValueError for what the format has no name for."""
        part, _, leaf = name.rpartition(".")
        module = number + (num_layers if self.after_layers else 0)
        if part in self.names:
            layer, prefix, rest = last if part == FINAL_NORM else 0, self.prefix, f"{self.names[part]}.{leaf}"
        else:
            of_layer = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
            layer, rest = (int(of_layer[1]), of_layer[2]) if of_layer else (0, name)
            prefix = self.layer_prefix or self.prefix
            for old, new in (self.renamed or {}).items():
                rest = rest.replace(new, old)
        found = prefix.format(module=module, layer=layer) + rest
        if self.place(found, num_layers) != (number, name):
            raise ValueError(f"the {self.name} layout has no name for the weight {name} of MTP module {number}")
        return found


def layout_named(name: str) -> MtpLayout:
    """The layout with this short name. Raises ValueError for another one."""
    known = {layout.short_name: layout for layout in LAYOUTS}
    if name not in known:
        raise ValueError(f"the layout must be one of {', '.join(known)}, got {name!r}")
    return known[name]


def _named(*names: str) -> dict[str, str]:
    return dict(zip(PARTS, names, strict=True))


LAYOUTS = (
    MtpLayout(
        "DeepSeek-V3, GLM-4.5", r"model\.layers\.(?P<module>\d+)\.",
        _named("enorm", "hnorm", "eh_proj", "shared_head.norm") | {EMBEDDING: "embed_tokens", HEAD: "shared_head.head"},
        "model.layers.{module}.", after_layers=True,
    ),
    MtpLayout(
        "MiMo-7B", r"model\.mtp_layers\.(?P<module>\d+)\.",
        _named("token_layernorm", "hidden_layernorm", "input_proj", "final_layernorm"), "model.mtp_layers.{module}.",
        hidden_first=True,
    ),
    MtpLayout(
        "MiMo-V2", r"model\.mtp\.layers\.(?P<module>\d+)\.", _named("enorm", "hnorm", "eh_proj", "final_layernorm"),
        "model.mtp.layers.{module}.", count_field=None, renamed={"pre_mlp_layernorm": "post_attention_layernorm"},
    ),
    MtpLayout(
        "Qwen3-Next", r"mtp\.(?!layers\.\d+\.(enorm|hnorm|eh_proj)\.)",
        _named("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm"), "mtp.", "mtp.layers.{layer}.",
        "mtp_num_hidden_layers",
    ),
    MtpLayout(
        "Nemotron-H", r"mtp\.layers\.(?P<layer>\d+)\.", _named("enorm", "hnorm", "eh_proj", "final_layernorm"),
        "mtp.layers.{layer}.",
    ),
)  # fmt: skip


def find_modules(names: Iterable[str], num_layers: int) -> tuple[MtpLayout, list[dict[str, str]]]:
    """The layout of a checkpoint's MTP modules, and of each module its names -> those in the checkpoint.

    num_layers: of the target.

    Raises ValueError for a checkpoint without any, and for a module without one of its parts."""
    names, found = list(names), None
    for layout in LAYOUTS:
        modules: dict[int, dict[str, str]] = {}
        for name in names:
            if (place := layout.place(name, num_layers)) is not None:
                modules.setdefault(place[0], {})[place[1]] = name
        if any(f"{part}.weight" in module for module in modules.values() for part in PARTS[:3]):
            found = layout, modules
            break
    if found is None:
        known = "; ".join(layout.name for layout in LAYOUTS)
        raise ValueError(
            f"no weights of MTP modules behind {num_layers} layers in any known layout ({known}): the checkpoint may "
            "have been saved by transformers, which drops them"
        )
    layout, modules = found
    for number, module in sorted(modules.items()):
        missing = [layout.names[part] for part in PARTS if f"{part}.weight" not in module]
        if missing or not any(name.startswith("layers.") for name in module):
            what = f"{', '.join(missing)}" if missing else "any decoder layer"
            raise ValueError(f"MTP module {number} ({layout.name} layout) lacks {what}")
    return layout, [modules[number] for number in sorted(modules)]
