"""An MTP module as a short model of the target's own class: its decoder layers between other ends.

The model's embedding is replaced by `MtpInput`, its norm by the module's, its output layer is the target's. So no
modelling file is copied, and whatever runs the target runs the module."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from specdec.drafters.mtp.layouts import EMBEDDING, FINAL_NORM, HEAD, HIDDEN_NORM, PROJECTION, TOKEN_NORM, MtpLayout
from specdec.model.decoder_layers import name_of_layers, other_parts

if TYPE_CHECKING:  # importing it takes seconds
    from transformers import PreTrainedModel

STAND_IN = 8  # tokens of the embedding and output layer that are loaded and then replaced


class MtpInput(nn.Module):
    """In place of an embedding: `projection([token_norm(embedding); hidden_norm(state)])` of each token.

    embedding: the target's, which is not a part of this module (an own one: is).
    hidden_first: whether the projection reads the state first.
    """

    def __init__(self, embedding: nn.Module, token_norm: nn.Module, hidden_norm: nn.Module, projection: nn.Linear,
                 hidden_first: bool, owned: bool):  # fmt: skip
        super().__init__()
        self.token_norm, self.hidden_norm, self.projection = token_norm, hidden_norm, projection
        self.hidden_first, self._embedding = hidden_first, (embedding,)
        self.own_embedding = embedding if owned else None
        self._states: Tensor | None = None
        self._absent: Tensor | None = None

    @contextmanager
    def reading(self, states: Tensor, absent: Tensor | None = None) -> Iterator[None]:
        """Forwards inside read `states [B, T, h]`: the target's after each token before, or this module's own.

        absent [B, T] bool: tokens whose embedding counts as zero."""
        self._states, self._absent = states, absent
        try:
            yield
        finally:
            self._states = self._absent = None

    def forward(self, input_ids: Tensor) -> Tensor:
        """`input_ids [B, T]` -> `[B, T, h]`; outside of `reading`, when a model is probed, of states that are zero."""
        embedded = self._embedding[0](input_ids)
        states = torch.zeros_like(embedded) if self._states is None else self._states.to(embedded.dtype)
        if self._absent is not None:
            embedded = embedded.masked_fill(self._absent[..., None], 0.0)
        both = self.token_norm(embedded), self.hidden_norm(states)
        return self.projection(torch.cat(both[::-1] if self.hidden_first else both, -1))


def build_module(model: "PreTrainedModel", layout: MtpLayout, weights: Mapping[str, Tensor]) -> "PreTrainedModel":
    """The MTP module of `weights`, named as by `find_modules`, for the target `model`.

    Raises ValueError for weights that are missing, left over or of another shape."""
    count = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("layers."))
    config = _config_of(model, count)
    layers, places = name_of_layers(model), {id(module): name for name, module in model.named_modules()}
    parent, size = layers.rpartition(".")[0], config.get_text_config().hidden_size
    norm = _norm_beside(model, parent)
    stand_in = torch.zeros(STAND_IN, size)
    state = {f"{places[id(end)]}.weight": stand_in for end in (model.get_input_embeddings(), _output_layer(model))}
    for name, value in weights.items():
        part, _, leaf = name.rpartition(".")
        if name.startswith("layers."):
            state[f"{layers.removesuffix('layers')}{name}"] = value
        elif part == FINAL_NORM:
            state[f"{norm}.{leaf}"] = value
    return _between_ends(model, _loaded(model, config, state), layout, weights)


def new_module(model: "PreTrainedModel", layout: MtpLayout) -> "PreTrainedModel":
    """An untrained MTP module in float32 for the target `model`, with the first weights that its class draws."""
    kinds = getattr(model.config.get_text_config(), "mtp_layers_block_type", None)
    built = type(model)(_config_of(model, len(kinds) if kinds else 1))
    return _between_ends(model, built, layout, None)


def _between_ends(model: "PreTrainedModel", built: "PreTrainedModel", layout: MtpLayout,
                  weights: Mapping[str, Tensor] | None) -> "PreTrainedModel":  # fmt: skip
    """The decoder layers and the norm of `built` between the ends of a module: of `weights`, or (None) new ones.

    A new module's norms begin as `built` draws its own, and its projection as transformers draws matrices."""
    config = model.config.get_text_config()
    for part in other_parts(built):
        parent, _, name = part.rpartition(".")
        built.get_submodule(parent)._modules[name] = None
    size, final = config.hidden_size, final_norm(built)
    of_token, of_state = copy.deepcopy(final), copy.deepcopy(final)
    bias = weights is not None and f"{PROJECTION}.bias" in weights
    projection = nn.Linear(2 * size, size, bias=bias, dtype=built.dtype)
    if weights is None:
        nn.init.normal_(projection.weight, std=getattr(config, "initializer_range", None) or 0.02)
    else:
        for module, part in ((of_token, TOKEN_NORM), (of_state, HIDDEN_NORM), (projection, PROJECTION)):
            _filled(module, _leaves(weights, part), part)
    held = weights or {}
    embedding, owned = _end(model.get_input_embeddings(), _leaves(held, EMBEDDING))
    output, _ = _end(_output_layer(model), _leaves(held, HEAD))
    first = MtpInput(embedding, of_token, of_state, projection, layout.hidden_first, owned)
    built.set_input_embeddings(first)
    built.set_output_embeddings(output)
    for one in {id(one): one for one in (built.config, built.config.get_text_config())}.values():
        one.vocab_size = model.config.get_text_config().vocab_size
    built.to(model.device)  # type: ignore[arg-type]  # transformers wraps a method in a way that hides its argument
    return built.eval()


