"""Prompts with images: one forward of the model's own, of whose text layers pages get the keys and values.

Vision tower, merging of embeddings, attention masks and positions are the model's own, on a twin of the model that
computes attention with the masks that transformers makes, so that images whose tokens see each other both ways do. What
follows the prompt is text, whose position in every plane (M-RoPE: time, height and width) is its place in the sequence
plus one number, the sequence's shift, while places in the cache count tokens."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedConfig

from attention.gpu import to_device
from attention.hf.hidden_states import Layers, blocks_name, joined, num_blocks, seen, tap_blocks, tap_output_layer
from attention.hf.interface import next_place, slot_of
from attention.hf.probe import UnsupportedArchitecture
from attention.hf.twin import ATTENTION_SETTING, make_twin
from attention.kv.layout import LatentLayer
from attention.paged.batch import AttentionBatch
from attention.paged.layer import store_only
from attention.recurrent.batch import DeviceRecurrentBatch, RecurrentBatch

if TYPE_CHECKING:  # the adapter makes a `PromptForward`
    from attention.hf.adapter import ModelAdapter

PROMPT_NAME = "specdec_prompt"
PLACEHOLDERS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")  # of configurations
TOKEN_KINDS = ("token_type_ids", "mm_token_type_ids")  # inputs [B, S] that are not 0 at tokens of images


@dataclass(frozen=True, slots=True, eq=False)
class Prompts:
    """B prompts with images, padded on the left to S tokens.

    ids, mask [B, S] int64, on the model's device: a mask of 0 marks padding.
    inputs: what else the model's forward takes, by name, as its processor gives it.
    """

    ids: Tensor
    mask: Tensor
    inputs: Mapping[str, object]


@dataclass(frozen=True, slots=True, eq=False)
class PromptBatch:
    """Where keys and values of `Prompts` go.

    pages: the sequences, whose new tokens are those of the prompts.
    where [T]: of each of these tokens its index among the B * S padded ones.
    """

    pages: AttentionBatch
    where: Tensor

    @property
    def recurrent(self) -> RecurrentBatch | DeviceRecurrentBatch | None:
        """See `AttentionBatch.recurrent`."""
        return self.pages.recurrent


def moves_positions(model) -> bool:
    """Whether the model computes positions of its own for prompts, which need not count tokens."""
    from transformers import GenerationMixin  # takes seconds

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # of a PEFT model
    usual = GenerationMixin._prepare_position_ids_for_generation
    return getattr(type(inner), usual.__name__, usual) is not usual


def attend_prompt(module, query, key, value, attention_mask, scaling=None, dropout=0.0, sliding_window=None,
                  softcap=None, s_aux=None, **kwargs):  # fmt: skip
    """The attention function that transformers calls for prompts.

    `query [B, H, S, D]`, `key [B, G, S, D]`, `value [B, G, S, Dv]` -> `([B, S, H, Dv], None)`; `attention_mask
    [B, 1, S, S]` bool, which has windows and padding in it; None: causal."""
    name, slot = type(module).__name__, slot_of(module)
    if softcap is not None or s_aux is not None or kwargs.get("position_bias") is not None:
        raise UnsupportedArchitecture(
            f"{name} attends with a soft-cap, sinks or a position bias, with which prompts with images cannot run yet"
        )
    batch: PromptBatch = slot.batch
    pages, place = next_place(slot, batch.pages, name, query.dtype)
    if not place.shared:
        where = batch.where.to(key.device)
        packed = [x.transpose(1, 2).flatten(0, 1).index_select(0, where) for x in (key, value)]
        store_only(pages, place.layer, *packed)
    k, v = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    mask = None if attention_mask is None else attention_mask[..., : k.shape[2]]
    out = scaled_dot_product_attention(query, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def why_text_alone(adapter: "ModelAdapter") -> str | None:
    """Why a model's prompts with images cannot go to pages, whatever its forward takes; None: they can."""
    latent = any(isinstance(layer, LatentLayer) for layer in adapter.layout.layers)
    return "keeps latents" if latent else None


def placeholders(config) -> frozenset[int]:
    """The ids of tokens in whose places images come."""
    ids = (getattr(config, name, None) for name in PLACEHOLDERS)
    return frozenset(token for token in ids if token is not None)


