"""The logits processors of a call."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from specdec.sampling.warpers import KINDS, Warper, split, warp

# processors of transformers that do not look at the prefix
PREFIX_FREE = {
    "TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "TopHLogitsWarper", "MinPLogitsWarper",
    "TypicalLogitsWarper", "EpsilonLogitsWarper", "EtaLogitsWarper", "SuppressTokensLogitsProcessor",
    "InfNanRemoveLogitsProcessor", "LogitNormalization",
}  # fmt: skip

# processors of transformers whose result depends on earlier calls
WITH_MEMORY = {
    "SynthIDTextWatermarkLogitsProcessor", "UnbatchedClassifierFreeGuidanceLogitsProcessor", "WhisperNoSpeechDetection",
    "DiaEOSDelayPatternLogitsProcessor", "HiggsAudioV2DelayPatternLogitsProcessor",
}  # fmt: skip


class Processors:
    """The logits processors of a call: one list per row, because each row has its own prompt and prefix.

    lists: `lists[row]` is a transformers LogitsProcessorList; if none looks at the prefix, rows have the same kinds.
    padding: `padding[row] [n]`, the tokens before the row's prompt in the user's batch.
    padded: `padded[row]`, which of the row's processors see the padding before the prefix (None: none).
    ends: tokens that end a text.

    change_scores: whether there is any processor.
    need_prefix: whether any processor looks at the prefix.
    warpers, numbers: where every processor is a function of the scores and of one number per row (see
        `warpers.split`); otherwise `warpers` is None.
    need_host: names of processors that cannot run in a captured round.
    memory: names of processors whose result depends on earlier calls.
    """

    warpers: tuple[Warper, ...] | None
    numbers: list[list[float]]

    def __init__(self, lists: Sequence[Sequence[Callable]], padding: Sequence[Tensor] = (),
                 padded: Sequence[Sequence[bool]] | None = None, ends: Iterable[int] = ()):  # fmt: skip
        self._lists, self._padding, self._ends = lists, padding, tuple(ends)
        self._padded = [[False] * len(row) for row in lists] if padded is None else padded
        self.change_scores = any(len(row) > 0 for row in lists)
        names = {type(p).__name__ for row in lists for p in row}
        self.need_prefix = not names <= PREFIX_FREE
        self.warpers, self.numbers = split(lists) or (None, [])
        unknown = names - {kind.__name__ for kind in KINDS} or names
        self.need_host = [] if self.warpers is not None else sorted(unknown)
        self.memory = sorted({name for row in lists for p in row for name in memory_of(p)})

    def warp(self, scores: Tensor, numbers: Tensor) -> Tensor:
        """Process `scores [M, V]` where no processor looks at the prefix; `numbers [P, M]`: see `warpers.warp`."""
        if self.warpers is not None:
            return warp(self.warpers, numbers, scores)
        for processor in self._lists[0]:
            scores = _processed(processor, None, scores)
        return scores

    def __call__(self, logits: Tensor, rows: Sequence[int], prefixes: Callable[[int], Tensor] | None = None,
                 wanted: Sequence[bool] | None = None) -> Tensor:  # fmt: skip
        """Process `logits [M, V]` -> scores `[M, V]` in float32 (float64 where the logits are).

        Position m belongs to row `rows[m]` and follows the tokens `prefixes(m) [1, length]`. Where processors look at
        the prefix, they run only at positions with `wanted[m]` (None: all); scores elsewhere are -inf."""
        scores = as_scores(logits)
        if not self.need_prefix:
            numbers = torch.tensor(self.numbers, dtype=torch.float64).view(-1, len(self._lists))[:, list(rows)]
            return self.warp(scores, numbers.to(scores.device))
        assert prefixes is not None, "these processors look at the prefix"
        processed = []
        for m, row in enumerate(rows):
            one = scores[m : m + 1].clone()
            if wanted is None or wanted[m]:
                prefix = prefixes(m)
                whole = torch.cat([self._padding[row][None], prefix], 1) if any(self._padded[row]) else prefix
                for processor, padded in zip(self._lists[row], self._padded[row], strict=True):
                    one = _processed(processor, whole if padded else prefix, one)
            else:
                one.fill_(float("-inf"))
            processed.append(one)
        return torch.cat(processed)

    def may_follow(self, tokens: Tensor, scores: Tensor) -> Tensor:
        """After which of `tokens [...]`, with `scores [...]`, a text may go on: they are allowed and do not end it."""
        going = scores > float("-inf")
        for end in self._ends:
            going = going & (tokens != end)
        return going


def as_scores(logits: Tensor) -> Tensor:
    """Logits in the dtype that processors take: float32, or float64 where the logits are."""
    return logits if logits.dtype == torch.float64 else logits.float()


def memory_of(processor: Callable) -> list[str]:
    """The name, in a list, of a transformers processor that depends on earlier calls; empty for others."""
    return [type(processor).__name__ for kind in type(processor).__mro__ if kind.__name__ in WITH_MEMORY][:1]


def name_of(function: Callable) -> str:
    """The name of a processor, criterion or rule, for messages."""
    return getattr(function, "__name__", type(function).__name__)


def _processed(processor: Callable, prefix: Tensor | None, scores: Tensor) -> Tensor:
    try:
        found = processor(prefix, scores)
    except Exception as error:
        after = "" if prefix is None else f" after the tokens {_ending(prefix[0].tolist())}"
        raise RuntimeError(
            f"the logits processor {name_of(processor)} raised {type(error).__name__}{after}: {error}. A processor "
            "must be a function of (input_ids, scores): it is called for drafted tokens too, more than once and in any "
            "order (specdec.sampling.grammar has one for stateful matchers)"
        ) from error
    if not isinstance(found, Tensor) or found.shape != scores.shape:
        given = list(found.shape) if isinstance(found, Tensor) else found
        raise ValueError(
            f"the logits processor {name_of(processor)} must return scores of the shape it was given, "
            f"{list(scores.shape)}, got {given!r}"
        )
    return found


def _ending(tokens: list[int]) -> str:
    return str(tokens) if len(tokens) <= 8 else f"[…, {str(tokens[-8:])[1:]}"
