"""The least time that a device needs for the steps that an engine without drafts ran, from its own limits.

A step reads every weight once and multiplies them with its tokens, whichever takes longer, and then reads the keys and
values of the texts that it goes on with: max(weight bytes / bandwidth, operations / peak) + KV bytes / bandwidth.
Operations are two for each weight and token; the output layer counts for the tokens alone whose logits are needed.
Attention's own products, norms and launches count nothing, so no real run gets there.

Which steps ran prompts is not told by an engine. Each prompt is taken to have run as late as it could: in the last
steps before its first token that still had room, as the engine fills its steps up too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from scripts.generate_bench.models import kv_bytes, weight_bytes
from scripts.serving_bench.measures import Pass


@dataclass(frozen=True, slots=True)
class Card:
    """What a model moves and multiplies, and what the device reaches.

    body_weights, head_weights: numbers in all layers, and in the output layer.
    weight_bytes: of both.
    kv_bytes: keys and values of one token.
    bandwidth: bytes a second.
    peak: operations a second.
    """

    body_weights: int
    head_weights: int
    weight_bytes: int
    kv_bytes: int
    bandwidth: float
    peak: float

    def step_seconds(self, rows: int, prompt_tokens: int, kv_tokens: int) -> float:
        """A step that decodes `rows` texts, runs so many tokens of prompts, and reads the keys of `kv_tokens`.

        >>> Card(10, 5, 30, 2, bandwidth=10.0, peak=20.0).step_seconds(rows=1, prompt_tokens=3, kv_tokens=10)
        6.5
        """
        operations = 2 * (self.body_weights * (rows + prompt_tokens) + self.head_weights * rows)
        return max(self.weight_bytes / self.bandwidth, operations / self.peak) + (
            self.kv_bytes * kv_tokens / self.bandwidth
        )


def rounds_of(step: Sequence[tuple[int, int]]) -> list[list[int]]:
    """The requests in each round of what one call brought: without drafts a round gives each of them one token.

    >>> rounds_of([(0, 2), (1, 1)]), rounds_of([])
    ([[0, 1], [0]], [[]])
    """
    most = max((count for _, count in step), default=1)
    return [[number for number, count in step if count > done] for done in range(most)]


def work_of(run: Pass, most: int) -> list[tuple[int, int, int]]:
    """For each round of a run of an engine without drafts: rows, tokens of prompts, and tokens whose keys are read.

    most: tokens of a step, rows and prompts together."""
    steps = [part for step in run.steps for part in rounds_of(step)]
    rows = list(map(len, steps))
    kept = [0] * len(rows)
    lengths = {record.number: record.prompt_tokens for record in run.records}
    first: dict[int, int] = {}
    for index, step in enumerate(steps):
        for number in step:
            first.setdefault(number, index)
            kept[index] += lengths[number]
            lengths[number] += 1
    prompts = [0] * len(rows)
    sizes = {record.number: record.prompt_tokens for record in run.records}
    for number, end in sorted(first.items(), key=lambda item: -item[1]):
        left = sizes[number] - 1  # the last token runs in the round that gives the first new one
        for index in range(end - 1, -1, -1):
            part = min(left, max(0, most - rows[index] - prompts[index]))
            if part:
                prompts[index] += part
                kept[index] += left  # a chunk reads the keys of all of its text so far, once
                left -= part
            if not left:
                break
    return list(zip(rows, prompts, kept, strict=True))


def least_seconds(card: Card, work: Sequence[tuple[int, int, int]]) -> float:
    """The sum over all steps."""
    return sum(card.step_seconds(*step) for step in work)


def card_of_model(model, limits: dict[str, float]) -> Card:
    """The card of a transformers model on a device that reaches `limits`, see `scripts.common.gpu_timing.ceilings`."""
    head = model.get_output_embeddings().weight
    total, size = weight_bytes(model), head.element_size()
    bandwidth = max(limits["read_bytes"], limits["copy_bytes"])
    return Card(total // size - head.numel(), head.numel(), total, kv_bytes(model), bandwidth, limits["matmul_flops"])
