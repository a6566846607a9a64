"""Greedy texts against the target's own: where they first part, by how much, and whether rounding can explain that."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from specdec.auditing.readings import Judgement, Readings, judge, noise_of
from specdec.generation.generators import AutoregressiveGenerator, SpeculativeGenerator
from specdec.requests.request import Request, build_request

THEIRS, OURS = "transformers generate", "plain decoding here"
PLAUSIBLE = 64  # rounding steps at the largest logit that a target's two readings may differ by
CRITERION = (
    "near-tie: in both readings of the target (at once by transformers, step by step over pages) neither token is "
    "further behind the best than twice the readings' largest difference, which itself is at most "
    f"{PLAUSIBLE} rounding steps of the dtype at the largest logit; anything else is a bug"
)
ONLY_SAMPLED = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")


@dataclass(frozen=True, slots=True)
class Divergence:
    """A place where a text is not what the target says.

    reference: the text that it differs from; "its own prefix": the target's likeliest token after the text before.
    prompt, position: of the prompt, and of the new token, from 0.
    tokens: of the text and of the reference; None after an end.
    judged: the margins behind the verdict.
    limit: what the readings' difference may be at most.
    """

    reference: str
    prompt: int
    position: int
    tokens: tuple[int | None, int | None]
    judged: Judgement
    limit: float

    @property
    def verdict(self) -> str:
        """ "near-tie" or "bug", see `CRITERION`."""
        return "near-tie" if self.judged.near_tie and self.judged.noise <= self.limit else "bug"

    def as_dict(self) -> dict:
        """All of it, ready for JSON."""
        judged = self.judged
        return {
            "part": "greedy", "reference": self.reference, "prompt": self.prompt, "position": self.position,
            "tokens": list(self.tokens), "margins": list(judged.margins),
            "behind": [None if side is None else list(side) for side in judged.behind], "noise": judged.noise,
            "noise_limit": self.limit, "verdict": self.verdict,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class GreedyAudit:
    """Greedy texts of `prompts` prompts.

    identical: how many are the reference's own, for each reference.
    divergences: the first of each text from each reference, then all later places where a text that parted is not what
        the target says after the text itself.
    drafted, accepted: draft tokens proposed and accepted on the way.
    """

    prompts: int
    new_tokens: int
    identical: Mapping[str, int]
    divergences: tuple[Divergence, ...]
    drafted: int
    accepted: int

    @property
    def verdict(self) -> str:
        """ "passed", "failed" where one divergence is a bug, "inconclusive" where nothing was ever drafted."""
        if any(one.verdict == "bug" for one in self.divergences):
            return "failed"
        return "passed" if self.drafted else "inconclusive"


def audit_greedy(generator: SpeculativeGenerator, readings: Readings, prompts: Sequence[Tensor], max_new_tokens: int,
                 batch: int, options: Mapping[str, Any], done: Callable[[int], None]) -> GreedyAudit:  # fmt: skip
    """Compare the greedy texts of `prompts [n]`, in batches of `batch`; `done(n)` is told of n prompts that are done.

    options: of `generate`; those of samples alone are left out."""
    options = {name: value for name, value in options.items() if name not in ONLY_SAMPLED}
    target, plain = generator.target, AutoregressiveGenerator(generator.target)
    references: dict[str, Callable[[Tensor], list[int]]] = {}
    known = vars(GenerationConfig())
    if target.kv_dtype is None and all(name in known for name in options):  # else transformers cannot say what is right
        references[THEIRS] = lambda prompt: _theirs(target.model, prompt, max_new_tokens, options)
    references[OURS] = lambda prompt: _texts(plain, [prompt], max_new_tokens, options)[0][0]
    identical, found, counts = dict.fromkeys(references, 0), list[Divergence](), [0, 0, 0]
    for start in range(0, len(prompts), batch):
        some = prompts[start : start + batch]
        texts, stats = _texts(generator, some, max_new_tokens, options)
        pooled = stats.pooled
        for place, number in enumerate((stats.new_tokens, sum(pooled.proposed), sum(pooled.accepted))):
            counts[place] += number
        for number, (prompt, text) in enumerate(zip(some, texts, strict=True), start):
            judging = _Judging(readings, target, prompt, number, max_new_tokens, options)
            parted = []
            for name, own in references.items():
                first = first_difference(text, own(prompt))
                identical[name] += first is None
                if first is not None:
                    parted.append(judging(name, text, *first))
            found += parted
            if parted:
                found += judging.rest(text, min(one.position for one in parted) + 1)
            done(1)
    return GreedyAudit(len(prompts), counts[0], identical, tuple(found), counts[1], counts[2])


class _Judging:
    """Judges places of a text after one prompt, by the target's scores as the call's processors make them."""

    def __init__(self, readings: Readings, target, prompt: Tensor, number: int, count: int, options: Mapping[str, Any]):
        self._readings, self._prompt, self._number = readings, prompt, number
        mask = torch.ones_like(prompt[None])
        self._request: Request = build_request(
            target, prompt[None], mask, max_new_tokens=count, do_sample=False, seed=0, **options
        )

    def __call__(self, reference: str, text: Sequence[int], position: int,
                 tokens: tuple[int | None, int | None]) -> Divergence:  # fmt: skip
        """Judge the `tokens` at a position, of the text and of a reference."""
        prefix = self._after(text[:position])
        logits = self._readings.both(prefix[None])[:, 0, 0]
        return self._divergence(reference, position, tokens, logits, prefix)

    def rest(self, text: Sequence[int], start: int) -> Iterator[Divergence]:
        """The places from `start` on where `text` is not what the target says after the text itself."""
        if start >= len(text):
            return
        logits = self._readings.both(self._after(text[:-1])[None], len(text))[:, 0]
        for position in range(start, len(text)):
            prefix = self._after(text[:position])
            scores = self._scores(logits[:1, position], prefix)
            if int(scores.argmax()) != text[position]:
                tokens = text[position], int(scores.argmax())
                yield self._divergence("its own prefix", position, tokens, logits[:, position], prefix)

    def _after(self, text: Sequence[int]) -> Tensor:
        return torch.cat([self._prompt, self._prompt.new_tensor(list(text))])

    def _scores(self, logits: Tensor, prefix: Tensor) -> Tensor:
        return self._request.processors(logits, [0] * len(logits), lambda m: prefix[None])

    def _divergence(self, reference: str, position: int, tokens: tuple[int | None, int | None], logits: Tensor,
                    prefix: Tensor) -> Divergence:  # fmt: skip
        step = self._readings.precision * float(logits[logits.isfinite()].abs().max())
        noise = max(noise_of(logits), step)  # readings may agree by luck
        judged = judge(self._scores(logits, prefix), tokens, noise)
        return Divergence(reference, self._number, position, tokens, judged, PLAUSIBLE * step)


def first_difference(text: Sequence[int], own: Sequence[int]) -> tuple[int, tuple[int | None, int | None]] | None:
    """Where two texts first part, and the tokens of both there, None after an end; None for equal texts."""
    places = enumerate(zip_longest(text, own))
    return next(((place, pair) for place, pair in places if pair[0] != pair[1]), None)


def _texts(generator, prompts: Sequence[Tensor], count: int, options: Mapping[str, Any]):
    """The greedy texts of one batch of prompts, padded on the left, and the statistics of the call."""
    width = max(map(len, prompts))
    ids = torch.stack([torch.nn.functional.pad(prompt, (width - len(prompt), 0)) for prompt in prompts])
    mask = torch.stack([torch.arange(width) >= width - len(prompt) for prompt in prompts]).long().to(ids.device)
    out = generator.generate(ids, mask, max_new_tokens=count, do_sample=False, **options)
    ends = zip(out.sequences[:, width:].tolist(), out.lengths.tolist(), strict=True)
    return [row[:length] for row, length in ends], out.stats


def _theirs(model, prompt: Tensor, count: int, options: Mapping[str, Any]) -> list[int]:
    """The text by transformers' own `generate`, of the prompt alone."""
    ids = prompt[None]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, **options)
    return out[0, len(prompt) :].tolist()
