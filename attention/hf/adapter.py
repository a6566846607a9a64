"""Runs an unchanged transformers model over the paged cache, through transformers' own AttentionInterface.

No code here is specific to a model family. Forwards run on a twin of the model with the same weights
(`attention.hf.twin`), so that the model itself stays untouched and usable. A probe forward shows whether a model calls
the interface, and with which shapes; then the logits of some tokens over pages are compared with the model's own. A
model that fails either check raises an error that names it."""

import inspect
import warnings

import torch
from torch import Tensor

from attention.gpu import on
from attention.hf.causal import require_causal_lm
from attention.hf.comparison import require_same_logits
from attention.hf.device import device_of
from attention.hf.hidden_states import Layers, blocks_name, hidden_layers, num_blocks, tap_blocks, tap_output_layer
from attention.hf.latent import LATENT, LatentHeads, expanded_layers, keep_latents
from attention.hf.probe import (
    ATTENDING,
    NO_INTERFACE,
    PLAIN,
    PROBE_NAME,
    PROBE_TOKENS,
    Probe,
    UnsupportedArchitecture,
    is_ours,
    largest_window,
    layer_kinds,
    layout_of,
    limit_of,
    probe_mask,
    probing,
    require_plain,
    what_is_missing,
    window_settings,
)
from attention.hf.twin import SLOT, CallSlot, Twin, make_twin
from attention.paged.batch import AttentionBatch
from attention.paged.layer import store_and_attend

# no mask function has this name, so that the model builds no mask: paged attention takes it from the batch
INTERFACE_NAME = "specdec_paged"


def _attend(module, query, key, value, attention_mask, scaling=None, dropout=0.0, sliding_window=None,
            softcap=None, s_aux=None, **kwargs):  # fmt: skip
    """The attention function that transformers calls.

    `query [1, H, T, D]`, `key [1, G, T, D]`, `value [1, G, T, Dv]` -> `([1, T, H, Dv], None)`."""
    name, slot = type(module).__name__, vars(module).get(SLOT)
    if slot is None:
        raise UnsupportedArchitecture(
            f"{name} holds no configuration of its own, so it cannot be told which cache to use"
        )
    if attention_mask is not None:
        raise UnsupportedArchitecture(f"{name} builds an attention mask of its own, which a paged cache cannot honour")
    if kwargs.get("position_bias") is not None or not getattr(module, "is_causal", True):
        raise UnsupportedArchitecture(
            f"{name} uses a position bias or attends in both directions; only causal attention can be paged"
        )
    queries, keys, values = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    latent: LatentHeads | None = vars(module).get(LATENT)
    if latent is not None:
        queries = latent.query(queries)
    if isinstance(slot.batch, Probe):
        require_plain(name, queries, keys, values, kwargs)
        out = slot.batch.attend(module, queries, keys, values, sliding_window, latent is not None)
        return (out if latent is None else latent.value(out)).unsqueeze(0), None
    paged = slot.batch
    if query.dtype != paged.cache.dtype:
        raise ValueError(
            f"{name} computes in {query.dtype} (autocast?), but its cache was made for {paged.cache.dtype}"
        )
    layer = 0
    if (layers := len(paged.cache.places)) > 1:  # a compiled block sees no layer but its own
        layer = slot.attended
        if layer >= layers:
            raise UnsupportedArchitecture(f"{name} attends more often than when it was probed ({layers} times)")
    if not torch.compiler.is_compiling():
        slot.attended += 1
    paged, place = paged.at(layer)
    out = store_and_attend(
        paged, place.layer, queries, keys, values, scale, sliding_window, softcap, s_aux, store_new=not place.shared
    )
    return (out if latent is None else latent.value(out)).unsqueeze(0), None


