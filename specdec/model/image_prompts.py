"""Prompts with images go into the cache by one forward of the model's own (`attention.hf.prompt`)."""

from collections.abc import Sequence

from attention.hf.prompt import Prompts
from attention.paged.batch import build_batch
from specdec.model.features import Features
from specdec.model.prefill import Give
from specdec.model.runner import ModelRunner


def run_image_prompts(runner: ModelRunner, sequences: Sequence[int], prompts: Prompts,
                      features: Features | None = None, give: Give | None = None) -> None:  # fmt: skip
    """Put each prompt but its last token, which is text, into the cache; `sequences`, of which there may be several of
    each prompt, are empty.

    Prompts run whole, operation by operation, whatever the runner's mode and
    PREFILL_CHUNK. `features` and `give` are those of `prefill.extend`. Raises `attention.OutOfPages` before any runs,
    and what `PromptForward` and the model raise for prompts and inputs that do not fit each other."""
    copies = len(sequences) // len(prompts.ids)
    counts = [int(count) for count in (prompts.mask != 0).sum(1).tolist() for _ in range(copies)]
    runner.cache.append(sequences, counts)
    layers = None if features is None or give is None else features.layers
    shifts, states = runner.adapter.prompts(prompts, build_batch(runner.cache, sequences, counts), copies, layers)
    for place, (sequence, count) in enumerate(zip(sequences, counts, strict=True)):
        runner.cache.shifts[sequence] = shifts[place // copies]
        runner.cache.truncate(sequence, count - 1)
    if give is not None and states is not None:
        give(range(len(sequences)), [of_text[:-1] for of_text in states.split(counts)])
