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
from attention.hf.hidden_states import (
    Layers,
    blocks_name,
    hidden_layers,
    joined,
    num_blocks,
    seen,
    tap_blocks,
    tap_output_layer,
)
from attention.hf.interface import INTERFACE_NAME, attend
from attention.hf.latent import expanded_layers, keep_latents
from attention.hf.mixers import serve_mixers, serving
from attention.hf.probe import (
    ATTENDING,
    KEEPS_STATE,
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
    what_is_missing,
    window_settings,
)
from attention.hf.prompt import PROMPT_NAME, PromptBatch, PromptForward, attend_prompt, moves_positions
from attention.hf.twin import CallSlot, Twin, make_twin
from attention.paged.batch import AttentionBatch


class ModelAdapter:
    """Runs a causal language model on packed sequences over a paged cache, one forward at a time.

    Forwards run on the twin, or on modules that the caller makes of it and passes to `run_through`: one with fused
    operations, and one with compiled blocks for forwards with `compiled=True` (`specdec.model.fusion`).

    `layout` says what the cache keeps for each attention call; `layers` names the modules that attend, in that
    order; `dtype` is that of keys and values, whatever its weights are stored in; `limit` is the position up to which
    the model is exact (None: no limit known); `window` is the largest sliding window, in tokens (None: a layer has
    none, or settings have changed since the probe), `has_windows` whether any layer has one; `device` is where inputs
    belong, and logits; `devices` are those of the layers. `moves_positions` says whether positions may be ahead of, or
    after, the count of tokens (`attention.hf.prompt`). `coarse` says that it rounds activations to 8 bits
    (`require_same_logits`). Layers of multi-head latent attention keep latents where they can (`attention.hf.latent`),
    unless `latents` is False: then, as where they cannot, they keep keys and values of all heads; `expanded` and a
    warning say why. Raises UnsupportedArchitecture, and ValueError for a model without weights."""

    def __init__(self, model, coarse: bool = False, latents: bool = True):
        from transformers import AttentionInterface, AttentionMaskInterface  # takes seconds

        for name, function in ((INTERFACE_NAME, attend), (PROBE_NAME, attend), (PROMPT_NAME, attend_prompt)):
            AttentionInterface.register(name, function)
        AttentionMaskInterface.register(PROBE_NAME, probe_mask)
        AttentionMaskInterface.register(PROMPT_NAME, AttentionMaskInterface()["sdpa"])
        self.model = model
        require_causal_lm(model)
        self.device = device_of(model)
        self.devices: tuple[torch.device, ...] = ()  # until the probe has told
        self.state_devices: tuple[torch.device, ...] = ()
        self._recurs = serve_mixers(model)
        self.moves_positions = moves_positions(model)
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
        self._prompts: PromptForward | None = None
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
    def all_devices(self) -> tuple[torch.device, ...]:
        """Those of the layers that attend, then those of the recurrent ones."""
        return (*self.devices, *self.state_devices)

    @property
    def spread(self) -> bool:
        """Whether its layers are on several devices (accelerate's `device_map`)."""
        return len({*self.all_devices}) > 1

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
        stateful = getattr(self.model, "_is_stateful", False) and not (kinds and set(kinds) <= ATTENDING | PLAIN)
        if stateful and not self._recurs:
            raise UnsupportedArchitecture(f"{architecture} {KEEPS_STATE}")
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
        if stateful and not probe.recurrent:
            raise UnsupportedArchitecture(f"{architecture} {KEEPS_STATE}")
        if probe.layers < expected:
            raise UnsupportedArchitecture(f"{architecture} {NO_INTERFACE}: {probe.layers} of its {expected} layers do")
        if logits.ndim != 2 or len(logits) != PROBE_TOKENS:
            raise UnsupportedArchitecture(
                f"{architecture} gives {list(logits.shape)} for {PROBE_TOKENS} tokens, not one row of logits for each"
            )
        self._attends = len(probe.kinds)
        self.devices = tuple(probe.devices) or (self.device,)
        self.state_devices = tuple(probe.recurrent_devices)
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

    def _call(self, model, tokens: Tensor, positions: Tensor, batch: AttentionBatch | Probe,
              keep: Tensor | None) -> Tensor:  # fmt: skip
        """Logits `[M, V]` of `tokens [1, T]` at `positions [1, T]`; hidden states are left in the slot."""
        inputs = dict(input_ids=tokens, position_ids=positions, use_cache=False, return_dict=True)
        if keep is not None and self._keeps_logits:
            inputs["logits_to_keep"] = keep.tolist() if self.spread else keep  # a list is on no device
        return self.run(model, self.slot, batch, inputs).logits[0]

    @torch.inference_mode()
    def run(self, model, slot: CallSlot, batch: AttentionBatch | PromptBatch | Probe, inputs: dict):
        """The output of `model(**inputs)`, whose modules have `slot`, over `batch`."""
        slot.batch, slot.attended, slot.recurred, slot.hidden = batch, 0, 0, None
        if not isinstance(batch, Probe) and batch.recurrent is not None:
            batch.recurrent.begin(len(self.layout.recurrent))
        served = serving.set(slot if self._recurs else None)
        try:
            with on(self.device):
                out = model(**inputs)
        finally:
            slot.batch = None
            serving.reset(served)
        if not isinstance(batch, Probe):
            self._require_all_layers(slot)
            if batch.recurrent is not None:
                batch.recurrent.finish()
        return out

    def _require_all_layers(self, slot: CallSlot) -> None:
        """Raise UnsupportedArchitecture unless the last forward called us as often as the probe forward."""
        for did, count, probed in (
            ("attended", slot.attended, self._attends),
            ("called recurrent functions", slot.recurred, len(self.layout.recurrent)),
        ):
            if count != probed:
                raise UnsupportedArchitecture(
                    f"{type(self.model).__name__} {did} {count} times over the paged cache in one forward, and "
                    f"{probed} times when it was probed: a module of it was replaced, or its "
                    "forward, by one that keeps hold of the original"
                )

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
            hidden, inputs = seen(slot, self.model)
        finally:
            slot.forget()
        hidden = hidden.flatten(0, -2)
        if keep is not None and not all_tokens:
            inputs = {layer: x[:, keep.to(x.device)] for layer, x in inputs.items()}
            if not self._keeps_logits:
                logits, hidden = logits[keep], hidden[keep.to(hidden.device)]
        return logits, joined(hidden, inputs, layers, blocks, logits.device)

    @property
    def prompts(self) -> PromptForward:
        """Runs prompts with images."""
        if self._prompts is None:
            self._prompts = PromptForward(self)
        return self._prompts

    def hidden_layers(self, layers: Layers) -> tuple[int, ...]:
        """See `attention.hf.hidden_states.hidden_layers`."""
        return hidden_layers(self.model, layers)
