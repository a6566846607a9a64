"""The logits processors of a call."""

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from specdec.sampling import prefix_processors, warpers
from specdec.sampling.prefix_processors import PrefixProcessor, apply_leading, split_leading
from specdec.sampling.prefixes import Prefixes
from specdec.sampling.warpers import Warper, split, warp

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
    vocab_size: the target's, if it is known; processors that name other tokens run through the host.

    change_scores: whether there is any processor.
    need_prefix: whether any processor looks at the prefix.
    leading, warpers: where every processor is a function of tensors and of numbers of each row, those that look at the
        prefix, which come first (`prefix_processors.split_leading`), and the rest (`warpers.split`); otherwise
        `warpers` is None.
    numbers: those of each row, `numbers[i][row]`; the first `warper_numbers` are those of `warpers`.
    name_tokens: whether any processor looks at the prefix, or may look at ids of tokens.
    node_by_node: whether each prefix is processed by itself, on the host.
    need_host: names of processors that cannot run in a captured round.
    memory: names of processors whose result depends on earlier calls.
    """

    leading: tuple[PrefixProcessor, ...]
    warpers: tuple[Warper, ...] | None
    numbers: list[list[float]]

    def __init__(self, lists: Sequence[Sequence[Callable]], padding: Sequence[Tensor] = (),
                 padded: Sequence[Sequence[bool]] | None = None, vocab_size: int | None = None):  # fmt: skip
        self._lists, self._padding = lists, padding
        self._padded = [[False] * len(row) for row in lists] if padded is None else padded
        self.change_scores = any(len(row) > 0 for row in lists)
        names = {type(p).__name__ for row in lists for p in row}
        self.need_prefix = not names <= PREFIX_FREE
        self.leading, more = split_leading(lists, self._seen_before, vocab_size)
        self.warpers, self.numbers = split([row[len(self.leading) :] for row in lists]) or (None, [])
        self.warper_numbers = len(self.numbers)
        if self.warpers is None:
            self.leading, more = (), []
        self.numbers = self.numbers + more
        self.name_tokens = bool(self.leading) or self.change_scores and self.warpers is None
        self.node_by_node = self.need_prefix and self.warpers is None
        simple, known = ({kind.__name__ for kind in kinds} for kinds in (warpers.KINDS, prefix_processors.KINDS))
        unknown = names - simple - known or names - simple or names
        guilty = {name_of(p) for row in lists for p in row if type(p).__name__ in unknown}
        self.need_host = [] if self.warpers is not None else sorted(guilty)
        self.memory = sorted({name for row in lists for p in row for name in memory_of(p)})

    def _seen_before(self, row: int, i: int) -> list[int]:
        """The padding that the i-th processor of a row sees."""
        return self._padding[row].tolist() if self._padded[row][i] else []

    def kinds(self) -> Hashable:
        """What a captured round holds of them; `numbers` may change."""
        return self.leading, self.warpers

    def lead(self, logits: Tensor, numbers: Tensor, prefixes: Prefixes) -> Tensor:
        """Process `logits [A, n, V]` with `leading` alone -> scores `[A, n, V]`; `numbers [P, A]`: all of the rows'."""
        return apply_leading(self.leading, logits, numbers[self.warper_numbers :], prefixes)

    def warp(self, scores: Tensor, numbers: Tensor) -> Tensor:
        """Process `scores [M, V]` where no processor looks at the prefix, or with all but `leading`.

        numbers [P, M]: see `warpers.warp`."""
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
        if not self.need_prefix and not self.leading:
            numbers = torch.tensor(self.numbers, dtype=torch.float64).view(-1, len(self._lists))[:, list(rows)]
            return self.warp(scores, numbers.to(scores.device))
        assert prefixes is not None or not self.need_prefix, "these processors look at the prefix"
        processed = []
        for m, row in enumerate(rows):
            one = scores[m : m + 1].clone()
            if wanted is None or wanted[m]:
                prefix = whole = None if prefixes is None else prefixes(m)
                if prefix is not None and any(self._padded[row]):
                    whole = torch.cat([self._padding[row][None], prefix], 1)
                for processor, padded in zip(self._lists[row], self._padded[row], strict=True):
                    one = _processed(processor, whole if padded else prefix, one)
            else:
                one.fill_(float("-inf"))
            processed.append(one)
        return torch.cat(processed)


def may_follow(tokens: Tensor, scores: Tensor, ends: Tensor) -> Tensor:
    """After which of `tokens [...]`, with `scores [...]`, a text may go on: they are allowed and do not end it.

    ends [..., K]: the tokens that do, filled up with -1."""
    return (scores > float("-inf")) & (tokens[..., None] != ends).all(-1)


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