class PromptForward:
    """Runs `Prompts` through a twin of the model of `adapter`.

    Raises UnsupportedArchitecture for a model whose prompts with images cannot go to pages."""

    def __init__(self, adapter: "ModelAdapter"):
        model, self._adapter = adapter.model, adapter
        if (why := why_text_alone(adapter)) is not None:
            raise UnsupportedArchitecture(f"{type(model).__name__} {why}, and takes text alone for now")
        self._twin = twin = make_twin(model, whole=True)
        attending = [twin.model.get_submodule(name) for name in dict.fromkeys(adapter.layers)]
        held = [value for module in attending for value in vars(module).values()]
        configs = [value for value in held if isinstance(value, PreTrainedConfig)]
        for config in (twin.model.config, twin.model.config.get_text_config(), *configs):
            vars(config)[ATTENTION_SETTING] = PROMPT_NAME  # other parts, the vision tower say, attend as they did
        tap_output_layer(twin.model, twin.slot)
        self._taps_blocks = False

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """What the model's forward takes."""
        return inspect.signature(self._adapter.model.forward).parameters

    @torch.inference_mode()
    def __call__(self, prompts: Prompts, pages: AttentionBatch, copies: int = 1,
                 layers: Layers | None = None) -> tuple[list[int], Tensor | None]:  # fmt: skip
        """Run prompts into the sequences of `pages`, each into `copies` ones that follow each other.

        Returns the shift of each prompt, and the hidden states `[T, sum of widths]` of `layers` at all tokens of the
        sequences (None: without layers). Raises ValueError for a prompt that ends inside an image, and for one of
        several with padding where the model keeps recurrent states."""
        _require_text_at_end(prompts, self._adapter.model.config)
        whole = bool(prompts.mask.all()) and len(prompts.mask) == 1
        if pages.recurrent is not None and not (whole and copies == 1):
            raise ValueError(
                f"{type(self._adapter.model).__name__} keeps recurrent states: prompts with images run one at a time, "
                f"without padding, got {len(prompts.mask)} prompts for {len(prompts.mask) * copies} texts"
            )
        index = torch.arange(prompts.mask.numel(), device=prompts.mask.device).view(prompts.mask.shape)
        rows = [index[row][real] for row, real in enumerate(prompts.mask != 0) for _ in range(copies)]
        batch, slot = PromptBatch(pages, torch.cat(rows)), self._twin.slot
        inputs, shifts = self._prepared(prompts)
        wanted, blocks = () if layers is None else self._adapter.hidden_layers(layers), num_blocks(self._adapter.model)
        slot.wanted = frozenset(layer for layer in wanted if layer != blocks)
        if slot.wanted and not self._taps_blocks:
            tap_blocks(self._twin.model, blocks_name(self._adapter.model, self._adapter.layers), slot)
            self._taps_blocks = True
        if wanted:  # the output layer sees all tokens, and computes one
            slot.keep = to_device(torch.tensor([prompts.ids.shape[1] - 1]), prompts.ids.device)
        elif "logits_to_keep" in self.parameters:
            inputs["logits_to_keep"] = 1
        try:
            self._adapter.run(self._twin.model, slot, batch, inputs)
            if not wanted:
                return shifts, None
            hidden, inputs_of = seen(slot, self._adapter.model)
        finally:
            slot.forget()
        of_all = joined(hidden.flatten(0, -2), inputs_of, wanted, blocks, prompts.ids.device)
        return shifts, of_all.index_select(0, batch.where)

    def _prepared(self, prompts: Prompts) -> tuple[dict, list[int]]:
        """The inputs of the forward as transformers' `generate` prepares them, and each prompt's shift."""
        model: Any = self._twin.model  # whose class says nothing of what `generate` calls
        given = {"attention_mask": prompts.mask, **prompts.inputs}
        if "position_ids" in self.parameters and given.get("position_ids") is None:
            given["position_ids"] = model._prepare_position_ids_for_generation(prompts.ids, given)
        positions = given.get("position_ids")
        prepared = model.prepare_inputs_for_generation(prompts.ids, is_first_iteration=True, use_cache=False, **given)
        shifts = shifts_of(positions, prompts.mask) if isinstance(positions, Tensor) else [0] * len(prompts.ids)
        return prepared | {"use_cache": False, "return_dict": True}, shifts


def shifts_of(positions: Tensor, mask: Tensor) -> list[int]:
    """How far positions are ahead of places at the end of each prompt, and so in the text that follows.

    positions `[B, S]` or `[planes, B, S]`, a first one of 4 counts tokens; mask `[B, S]`: 0 on padding.
    Raises ValueError for a prompt at whose end the planes differ: it ends inside an image.

    >>> planes = torch.tensor([[[0, 1, 2, 3]], [[0, 1, 1, 3]], [[0, 1, 1, 3]], [[0, 1, 2, 3]]])
    >>> shifts_of(planes, torch.ones(1, 4)), shifts_of(planes - 1, torch.ones(1, 4))
    ([0], [-1])
    """
    planes = positions if positions.ndim == 3 else positions[None]
    last = (planes[1:] if len(planes) == 4 else planes)[..., -1]
    unlike = (last != last[-1]).any(0).tolist()
    if any(unlike):
        raise ValueError(f"prompt {unlike.index(True)} ends inside an image: text must follow it")
    return (last[-1] + 1 - (mask != 0).sum(1)).tolist()


def _require_text_at_end(prompts: Prompts, config) -> None:
    kinds: Sequence = [prompts.inputs.get(name) for name in TOKEN_KINDS]
    last, ids = prompts.ids[:, -1], torch.tensor([*placeholders(config)], device=prompts.ids.device)
    of_image = torch.isin(last, ids)
    for kind in kinds:
        of_image = of_image | (kind[:, -1] != 0) if isinstance(kind, Tensor) else of_image
    if bool(of_image.any()):
        row = int(of_image.int().argmax())
        raise ValueError(f"prompt {row} ends with a token of an image ({int(prompts.ids[row, -1])}): text must follow")
