"""What a short forward reveals about a model before it runs over a paged cache.

Whether it calls transformers' AttentionInterface, in which order and with which shapes; up to which position it is
exact; and, for a model that cannot be run, the reason as an error message."""

import re
import traceback
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from types import FrameType

import torch
from torch import Tensor

from attention.kv.layout import (
    NOWHERE,
    Keeping,
    KeyValueLayer,
    LatentLayer,
    Layer,
    LayerLayout,
    RecurrentLayer,
    SharedLayer,
)

PROBE_NAME = "specdec_probe"
PROBE_TOKENS = 2
SHORTEST, LONGEST = 6, 520  # tokens of the comparison with the untouched model
# settings that have an effect only beyond some length, which the comparison must exceed
LENGTHS = re.compile(r"window|chunk|block|index|budget|compress|local|stride|sparse|floor_scale|original_max_position")
HARMLESS = {  # tensors that models pass to every attention implementation and that do not change the result
    "position_ids",
    "position_embeddings",
    "cache_position",
    "cos",
    "sin",
    "input_ids",
    "inputs_embeds",
    "hidden_states",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
}


class UnsupportedArchitecture(ValueError):
    """The model cannot run over a paged cache; the message names the architecture and says why."""


@dataclass(frozen=True, slots=True)
class Limit:
    """The number of positions for which a model over pages is exact, and why there are no more, in words."""

    positions: int
    why: str

    def __str__(self) -> str:
        return f"the model's {self.positions} positions{self.why}"


class Probe:
    """Takes the place of a batch in the probe forward and records the model's attention calls and masks."""

    def __init__(self):
        self.kinds: list[Keeping] = []  # what each attention call has to keep
        self.callers: list[object] = []  # the module of each attention call
        self.devices: list[torch.device] = []  # where each attention call computes
        self.given: list[tuple[Tensor, Tensor]] = []  # keys and values of each attention call
        self.dtype: torch.dtype | None = None  # of keys and values
        self.recurrent: list[RecurrentLayer] = []  # of each call of a recurrent function
        self.recurrent_devices: list[torch.device] = []  # where each of these computes
        self.windows: set[int | None] = set()  # sliding windows passed to attention calls
        self.mask_windows: set[int] = set()  # windows or chunks passed to mask functions

    def attend(self, module, queries: Tensor, keys: Tensor, values: Tensor, window: int | None,
               latents: bool = False) -> Tensor:  # fmt: skip
        """Record a call with `queries [T, H, D]`, `keys [T, G, D]`, `values [T, G, Dv]`; returns zeros `[T, H, Dv]`.

        latents: the values are in the keys."""
        heads, key_dim, value_dim = *keys.shape[1:], values.shape[2]
        kind = LatentLayer(value_dim, key_dim - value_dim) if latents else KeyValueLayer(heads, key_dim, value_dim)
        self.kinds.append(kind)
        self.callers.append(module)
        self.devices.append(keys.device)
        self.given.append((keys, values))
        self.dtype = keys.dtype
        self.windows.add(window)
        return queries.new_zeros(queries.shape[0], queries.shape[1], values.shape[2])

    def recur(self, layer: RecurrentLayer, device: torch.device) -> None:
        """Record a call of a recurrent function (`attention.hf.mixers`)."""
        self.recurrent.append(layer)
        self.recurrent_devices.append(device)

    @property
    def layers(self) -> int:
        """Layers that attend, and those that keep a state; a convolution and its recurrence are one layer."""
        convolutions = sum(layer.kind == "convolution" for layer in self.recurrent)
        return len(self.kinds) + max(convolutions, len(self.recurrent) - convolutions)


probing: ContextVar[Probe | None] = ContextVar("probing", default=None)


def probe_mask(*_, local_size=None, use_vmap=False, **__) -> None:
    """The mask function of the probe forward: records the window; raises for masks that are more than causal."""
    if use_vmap:
        raise UnsupportedArchitecture("its mask is more than causal (a bidirectional prefix or an overlay)")
    probe = probing.get()
    if local_size and probe is not None:  # 0 means no window
        probe.mask_windows.add(local_size)


def require_plain(name: str, queries: Tensor, keys: Tensor, values: Tensor, kwargs: dict) -> None:
    """Raise UnsupportedArchitecture unless an attention call depends on queries, keys and values only."""
    if not len(queries) == len(keys) == len(values) == PROBE_TOKENS:
        raise UnsupportedArchitecture(
            f"{name} attends with {len(queries)} queries to {len(keys)} keys in a forward over {PROBE_TOKENS} "
            "tokens: it chooses or adds keys of its own"
        )
    unknown = [key for key, given in kwargs.items() if key not in HARMLESS and _holds_tensor(given)]
    if unknown:
        raise UnsupportedArchitecture(
            f"{name} hands {', '.join(unknown)} to its attention call, which paged attention does not support"
        )


def _holds_tensor(given) -> bool:
    return isinstance(given, Tensor) or isinstance(given, list | tuple) and any(map(_holds_tensor, given))


