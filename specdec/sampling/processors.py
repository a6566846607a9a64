"""The logits processors of a call."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from specdec.sampling.warpers import KINDS, split, warp

# processors of transformers whose result does not depend on the tokens before
PREFIX_FREE = {
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "TopHLogitsWarper",
    "MinPLogitsWarper",
    "TypicalLogitsWarper",
    "EpsilonLogitsWarper",
    "EtaLogitsWarper",
    "SuppressTokensLogitsProcessor",
    "InfNanRemoveLogitsProcessor",
    "LogitNormalization",
}


# processors of transformers whose result depends on the calls before
WITH_MEMORY = {
    "SynthIDTextWatermarkLogitsProcessor", "UnbatchedClassifierFreeGuidanceLogitsProcessor", "WhisperNoSpeechDetection",
    "DiaEOSDelayPatternLogitsProcessor", "HiggsAudioV2DelayPatternLogitsProcessor",
}  # fmt: skip


class Processors:
    """The logits processors of a call: one list per row, because each row has its own prompt and prefix.

    `lists[row]` is a transformers LogitsProcessorList. Where no processor looks at the prefix, all rows have the same
    kinds of processors. `padding[row] [n]` are the tokens that the user's batch has in front of the row's prompt, and
    `padded[row]` says which of its processors see them in front of the prefix (None: none does). `ends`: tokens that
    end a text.

    `change_scores`: whether there is any processor at all; `warpers`: those of a call whose processors are all
    functions of the scores and a number per row (`numbers`), else None; `ask_host`: the names of processors that cannot
    run in a captured round; `memory`: of those whose result depends on earlier calls.
    """

    def __init__(
        self,
        lists: Sequence[Sequence[Callable]],
        padding: Sequence[Tensor] | None = None,
        padded: Sequence[Sequence[bool]] | None = None,
        ends: Iterable[int] = (),
    ):
        self._lists, self._padding, self._ends = lists, padding, tuple(ends)
        self._padded = [[False] * len(row) for row in lists] if padded is None else padded
        self.change_scores = any(len(row) > 0 for row in lists)
        names = {type(p).__name__ for row in lists for p in row}
        self.need_prefix = not names <= PREFIX_FREE
        self.warpers, self.numbers = split(lists) or (None, [])
        unknown = names - {kind.__name__ for kind in KINDS} or names
        self.ask_host = [] if self.warpers is not None else sorted(unknown)
        self.memory = sorted({name for row in lists for p in row for name in memory_of(p)})

    def warp(self, scores: Tensor, numbers: Tensor | None) -> Tensor:
        """`scores [M, V]` through processors that do not look at the prefix; `numbers [P, M]`: see `warpers.warp`."""
        if self.warpers is not None:
            return warp(self.warpers, numbers, scores)
        for processor in self._lists[0]:
            scores = _processed(processor, None, scores)
        return scores

    def __call__(self, logits: Tensor, rows: Sequence[int], prefixes: Callable[[int], Tensor] | None = None,
                 asked: Sequence[bool] | None = None) -> Tensor:  # fmt: skip
        """`logits [M, V]` of M positions, position m in row `rows[m]` after the tokens `prefixes(m) [1, length]` ->
        float32 scores `[M, V]`.

        Where processors look at the prefix, positions that are not `asked` for (None: all are) get -inf everywhere, and
        no processor is called for them.
        """
        scores = as_scores(logits)
        if not self.need_prefix:
            numbers = torch.tensor(self.numbers, dtype=torch.float64).view(-1, len(self._lists))[:, list(rows)]
            return self.warp(scores, numbers.to(scores.device))
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
        """Which of `tokens [...]`, each with its score `scores [...]`, a text may go on behind: those that are not
        forbidden and do not end it.
        """
        going = scores > float("-inf")
        for end in self._ends:
            going = going & (tokens != end)
        return going


def as_scores(logits: Tensor) -> Tensor:
    """What processors are given: float32, or float64 where the logits are."""
    return logits if logits.dtype == torch.float64 else logits.float()


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
            f"the logits processor {name_of(processor)} raised {type(error).__name__}{behind}: {error}. A "
            "processor must be a function of "
            "(input_ids, scores): it is asked about drafts too, more than once and in any order "
            "(specdec.sampling.grammar has one for stateful matchers)"
        ) from error
    if not isinstance(found, Tensor) or found.shape != scores.shape:
        said = list(found.shape) if isinstance(found, Tensor) else found
        raise ValueError(
            f"the logits processor {name_of(processor)} must return scores of the shape it was given, "
            f"{list(scores.shape)}, got {said!r}"
        )
    return found


def _ending(tokens: list[int]) -> str:
    return str(tokens) if len(tokens) <= 8 else f"[…, {str(tokens[-8:])[1:]}"
