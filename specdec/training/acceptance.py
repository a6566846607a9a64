"""Acceptance length on held-out prompts, measured by decoding them, also while a drafter learns."""

import copy
from collections.abc import Callable, Sequence

from torch import nn

from specdec.drafters.base import Drafter
from specdec.generation.generators import SpeculativeGenerator
from specdec.model.runner import ModelRunner
from specdec.report.stats import RoundStats, pool
from specdec.training.data import Rows
from specdec.training.labels import IGNORED
from specdec.training.learner import Watch
from specdec.training.self_distillation import padded

LENGTH = "tokens_per_round"  # the acceptance length in the records of a training


def decode_prompts(target: ModelRunner, drafter: Drafter, prompts: Sequence[list[int]], max_new_tokens: int,
                   at_once: int = 32) -> RoundStats:  # fmt: skip
    """All prompts continued greedily, `at_once` at a time; `tokens_per_round` is the acceptance length."""
    generator, stats = SpeculativeGenerator(target, drafter), []
    for start in range(0, len(prompts), at_once):
        ids, mask = padded(prompts[start : start + at_once], target.device)
        stats.append(generator.generate(ids, mask, max_new_tokens=max_new_tokens).stats.pooled)
    return pool(stats)


def measured_length(model, module: nn.Module, make_drafter: Callable[[nn.Module], Drafter],
                    prompts: Sequence[list[int]], max_new_tokens: int) -> dict[str, float]:  # fmt: skip
    """The acceptance length of `module`, which learns, on `prompts` in the dtype of `model`; {} without prompts."""
    if not prompts:
        return {}
    runner = ModelRunner(model, mode="eager")
    # a copy: decoding may join the weights of what it runs, and these go on learning
    drafter = make_drafter(copy.deepcopy(module).to(runner.dtype))
    return {LENGTH: decode_prompts(runner, drafter, prompts, max_new_tokens).tokens_per_round or 0.0}


def watch_length(prompts: Sequence[list[int]], patience: int | None) -> Watch | None:
    """What stops a training by its acceptance length; None without prompts. Raises ValueError for a patience then."""
    if patience is not None and not prompts:
        raise ValueError(f"patience {patience} needs held-out prompts to measure on, got none")
    return Watch(LENGTH, patience) if prompts else None


def prompts_in(rows: Rows, count: int, prompt_tokens: int = 64) -> list[list[int]]:
    """The tokens before the first answer of each of the first `count` texts in `rows`.

    A text that is learned from its beginning on gives its first `prompt_tokens`, at most half of it."""
    found: list[list[int]] = []
    for tokens, labels, documents in zip(rows.tokens, rows.labels, rows.documents, strict=True):
        for document in range(int(documents.max()) + 1):
            text = tokens[documents == document].tolist()
            learned = (labels[documents == document] != IGNORED).nonzero()[:, 0].tolist()
            if not learned:
                continue
            prompt = text[: learned[0]] if learned[0] > 1 else text[: min(prompt_tokens, len(text) // 2)]
            found += [prompt] if prompt else []
            if len(found) == count:
                return found
    return found