def _rope_limit(config) -> int | None:
    """The length above which rotary tables of types "dynamic" and "longrope" depend on the longest row of a batch."""
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in [rope, *(p for p in rope.values() if isinstance(p, dict))]:
        if parameters.get("rope_type") in ("dynamic", "longrope"):
            original = parameters.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            return original or config.max_position_embeddings
    return None


NO_INTERFACE = (
    "does not call transformers' AttentionInterface in every layer, so its attention cannot be replaced "
    "(architectures that do: Llama, Qwen3, Mistral, Mixtral, Gemma2, Gemma3, Phi3, GPT-NeoX, GPT-2, OPT, "
    "GPT-OSS and most newer ones)"
)
KEEPS_STATE = (
    "keeps recurrent state beside keys and values, which cannot be rolled back: its layers compute it by themselves, "
    "not by the functions that Qwen3-Next, Kimi-Linear, Mamba-2, Jamba and LFM2 look up in their modules"
)
# types of layers whose only state is keys and values, and types without state
ATTENDING = {"full_attention", "sliding_attention", "chunked_attention", "attention"}
PLAIN = {"mlp", "moe", "dense", "sparse_mlp"}


def layer_kinds(config) -> list[str]:
    """The type of each layer if the configuration lists them, else an empty list."""
    return list(getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ())


def limit_of(config, probe: Probe) -> Limit | None:
    """The smallest of three limits; None without any.

    These are the position embeddings, a window or chunk that is passed to the mask but not to attention (so that paged
    attention cannot apply it), and the length from which rotary tables change."""
    limits = [Limit(n, "") for n in [getattr(config, "max_position_embeddings", None)] if n is not None]
    limits += [
        Limit(n, f" before the window or chunk of {n} tokens matters, which it tells to its mask alone")
        for n in probe.mask_windows - probe.windows
    ]
    if (rope := _rope_limit(config)) is not None:
        limits.append(Limit(rope, " before its rotary tables change, for all rows at once, with the longest text"))
    return min(limits, key=lambda limit: limit.positions, default=None)


def layout_of(probe: Probe) -> LayerLayout:
    """What each attention call keeps. One that was given the very keys and values of an earlier call shares them."""
    owners: dict[tuple, int] = {}  # all given tensors are alive, so that no two share an address by chance
    layers: list[Layer] = []
    for number, (kind, given) in enumerate(zip(probe.kinds, probe.given, strict=True)):
        where = tuple((x.device, x.data_ptr(), x.shape, x.stride()) for x in given)
        owner = owners.setdefault(where, number)
        layers.append(kind if owner == number else SharedLayer(owner))
    return LayerLayout(tuple(layers) or NOWHERE, tuple(probe.recurrent))


def largest_window(probe: Probe) -> int | None:
    """The largest sliding window that attention calls were given; None where one of them got none."""
    windows = [window for window in probe.windows if window is not None]
    return max(windows) if len(windows) == len(probe.windows) > 0 else None


def window_settings(model, layers: Sequence[str]) -> tuple:
    """What the windows of `layers`, the modules that attend, follow from: the configuration, or their own field."""
    own = [vars(model.get_submodule(name)).get("sliding_window") for name in layers]
    return model.config.get_text_config().to_dict(), own


def telling_length(config) -> int:
    """A number of tokens beyond which all windows, blocks and indexers of the configuration have an effect."""
    sizes = [
        value
        for name, value in vars(config).items()
        if type(value) is int and LENGTHS.search(name) and not name.endswith(("_id", "_size_base"))
    ]
    return min(LONGEST, max([SHORTEST, *(2 * size + 2 for size in sizes if 2 * size + 2 <= LONGEST)]))


def is_ours(error: Exception) -> bool:
    """Whether an exception was raised by this library's code rather than by the model's."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return frames[-1][0].f_globals.get("__name__", "").split(".")[0] in ("attention", "specdec")


def what_is_missing(probe: Probe, error: Exception) -> str:
    """Why a model cannot be run whose probe forward raised `error`, in words."""
    frame: FrameType | None = list(traceback.walk_tb(error.__traceback__))[-1][0]
    while frame is not None and frame.f_code.co_name != "forward" and not any("mask" in n for n in frame.f_locals):
        frame = frame.f_back
    names = {} if frame is None else frame.f_locals
    masks = [name for name, value in names.items() if "mask" in name and value is None]
    where = type(names.get("self", error)).__name__
    said = f"{type(error).__name__}: {error}"
    if masks and "None" in said:
        return (
            f"attends, or chooses what to attend to, by itself: {where} reads {masks[0]}, which a forward "
            "over packed tokens does not have "
            f"({said}); only attention that goes through transformers' AttentionInterface can be paged"
        )
    if not probe.kinds:
        return f"{NO_INTERFACE}; {where} stopped before its first attention call ({said})"
    return f"cannot run over packed tokens: {where} stopped after {len(probe.kinds)} attention calls ({said})"
