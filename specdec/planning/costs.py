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
def measure_costs(target, draft=None, sizes: Sequence[int] = SIZES, context: int = 128, repeats: int = 15) -> Costs:
    """Measure `Costs` at batch 1 after `context` tokens, as medians of `repeats` forwards.

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
    sequences: dict[ModelRunner | FeatureRunner, int] = {}
    states: Tensor | None = None  # [1, h]: what a step of a model that reads features goes on from
    times: dict[object, list[float]] = {name: [] for name, *_ in jobs}
    try:
        for runner in runners:
            runner.reserve([context + max(sizes) + 4])
            sequences[runner] = runner.cache.add()
            text = torch.arange(context, device=target.device) % target.vocab_size
            if isinstance(runner, FeatureRunner):
                states = _states_after(text, target, sequences[target], runner, sequences[runner])
            else:
                runner.extend([sequences[runner]], [text % runner.vocab_size])
        # interleaved, so that a slow moment affects all; draft steps run in sequence, as in a round
        for _ in range(repeats + 3):
            for name, runner, count, calls in jobs:
                tokens = torch.arange(count, device=target.device)
                began = time.perf_counter()
                for _ in range(calls):
                    _logits(runner, sequences[runner], tokens, states).argmax(-1).tolist()
                times[name].append((time.perf_counter() - began) / calls)
                runner.cache.truncate(sequences[runner], context)
    finally:
        for runner, sequence in sequences.items():
            runner.cache.free(sequence)
    median = {name: statistics.median(values[3:]) for name, values in times.items()}
    step = median["verify", 1]
    verify = tuple(median["verify", size] / step for size in sizes)
    return Costs(step, median["draft"] / step if draft else 0.0, sizes, verify)


def _states_after(text: Tensor, target: ModelRunner, sequence: int, draft: FeatureRunner, own: int) -> Tensor:
    """Run `text [n]` through both models -> what the draft model gives for its last token, `[1, h]`."""
    target.cache.truncate(sequence, 0)
    features = target.forward([sequence], text, [len(text)], features=draft.source.traits.features).features
    assert features is not None
    return draft.forward([own], text, features, True, [len(text)])[1][-1:]


def _logits(runner: ModelRunner | FeatureRunner, sequence: int, tokens: Tensor, states: Tensor | None) -> Tensor:
    """One forward over `tokens [n]`, of a model that reads features after `states [n, h]` of its own."""
    if isinstance(runner, FeatureRunner):
        assert states is not None
        return runner.logits(runner.forward([sequence], tokens, states, False, [len(tokens)])[0])
    return runner.forward([sequence], tokens % runner.vocab_size, [len(tokens)]).logits
