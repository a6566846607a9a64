"""Which reading of a drafter's file is right: the one whose guesses are the target's own tokens most often.

Formats leave open which states of the target a drafter reads, or where a norm belongs, and a wrong reading drafts badly
without an error. Measured teacher-forced: at every token of a text the drafter guesses the next ones, by the steps and
over the cache that rounds use; right is what the target finds most likely there."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from specdec.drafters.base import Drafter
from specdec.drafters.eagle3.drafter import Eagle3Drafter, Eagle3Steps
from specdec.drafters.mtp.drafter import MtpDrafter
from specdec.drafters.mtp.steps import MtpModules, MtpSteps
from specdec.model.feature_runner import FeatureModel, FeatureRunner
from specdec.model.features import Features
from specdec.model.runner import ModelRunner

Text = str | Sequence[int] | Tensor


@dataclass(frozen=True, slots=True)
class CheckedReading:
    """One reading: `fields` that differ from the drafter's.

    rates: at depth 1, 2, … the share of right guesses.
    accepted: right guesses in a row, from depth 1 on, on average.
    """

    fields: Mapping[str, Any]
    rates: tuple[float, ...]
    accepted: float

    def __str__(self) -> str:
        named = ", ".join(f"{name}={value}" for name, value in self.fields.items()) or "as it is"
        return f"{'  '.join(f'{rate:6.1%}' for rate in self.rates)}  {self.accepted:8.2f}  {named}"


@dataclass(frozen=True, slots=True)
class DrafterCheck:
    """What `check_drafter` found: all `readings`, the drafter's own first, each measured at `places` tokens.

    best: the right one; the drafter's own unless another is better by more than two standard errors of the difference.
    """

    readings: tuple[CheckedReading, ...]
    places: int
    best: CheckedReading

    @property
    def right(self) -> bool:
        """Whether the drafter is read rightly."""
        return not self.best.fields

    def __str__(self) -> str:
        depths = "  ".join(f"{f'at {depth}':>6}" for depth in range(1, len(self.best.rates) + 1))
        verdict = "it is read rightly" if self.right else f"read it with {dict(self.best.fields)}"
        if self.best.accepted < 0.1:
            verdict += ", but hardly any guess is right: is it another target's?"
        return "\n".join([f"{depths}  accepted  reading ({self.places} tokens)", *map(str, self.readings), verdict])


def check_drafter(drafter: Drafter, target: Any, texts: Iterable[Text], tokenizer: Any = None, depth: int = 3,
                  max_tokens: int = 256) -> DrafterCheck:  # fmt: skip
    """Measure every reading of an EAGLE-3, P-EAGLE or MTP drafter on `texts`, best the target's own answers.

    target: a transformers model or a `ModelRunner` that holds no sequences.
    texts: token ids, or strings if there is a `tokenizer`; of each the first `max_tokens` tokens count.
    depth: guesses at each token.

    Load the drafter again with `read=check.best.fields` (EAGLE-3) or `**check.best.fields` (MTP). Raises ValueError for
    other kinds of drafters, and for texts that are too short."""
    if not isinstance(drafter, Eagle3Drafter | MtpDrafter):
        raise ValueError(f"the files of a {type(drafter).__name__} leave nothing open: there is nothing to check")
    if isinstance(modules := drafter.runner.source, MtpModules):
        count = len(modules.depths)
        raise ValueError(f"readings are measured of one MTP module, got {count}: check the first one alone (number=0)")
    if type(depth) is not int or depth < 1:
        raise ValueError(f"depth must be an integer of at least 1, got {depth!r}")
    runner = target if isinstance(target, ModelRunner) else ModelRunner(target, mode="eager")
    drafter.validate(runner)
    rows = [_ids(text, tokenizer)[:max_tokens].to(runner.device) for text in texts]
    rows = [row for row in rows if len(row) > depth]
    if not rows:
        raise ValueError(f"texts must have at least {depth + 1} tokens, got none of them")
    teacher, source = _Teacher(runner, rows, depth), drafter.runner.source
    known, count = dict[str, tuple[CheckedReading, Tensor]](), runner.model.config.get_text_config().num_hidden_layers

    def measured(fields: Mapping[str, Any]) -> tuple[CheckedReading, Tensor]:
        if (key := repr(sorted(fields.items()))) not in known:
            right = teacher.right_guesses(_read_as(source, fields))
            runs = right.cumprod(1).sum(1)
            known[key] = CheckedReading(dict(fields), tuple(right.mean(0).tolist()), float(runs.mean())), runs
        return known[key]

    best, runs = measured({})
    while True:
        near = [measured(fields) for fields in _one_change(source, best.fields, count)]
        better, their_runs = max(near, key=lambda found: found[0].accepted, default=(best, runs))
        gain = their_runs - runs
        if float(gain.mean()) <= 2 * float(gain.std(correction=0)) * len(gain) ** -0.5:
            return DrafterCheck(tuple(reading for reading, _ in known.values()), teacher.places, best)
        best, runs = better, their_runs


def _ids(text: Text, tokenizer: Any) -> Tensor:
    if not isinstance(text, str):
        return torch.as_tensor(text, dtype=torch.int64).flatten()
    if tokenizer is None:
        raise ValueError(f"a text that is a string needs a tokenizer, got none for {text[:40]!r}")
    return torch.tensor(tokenizer(text).input_ids)


def _read_as(source: FeatureModel, fields: Mapping[str, Any]) -> FeatureModel:
    if not fields:
        return source
    if isinstance(source, Eagle3Steps):
        return Eagle3Steps(source.network.read_as(**fields))
    assert isinstance(source, MtpSteps)
    return replace(source, **fields)


def _one_change(source: FeatureModel, fields: Mapping[str, Any], num_layers: int) -> list[dict[str, Any]]:
    """The readings that differ from `fields` in one of what formats leave open."""
    if isinstance(source, MtpSteps):
        now = dict(normed=source.normed, zero_first=source.zero_first) | dict(fields)
        return [_without_own(source, {**fields, name: not value}) for name, value in now.items()]
    assert isinstance(source, Eagle3Steps)
    config = source.network.read_as(**fields).config if fields else source.network.config
    changes: list[dict[str, Any]] = [dict(norm_before_residual=not config.norm_before_residual)]
    if not config.parallel:
        changes.append(dict(norm_output=not config.norm_output))
    if source.network.spare:
        other = {"input_layernorm": "hidden_norm", "hidden_norm": "input_layernorm"}
        changes.append(dict(deeper_norm=other[config.deeper_norm]))
    for step in (1, -1):
        layers = tuple(layer + step for layer in config.target_layers)
        if min(layers) >= 0 and max(layers) <= num_layers:
            changes.append(dict(target_layers=layers))
    return [_without_own(source, {**fields, **change}) for change in changes]


def _without_own(source: FeatureModel, fields: dict[str, Any]) -> dict[str, Any]:
    """`fields` without those that are the drafter's own."""
    own: Callable[[str], Any] = lambda name: getattr(source, name)
    if isinstance(source, Eagle3Steps):
        own = lambda name: getattr(source.network.config, name)
    return {name: value for name, value in fields.items() if own(name) != value}


