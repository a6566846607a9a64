"""From logits to the distribution a token is drawn from, and one draw from it."""

from collections.abc import Callable, Iterable, Sequence
from operator import gt

import torch
from torch import Tensor

from attention.dispatch import resolve

# processors of transformers whose result does not depend on the tokens before
PREFIX_FREE = {
    "TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "TopHLogitsWarper", "MinPLogitsWarper", "TypicalLogitsWarper",
    "EpsilonLogitsWarper", "EtaLogitsWarper", "SuppressTokensLogitsProcessor", "InfNanRemoveLogitsProcessor", "LogitNormalization",
}  # fmt: skip

# those of them that ask the device nothing
ON_DEVICE = PREFIX_FREE - {"TopHLogitsWarper", "EtaLogitsWarper", "SuppressTokensLogitsProcessor"}

# processors of transformers whose result depends on the calls before
WITH_MEMORY = {
    "SynthIDTextWatermarkLogitsProcessor", "UnbatchedClassifierFreeGuidanceLogitsProcessor", "WhisperNoSpeechDetection",
    "DiaEOSDelayPatternLogitsProcessor", "HiggsAudioV2DelayPatternLogitsProcessor",
}  # fmt: skip


def draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """One index per row of `weights [..., V]` (float32 or float64, non-negative, with a positive sum) by inverting the cumulative sum at `uniform [...]`.

    A weight of zero is never drawn: `uniform` lies in [0, 1), and the first index whose cumulative sum exceeds it has a weight above zero.
    """
    cumulative = weights.double().cumsum(-1)
    threshold = uniform[..., None] * cumulative[..., -1:]
    # the clamp matters for NaN weights only, which the caller reports; it keeps the index inside the vocabulary
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1).clamp_(max=weights.shape[-1] - 1)


MAX_TOP = 16  # scores that a kernel picks out of a row


def best(scores: Tensor, impl: str | None = None) -> Tensor:
    """`scores.argmax(-1)`: the first of equal ones, NaN before all. torch's own leaves most of a GPU idle where rows are few and long."""
    found = _by_kernel(scores, 1, impl)
    return scores.argmax(-1) if found is None else found[1][..., 0]


def highest(scores: Tensor, impl: str | None = None) -> Tensor:
    """`scores.amax(-1)`, likewise."""
    found = _by_kernel(scores, 1, impl)
    return scores.amax(-1) if found is None else found[0][..., 0]


def peak(scores: Tensor, impl: str | None = None) -> tuple[Tensor, Tensor]:
    """`scores.max(-1)`, both of them in one pass: `highest` and `best`."""
    found = _by_kernel(scores, 1, impl)
    return scores.max(-1) if found is None else (found[0][..., 0], found[1][..., 0])


def top(scores: Tensor, count: int, impl: str | None = None) -> tuple[Tensor, Tensor]:
    """The `count` largest of `scores [..., V]`, values and indices `[..., count]`: as `topk`, but the first of equal ones first, NaN before all."""
    found = _by_kernel(scores, count, impl)
    if found is not None:
        return found
    return _top_on_host(scores, count) if scores.device.type == "cpu" else _top_by_keys(scores, count)