class ModelAdapter:
    """Runs a causal language model on packed sequences over a paged cache, one forward at a time.

    Forwards run on the twin, or on modules that the caller makes of it and passes to `run_through`: one with fused
    operations, and one with compiled blocks for forwards with `compiled=True` (`specdec.model.fusion`).

    `layout` says what the cache keeps for each attention call; `layers` names the modules that attend, in that
    order; `dtype` is that of keys and values, whatever its weights are stored in; `limit` is the position up to which
    the model is exact (None: no limit known); `window` is the largest sliding window, in tokens (None: a layer has
    none, or settings have changed since the probe), `has_windows` whether any layer has one; `device` is where inputs
    belong, and logits; `devices` are those of the layers. `coarse` says that it rounds activations to 8 bits
    (`require_same_logits`). Layers of multi-head latent attention keep latents where they can (`attention.hf.latent`),
    unless `latents` is False: then, as where they cannot, they keep keys and values of all heads; `expanded` and a
    warning say why. Raises UnsupportedArchitecture, and ValueError for a model without weights."""

    def __init__(self, model, coarse: bool = False, latents: bool = True):
        from transformers import AttentionInterface, AttentionMaskInterface  # takes seconds

        AttentionInterface.register(INTERFACE_NAME, _attend)
        AttentionInterface.register(PROBE_NAME, _attend)
        AttentionMaskInterface.register(PROBE_NAME, probe_mask)
        self.model = model
        require_causal_lm(model)
        self.device = device_of(model)
        self.devices: tuple[torch.device, ...] = ()  # until the probe has told
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.window: int | None = None
        self._latents: frozenset[str] | None = None if latents else frozenset()  # modules that keep latents
        self.renew()
        self.run_through(self.twin.model)
        self._probe()
        require_same_logits(self, coarse)
        self.expanded = expanded_layers(self.twin.model, self.layers) if latents else None
        if self.expanded is not None:
            warnings.warn(f"{type(model).__name__} {self.expanded}", stacklevel=2)

    def renew(self) -> Twin:
        """Make a new twin of the model in its present state."""
        self.twin = make_twin(self.model)
        self.twin.attend_through(INTERFACE_NAME)
        self._latents = keep_latents(self.twin.model, self._latents)
        if self.window is not None and window_settings(self.twin.model, self.layers) != self._windows:
            self.window = None
        return self.twin

    def run_through(self, runs, compiled=None) -> None:
        """Run forwards on these modules, which are made of the newest twin."""
        self._runs, self._compiled, self._blocks_tapped = runs, runs if compiled is None else compiled, False
        for model in (runs, compiled):
            if model is not None:
                tap_output_layer(model, self.slot)

    @property
    def spread(self) -> bool:
        """Whether its layers are on several devices (accelerate's `device_map`)."""
        return len({*self.devices}) > 1

    @property
    def slot(self) -> CallSlot:
        """State of the running forward."""
        return self.twin.slot

    @property
    def max_positions(self) -> int | None:
        """Number of positions for which the model over pages is exact; None: no limit."""
        return None if self.limit is None else self.limit.positions

    def _probe(self) -> None:
        """Find shapes, vocabulary size, order of layers and limit by one forward without a cache."""
        architecture, probe, config = type(self.model).__name__, Probe(), self.model.config.get_text_config()
        kinds = layer_kinds(config)
        if getattr(self.model, "_is_stateful", False) and not (kinds and set(kinds) <= ATTENDING | PLAIN):
            raise UnsupportedArchitecture(
                f"{architecture} keeps recurrent state beside keys and values, which cannot be rolled back"
            )
        tokens = torch.arange(PROBE_TOKENS, device=self.device)[None]
        self.twin.attend_through(PROBE_NAME)
        token = probing.set(probe)
        try:
            logits = self._call(self._runs, tokens, tokens, probe, None)
        except UnsupportedArchitecture as error:
            raise UnsupportedArchitecture(f"{architecture}: {error}") from error
        except Exception as error:
            if is_ours(error):
                raise
            raise UnsupportedArchitecture(f"{architecture} {what_is_missing(probe, error)}") from error
        finally:
            probing.reset(token)
            self.twin.attend_through(INTERFACE_NAME)
        expected = sum(kind not in PLAIN for kind in kinds) if kinds else config.num_hidden_layers
        if len(probe.kinds) < expected:
            raise UnsupportedArchitecture(
                f"{architecture} {NO_INTERFACE}: {len(probe.kinds)} of its {expected} layers do"
            )
        if logits.ndim != 2 or len(logits) != PROBE_TOKENS:
            raise UnsupportedArchitecture(
                f"{architecture} gives {list(logits.shape)} for {PROBE_TOKENS} tokens, not one row of logits for each"
            )
        self.devices = tuple(probe.devices)
        if self.device not in self.devices:
            raise UnsupportedArchitecture(
                f"{architecture} takes its inputs on {self.device}, where none of its layers attends: they do on "
                f"{', '.join(map(str, dict.fromkeys(self.devices)))}"
            )
        names = {id(module): name for name, module in self.twin.model.named_modules()}
        self.layers = tuple(names.get(id(module), "") for module in probe.callers)
        self.layout = layout_of(probe)
        self.vocab_size, self.dtype = logits.shape[-1], probe.dtype or logits.dtype
        self.limit = limit_of(config, probe)
        self.window, self._windows = largest_window(probe), window_settings(self.twin.model, self.layers)
        self.has_windows = any(window is not None for window in probe.windows)

    @torch.inference_mode()
    def _call(self, model, tokens: Tensor, positions: Tensor, batch: AttentionBatch | Probe,
              keep: Tensor | None) -> Tensor:  # fmt: skip
        """Logits `[M, V]` of `tokens [1, T]` at `positions [1, T]`; hidden states are left in the slot."""
        inputs = dict(input_ids=tokens, position_ids=positions, use_cache=False, return_dict=True)
        if keep is not None and self._keeps_logits:
            inputs["logits_to_keep"] = keep.tolist() if self.spread else keep  # a list is on no device
        slot = self.slot
        slot.batch, slot.attended, slot.hidden = batch, 0, None
        try:
            with on(tokens.device):
                logits = model(**inputs).logits[0]
        finally:
            slot.batch = None
        if not isinstance(batch, Probe) and slot.attended != len(self.layout.layers):
            raise UnsupportedArchitecture(
                f"{type(self.model).__name__} attended {slot.attended} times over the paged cache in one forward, and "
                f"{len(self.layout.layers)} times when it was probed: a module of it was replaced, or its "
                "forward, by one that keeps hold of the original"
            )
        return logits

    def forward(
        self, tokens: Tensor, position_ids: Tensor, batch: AttentionBatch, keep: Tensor | None, compiled: bool = False
    ) -> Tensor:
        """Packed `tokens [T]` at `position_ids [T]` -> logits `[M, V]` at packed indices `keep [M]` (None: all T)."""
        model = self._compiled if compiled else self._runs
        try:
            logits = self._call(model, tokens[None], position_ids[None], batch, keep)
        finally:
            self.slot.hidden = None
        return logits if keep is None or self._keeps_logits else logits[keep]

    def forward_with_features(self, tokens: Tensor, position_ids: Tensor, batch: AttentionBatch, keep: Tensor | None,
                              layers: Layers = "output", all_tokens: bool = False,
                              compiled: bool = False) -> tuple[Tensor, Tensor]:  # fmt: skip
        """As `forward`, with the hidden states `[M, sum of widths]` of `layers` (`hidden_layers`).

        With `all_tokens` they are those of all T tokens, although logits are computed at `keep` only."""
        slot, model, blocks = self.slot, self._compiled if compiled else self._runs, num_blocks(self.model)
        layers = self.hidden_layers(layers)
        slot.wanted = frozenset(layer for layer in layers if layer != blocks)
        if slot.wanted and not self._blocks_tapped:
            for tapped in dict.fromkeys((self._runs, self._compiled)):
                tap_blocks(tapped, blocks_name(self.model, self.layers), slot)
            self._blocks_tapped = True
        slot.keep = keep if all_tokens else None
        try:
            logits = self._call(model, tokens[None], position_ids[None], batch, None if all_tokens else keep)
            hidden, inputs = slot.hidden, slot.inputs
        finally:
            slot.hidden, slot.keep, slot.wanted, slot.inputs = None, None, frozenset(), {}
        if hidden is None:
            raise UnsupportedArchitecture(
                f"{type(self.model).__name__} makes logits without calling its output layer, so its hidden "
                "states are not seen"
            )
        hidden = hidden.flatten(0, -2)
        if keep is not None and not all_tokens:
            inputs = {layer: x[:, keep.to(x.device)] for layer, x in inputs.items()}
            if not self._keeps_logits:
                logits, hidden = logits[keep], hidden[keep.to(hidden.device)]
        parts = [hidden if layer == blocks else inputs[layer].flatten(0, -2) for layer in layers]
        parts = [part.to(logits.device) for part in parts]
        return logits, parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def hidden_layers(self, layers: Layers) -> tuple[int, ...]:
        """See `attention.hf.hidden_states.hidden_layers`."""
        return hidden_layers(self.model, layers)