class _Teacher:
    """What the target makes of texts, against which readings are measured."""

    def __init__(self, target: ModelRunner, rows: Sequence[Tensor], depth: int):
        self._target, self._rows, self._depth = target, rows, depth
        self._features: dict[Features, list[Tensor]] = {}
        self._likely: list[Tensor] = []
        self.places = sum(len(row) - depth for row in rows)

    def features(self, wanted: Features) -> list[Tensor]:
        """The target's features at all tokens of each text `[L, F]`; its most likely tokens are found on the way."""
        if wanted not in self._features:
            target, found, likely = self._target, [], []
            with target.lock, torch.inference_mode():
                for row in self._rows:
                    target.reserve([len(row)])
                    sequence = target.cache.add()
                    try:
                        out = target.forward([sequence], row, [len(row)], features=wanted, capture=False)
                    finally:
                        target.cache.free(sequence)
                    assert out.features is not None
                    found.append(out.features)
                    likely.append(out.logits.argmax(-1))
            self._features[wanted], self._likely = found, likely
        return self._features[wanted]

    def right_guesses(self, source: FeatureModel) -> Tensor:
        """1.0 for each right guess at each depth, by the steps that rounds run, `[places, depth]` float64."""
        features, runner = self.features(source.traits.features), FeatureRunner(source)
        right: list[Tensor] = []
        with torch.inference_mode():
            runner.reserve([len(row) + self._depth for row in self._rows])
            sequences = [runner.cache.add() for _ in self._rows]
            for place in range(max(map(len, self._rows)) - self._depth):
                here = [i for i, row in enumerate(self._rows) if place + self._depth < len(row)]
                guesses = self._guess(runner, [sequences[i] for i in here], here, place, features)
                wanted = [self._likely[i][place + 1 : place + 1 + self._depth] for i in here]
                right.append(guesses == torch.stack(wanted))
                for i in here:
                    runner.cache.truncate(sequences[i], place + 1)
        return torch.cat(right).double().cpu()

    def _guess(self, runner: FeatureRunner, sequences: list[int], here: list[int], place: int,
               features: list[Tensor]) -> Tensor:  # fmt: skip
        """The guesses of the tokens at `place + 2`, … of some rows, `[A, depth]`."""
        states = torch.stack([features[i][place] for i in here])
        text = torch.stack([self._rows[i][place + 1 : place + 1 + self._depth] for i in here])
        ones = [1] * len(here)
        if isinstance(runner.source, Eagle3Steps) and runner.source.network.config.parallel:
            tokens, masks = runner.source.network.mask_steps(self._depth - 1)
            tokens = torch.cat([text[:, :1], tokens.expand(len(here), -1)], 1)
            states = torch.cat([states[:, None], masks.to(states.dtype).expand(len(here), -1, -1)], 1)
            counts = [self._depth] * len(here)
            output, _ = runner.forward(sequences, tokens.flatten(), states.flatten(0, 1), True, counts)
            return runner.logits(output).argmax(-1).unflatten(0, (len(here), -1))
        guesses = []
        for level in range(self._depth):
            output, states = runner.forward(sequences, text[:, level], states, level == 0, ones)
            guesses.append(runner.logits(output).argmax(-1))
        return torch.stack(guesses, 1)