def _top_on_host(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """By `topk`, which takes any of equal ones; rows where that matters are looked at again, as looking costs little on a CPU."""
    values, places = scores.topk(min(count + 1, scores.shape[-1]))
    found = values.tolist() if values.ndim == 2 else values.reshape(-1, values.shape[-1]).tolist()
    again = [i for i, row in enumerate(found) if not all(map(gt, row, row[1:]))]  # NaN is not greater than anything
    values, places = values.narrow(-1, 0, count), places.narrow(-1, 0, count)
    if again:
        shape, rows, values, places = values.shape, scores.detach().reshape(-1, scores.shape[-1]), values.reshape(-1, count), places.reshape(-1, count)
        for i in again:
            last = found[i][count - 1]
            if len(found[i]) > count and not last > found[i][count]:  # others may belong among them: all in order that are not smaller, NaN included
                row = rows[i] if rows.dtype in (torch.float32, torch.float64) else rows[i].float()
                few = torch.from_numpy((~(row.numpy() < last)).nonzero()[0])
            else:
                few = places[i].sort().values
            places[i] = few[rows[i, few].sort(descending=True, stable=True).indices[:count]]
            values[i] = rows[i, places[i]]
        values, places = values.view(shape), places.view(shape)
    return values, places


def _top_by_keys(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """By `topk` of integers, no two of which are equal: a float32's bits in the order of its values, then its place from behind."""
    if scores.dtype == torch.float64:
        ordered = scores.sort(descending=True, stable=True)
        return ordered.values[..., :count], ordered.indices[..., :count]
    bits = (scores.float() + 0.0).view(torch.int32)  # -0.0 is 0.0
    bits = torch.where(scores.isnan(), 0x7FFFFFFF, bits ^ (bits >> 31 & 0x7FFFFFFF)).long()
    places = (bits << 32 | torch.arange(scores.shape[-1] - 1, -1, -1, device=scores.device)).topk(count).indices
    return scores.gather(-1, places), places


def _by_kernel(scores: Tensor, count: int, impl: str | None) -> tuple[Tensor, Tensor] | None:
    """What `top` gives; None where PyTorch is to find it."""

    def obstacle() -> str | None:
        if scores.dtype == torch.float64:
            return "it compares in float32"
        return f"it finds up to {MAX_TOP}, got {count}" if count > MAX_TOP else None

    if resolve(impl, scores.device, obstacle) == "reference":
        return None
    from specdec.sampling.top_kernel import launch_top

    return launch_top(scores, count)


def residual(p: Tensor, q: Tensor) -> Tensor:
    """norm(max(p - q, 0)) `[..., V]`, or p where the two are equal (nothing to reject)."""
    rest = (p - q).clamp(min=0)
    total = rest.sum(-1, keepdim=True)
    return torch.where(total > 0, rest / total, p)


class Processors:
    """The logits processors of a call: one list for each row, because each row has its own prompt and prefix.

    `lists[row]` is a transformers LogitsProcessorList. Where no processor looks at the prefix, the lists of all rows must be the same, and
    all positions go through the first in one call. `padding[row] [n]` are the tokens that the user's batch has in front of the row's prompt,
    and `padded[row]` says of each of its processors whether it sees them in front of the prefix (None: none does). `ends`: tokens that end a text.

    `change_scores`: whether there is any processor at all; `ask_host`: the names of those that cannot run without the host; `memory`: of
    those that remember their calls.
    """

    def __init__(self, lists: Sequence[Sequence[Callable]], padding: Sequence[Tensor] | None = None, padded: Sequence[Sequence[bool]] | None = None,
                 ends: Iterable[int] = ()):  # fmt: skip
        self._lists, self._padding, self._ends = lists, padding, tuple(ends)
        self._padded = [[False] * len(row) for row in lists] if padded is None else padded
        self.change_scores = any(len(row) > 0 for row in lists)
        names = {type(p).__name__ for row in lists for p in row}
        self.need_prefix = not names <= PREFIX_FREE
        self.ask_host = sorted(names - ON_DEVICE)
        self.memory = sorted({name for row in lists for p in row for name in memory_of(p)})

    @property
    def signature(self) -> tuple:
        """What tells apart two calls whose processors do not look at the prefix."""
        return tuple((type(p), *((name, _plain(value)) for name, value in sorted(vars(p).items()))) for p in self._lists[0])

    def __call__(self, logits: Tensor, rows: Sequence[int], prefixes: Callable[[int], Tensor] | None = None,
                 asked: Sequence[bool] | None = None) -> Tensor:  # fmt: skip
        """`logits [M, V]` of M positions, position m in row `rows[m]` after the tokens `prefixes(m) [1, length]` -> float32 scores `[M, V]`.

        Where processors look at the prefix, those that are not `asked` for (None: all are) get -inf everywhere, and no processor hears of them.
        """
        scores = logits if logits.dtype == torch.float64 else logits.float()
        if not self.need_prefix:
            for processor in self._lists[0]:
                scores = _processed(processor, None, scores)
            return scores
        processed = []
        for m, row in enumerate(rows):
            one = scores[m : m + 1].clone()
            if asked is None or asked[m]:
                prefix = prefixes(m)
                whole = torch.cat([self._padding[row][None], prefix], 1) if any(self._padded[row]) else prefix
                for processor, padded in zip(self._lists[row], self._padded[row], strict=True):
                    one = _processed(processor, whole if padded else prefix, one)
            else:
                one.fill_(float("-inf"))
            processed.append(one)
        return torch.cat(processed)

    def may_follow(self, tokens: Tensor, scores: Tensor) -> Tensor:
        """Which of `tokens [...]`, each with its score `scores [...]`, a text may go on behind: those that are not forbidden and do not end it."""
        going = scores > float("-inf")
        for end in self._ends:
            going = going & (tokens != end)
        return going


def memory_of(processor: Callable) -> list[str]:
    """The name of a processor of transformers that remembers what it was called with; empty for others."""
    return [type(processor).__name__ for kind in type(processor).__mro__ if kind.__name__ in WITH_MEMORY][:1]


def name_of(function: Callable) -> str:
    """What a user knows a processor or a criterion by."""
    return getattr(function, "__name__", type(function).__name__)


def _processed(processor: Callable, prefix: Tensor | None, scores: Tensor) -> Tensor:
    try:
        found = processor(prefix, scores)
    except Exception as error:
        behind = "" if prefix is None else f" behind the tokens {_ending(prefix[0].tolist())}"
        raise RuntimeError(
            f"the logits processor {name_of(processor)} raised {type(error).__name__}{behind}: {error}. A processor must be a function of "
            "(input_ids, scores): it is asked about drafts too, more than once and in any order (specdec.sampling.grammar has one for stateful matchers)"
        ) from error
    if not isinstance(found, Tensor) or found.shape != scores.shape:
        said = list(found.shape) if isinstance(found, Tensor) else found
        raise ValueError(f"the logits processor {name_of(processor)} must return scores of the shape it was given, {list(scores.shape)}, got {said!r}")
    return found


def _ending(tokens: list[int]) -> str:
    return str(tokens) if len(tokens) <= 8 else f"[…, {str(tokens[-8:])[1:]}"


def _plain(value) -> str:
    return repr(value.tolist() if isinstance(value, Tensor) else value)
