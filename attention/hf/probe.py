"""What a probe forward shows of a model: whether, in which order and with which shapes it calls transformers'
AttentionInterface, how far it can be run, and in words what is missing where it cannot."""

import re
import traceback
from contextvars import ContextVar
from dataclasses import dataclass

from torch import Tensor

PROBE_NAME = "specdec_probe"
PROBE_TOKENS = 2
SHORTEST, LONGEST = 6, 520  # tokens of the comparison between pages and the model by itself
# settings that matter only from some length on: a comparison has to be longer
LENGTHS = re.compile(r"window|chunk|block|index|budget|compress|local|stride|sparse|floor_scale|original_max_position")
HARMLESS = {  # tensors that models hand to every implementation and attention over pages has no use for
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
    """The positions up to which a model runs over pages exactly, and in words why no further."""

    positions: int
    why: str

    def __str__(self) -> str:
        return f"the model's {self.positions} positions{self.why}"


class Probe:
    """Stands in for a batch in the probe forward and writes down what the model says to its attention calls and to its
    masks.
    """

    def __init__(self):
        self.shapes: list[tuple[int, int, int]] = []  # (G, D, Dv) of each attention call, in order
        self.callers: list[object] = []  # the modules that called, in order
        self.windows: set[int | None] = set()  # sliding windows that attention calls name
        self.mask_windows: set[int] = set()  # windows or chunks that masks are cut to

    def attend(self, module, queries: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
        """Note a call with `queries [T, H, D]`, `keys [T, G, D]`, `values [T, G, Dv]`; returns zeros `[T, H, Dv]`."""
        self.shapes.append((keys.shape[1], keys.shape[2], values.shape[2]))
        self.callers.append(module)
        self.windows.add(window)
        return queries.new_zeros(queries.shape[0], queries.shape[1], values.shape[2])


probing: ContextVar[Probe | None] = ContextVar("probing", default=None)


def probe_mask(*_, local_size=None, use_vmap=False, **__) -> None:
    """Called by transformers in place of building a mask."""
    if use_vmap:
        raise UnsupportedArchitecture("its mask is more than causal (a bidirectional prefix or an overlay)")
    if local_size:  # 0 means no window
        probing.get().mask_windows.add(local_size)


def require_plain(name: str, queries: Tensor, keys: Tensor, values: Tensor, kwargs: dict) -> None:
    """Raise UnsupportedArchitecture for an attention call that says more than its queries, keys and values."""
    if not len(queries) == len(keys) == len(values) == PROBE_TOKENS:
        raise UnsupportedArchitecture(
            f"{name} attends with {len(queries)} queries to {len(keys)} keys in a forward over {PROBE_TOKENS} "
            "tokens: it chooses or adds keys of its own"
        )
    unknown = [key for key, given in kwargs.items() if key not in HARMLESS and _holds_tensor(given)]
    if unknown:
        raise UnsupportedArchitecture(
            f"{name} hands {', '.join(unknown)} to its attention call, which attention over pages knows nothing of"
        )


def _holds_tensor(given) -> bool:
    return isinstance(given, Tensor) or isinstance(given, list | tuple) and any(map(_holds_tensor, given))


def _rope_limit(config) -> int | None:
    """Where rotary tables that depend on the longest text of a batch ("dynamic", "longrope") change: below it, rows are
    independent.
    """
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
ATTENDING = {
    "full_attention",
    "sliding_attention",
    "chunked_attention",
    "attention",
}  # kinds of layers that keep keys and values and nothing else
PLAIN = {"mlp", "moe", "dense", "sparse_mlp"}  # and kinds that keep nothing


def require_causal_lm(model) -> None:
    """Raise UnsupportedArchitecture for a model that writes no text, or that puts something before it."""
    name, adapters = type(model).__name__, getattr(model, "peft_config", None) or {}
    prompt = next((adapter for adapter in adapters.values() if getattr(adapter, "is_prompt_learning", False)), None)
    if prompt is not None:
        raise UnsupportedArchitecture(
            f"{name} with {type(prompt).__name__} puts virtual tokens before every prompt, which a paged "
            "cache does not hold"
        )
    if not getattr(model, "can_generate", lambda: True)():
        raise UnsupportedArchitecture(f"{name} is no causal language model: it cannot generate text")


def layer_kinds(config) -> list[str]:
    """The kind of each layer, where a configuration names them one by one; else nothing."""
    return list(getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ())


def limit_of(config, probe: Probe) -> Limit | None:
    """The least of: positions, a window or chunk that only the mask knows (invisible until a text outgrows it),
    changing rotary tables.
    """
    limits = [Limit(n, "") for n in [getattr(config, "max_position_embeddings", None)] if n is not None]
    limits += [
        Limit(n, f" before the window or chunk of {n} tokens matters, which it tells to its mask alone")
        for n in probe.mask_windows - probe.windows
    ]
    if (rope := _rope_limit(config)) is not None:
        limits.append(Limit(rope, " before its rotary tables change, for all rows at once, with the longest text"))
    return min(limits, key=lambda limit: limit.positions, default=None)


def telling_length(config) -> int:
    """Tokens that show whatever the configuration's windows, blocks and indexers do beyond some length."""
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
    """Why a model whose probe forward raised cannot be run, in words."""
    frame = list(traceback.walk_tb(error.__traceback__))[-1][0]
    while (
        frame is not None and not any("mask" in name for name in frame.f_locals) and frame.f_code.co_name != "forward"
    ):
        frame = frame.f_back
    masks = [
        name
        for name, value in (frame.f_locals.items() if frame is not None else ())
        if "mask" in name and value is None
    ]
    where = type(frame.f_locals.get("self", error)).__name__ if frame is not None else type(error).__name__
    said = f"{type(error).__name__}: {error}"
    if masks and "None" in said:
        return (
            f"attends, or chooses what to attend to, by itself: {where} reads {masks[0]}, which a forward "
            "over packed tokens does not have "
            f"({said}); only attention that goes through transformers' AttentionInterface can be paged"
        )
    if not probe.shapes:
        return f"{NO_INTERFACE}; {where} stopped before its first attention call ({said})"
    return f"cannot run over packed tokens: {where} stopped after {len(probe.shapes)} attention calls ({said})"