def _config_of(model: "PreTrainedModel", count: int):
    """The configuration of a model of `count` layers like those of MTP modules."""
    config = copy.deepcopy(model.config)
    if getattr(config, "quantization_config", None) is not None:
        kind = type(config.quantization_config).__name__
        raise ValueError(f"MTP modules of a quantised checkpoint cannot be read yet, and this one has a {kind}")
    text = config.get_text_config()
    for name, own in (("layer_types", "mtp_layer_types"), ("mlp_layer_types", "mtp_mlp_layer_types"),
                      ("layers_block_type", "mtp_layers_block_type")):  # fmt: skip
        kinds = getattr(text, name, None)
        if kinds:
            listed = getattr(text, own, None) or ["full_attention" if "full_attention" in kinds else kinds[-1]] * count
            setattr(text, name, listed[:count])
    text.num_hidden_layers, text.vocab_size, text.pad_token_id = count, STAND_IN, None
    text.tie_word_embeddings = config.tie_word_embeddings = False
    for name, value in (("first_k_dense_replace", 0), ("mlp_only_layers", [])):  # MTP modules have experts
        if hasattr(text, name):
            setattr(text, name, value)
    return config


def _loaded(model: "PreTrainedModel", config, state: dict[str, Tensor]) -> "PreTrainedModel":
    """A model of the class of `model` from weights named as in its checkpoints. Raises ValueError as `build_module`."""
    options: dict[str, Any] = dict(state_dict=state, dtype=model.dtype, output_loading_info=True)
    load: Any = type(model).from_pretrained  # which gives a pair with `output_loading_info`
    try:
        built, about = load(None, config=config, **options)
    except RuntimeError as error:
        raise ValueError(f"an MTP module does not fit a {type(model).__name__}: {error}") from error
    unread = tuple(f"{part}." for part in other_parts(built))
    lacking = [name for name in about["missing_keys"] if not name.startswith(unread)]
    for what, names in (("lacks", lacking), ("has, left over,", about["unexpected_keys"]),
                        ("has, of another shape,", about["mismatched_keys"])):  # fmt: skip
        if names:
            raise ValueError(f"an MTP module for {type(model).__name__} {what} {', '.join(sorted(map(str, names)))}")
    return built


def final_norm(model: "PreTrainedModel") -> nn.Module:
    """The norm after all layers. Raises ValueError for a model that does not have exactly one."""
    return model.get_submodule(_norm_beside(model, name_of_layers(model).rpartition(".")[0]))


def _norm_beside(model: nn.Module, parent: str) -> str:
    """The name of the norm after all layers, which lie in the module `parent`."""
    named = model.get_submodule(parent).named_children()
    names = [name for name, module in named if "norm" in type(module).__name__.lower()]
    if len(names) != 1:
        raise ValueError(
            f"{type(model).__name__} must have one norm beside its layers, got {', '.join(names) or 'none'}"
        )
    return f"{parent}.{names[0]}" if parent else names[0]


def _output_layer(model: "PreTrainedModel") -> nn.Module:
    layer = model.get_output_embeddings()
    if layer is None:
        raise ValueError(f"{type(model).__name__} has no output layer, which MTP modules share")
    return layer


def _leaves(weights: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name.rpartition(".")[2]: value for name, value in weights.items() if name.rpartition(".")[0] == part}


def _filled(module: nn.Module, weights: Mapping[str, Tensor], what: str):
    """`module` with these weights, in its own dtype."""
    mine = dict(module.named_parameters())
    if mine.keys() != weights.keys():
        raise ValueError(f"{what} of an MTP module must have {', '.join(mine)}, got {', '.join(weights)}")
    for name, value in weights.items():
        if mine[name].shape != value.shape:
            shapes = f"{[*value.shape]}, for this target it must be {[*mine[name].shape]}"
            raise ValueError(f"{what}.{name} of an MTP module is {shapes}")
        with torch.no_grad():
            mine[name].copy_(value)
    return module


def _end(shared: nn.Module, own: Mapping[str, Tensor]) -> tuple[nn.Module, bool]:
    """The target's embedding or output layer, or a copy with the module's `own` weights where these are others."""
    there = dict(shared.named_parameters())
    if not own or all(torch.equal(value.to(there[name]), there[name]) for name, value in own.items()):
        return shared, False
    return _filled(copy.deepcopy(shared), own, type(shared).__name__), True
