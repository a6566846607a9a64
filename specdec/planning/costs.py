"""Measured times of the parts of a round, in units of one autoregressive step."""

import statistics
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.model.feature_runner import FeatureRunner
from specdec.model.runner import ModelRunner

SIZES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, slots=True)
class Costs:
    """`step_seconds` is the time of a target forward with one token; `draft` and `verify` are multiples of it.

    `draft`: a draft model's step; `verify[i]`: a target forward with `sizes[i]` tokens."""

    step_seconds: float
    draft: float
    sizes: tuple[int, ...]
    verify: tuple[float, ...]

    def __post_init__(self):
        if len(self.sizes) != len(self.verify) or list(self.sizes) != sorted(set(self.sizes)) or self.sizes[0] < 1:
            raise ValueError(f"sizes must rise from at least 1, with one cost each, got {self.sizes} and {self.verify}")

    def verify_at(self, size: int) -> float:
        """The cost of `size` tokens, interpolated linearly between measured sizes, or extrapolated from the last two.

        >>> Costs(0.01, 0.1, (1, 4, 8), (1.0, 1.3, 2.1)).verify_at(6)
        1.7000000000000002
        """
        if size < 1:
            raise ValueError(f"a verification has at least one token, got {size}")
        if size in self.sizes:
            return self.verify[self.sizes.index(size)]
        if len(self.sizes) == 1 or size <= self.sizes[0]:
            return self.verify[0]
        right = min(max(bisect_left(self.sizes, size), 1), len(self.sizes) - 1)
        (x, y), (u, v) = ((self.sizes[i], self.verify[i]) for i in (right - 1, right))
        return y + (v - y) * (size - x) / (u - x)

    def of_round(self, size: int, depth: int) -> float:
        """The cost of drafting a tree of `size` nodes (with the root) and `depth` levels, and of verifying it.

        >>> Costs(0.01, 0.1, (1, 4), (1.0, 1.25)).of_round(4, 3)
        1.55
        """
        return depth * self.draft + self.verify_at(size)


@torch.inference_mode()
def measure_costs(target, draft=None, sizes: Sequence[int] = SIZES, context: int = 128, repeats: int = 15,
                  rows: int = 1) -> Costs:  # fmt: skip
    """Measure `Costs` of `rows` texts after `context` tokens each, as medians of `repeats` forwards.

    Each row verifies a size's tokens, so that a forward has `rows` times as many.

    `target` and `draft` are transformers models or `ModelRunner`s, `draft` may be a `FeatureRunner`; without a draft
    model the cost `draft` is 0. Raises ValueError when both are the same runner."""
    target, draft = (
        model if model is None or isinstance(model, ModelRunner | FeatureRunner) else ModelRunner(model)
        for model in (target, draft)
    )
    if target is draft:
        raise ValueError("target and draft must be two runners, so that each has a cache of its own")
    if draft is not None:
        draft.match_mode(target)
    sizes = tuple(sorted({1, *sizes}))
    runners = [runner for runner in (target, draft) if runner is not None]
    jobs = [(("verify", size), target, size, 1) for size in sizes] + ([("draft", draft, 1, 4)] if draft else [])
    sequences: dict[ModelRunner | FeatureRunner, list[int]] = {}
    states: Tensor | None = None  # [rows, h]: what a step of a model that reads features goes on from
    times: dict[object, list[float]] = {name: [] for name, *_ in jobs}
    try:
        for runner in runners:
            runner.reserve([context + max(sizes) + 4] * rows)
            sequences[runner] = [runner.cache.add() for _ in range(rows)]
            text = torch.arange(context, device=target.device) % target.vocab_size
            if isinstance(runner, FeatureRunner):
                states = _states_after(text, target, sequences[target], runner, sequences[runner])
            else:
                runner.extend(sequences[runner], [text % runner.vocab_size] * rows)
        # interleaved, so that a slow moment affects all; draft steps run in sequence, as in a round
        for _ in range(repeats + 3):
            for name, runner, count, calls in jobs:
                tokens = torch.arange(count, device=target.device).repeat(rows)
                began = time.perf_counter()
                for _ in range(calls):
                    _logits(runner, sequences[runner], tokens, states).argmax(-1).tolist()
                times[name].append((time.perf_counter() - began) / calls)
                for sequence in sequences[runner]:
                    runner.cache.truncate(sequence, context)
    finally:
        for runner, taken in sequences.items():
            for sequence in taken:
                runner.cache.free(sequence)
    median = {name: statistics.median(values[3:]) for name, values in times.items()}
    step = median["verify", 1]
    verify = tuple(median["verify", size] / step for size in sizes)
    return Costs(step, median["draft"] / step if draft else 0.0, sizes, verify)


def _states_after(text: Tensor, target: ModelRunner, sequences: Sequence[int], draft: FeatureRunner,
                  own: Sequence[int]) -> Tensor:  # fmt: skip
    """Run `text [n]` through both models, once a row -> what the draft model gives for its last token, `[rows, h]`."""
    found = []
    for sequence, of_draft in zip(sequences, own, strict=True):
        target.cache.truncate(sequence, 0)
        features = target.forward([sequence], text, [len(text)], features=draft.source.traits.features).features
        assert features is not None
        found.append(draft.forward([of_draft], text, features, True, [len(text)])[1][-1:])
    return torch.cat(found)


def _logits(runner: ModelRunner | FeatureRunner, sequences: Sequence[int], tokens: Tensor,
            states: Tensor | None) -> Tensor:  # fmt: skip
    """One forward over `tokens [T]`, as many of each sequence, of a model that reads features after `states [T, h]`."""
    counts = [len(tokens) // len(sequences)] * len(sequences)
    if isinstance(runner, FeatureRunner):
        assert states is not None
        return runner.logits(runner.forward(sequences, tokens, states, False, counts)[0])
    return runner.forward(sequences, tokens % runner.vocab_size, counts).logits
