"""The settings of a training run of a block drafter."""

import math
from dataclasses import dataclass

from specdec.training.learner import cosine, require_at_least_one, require_counts

LOSSES = ("ce", "kl", "tv")


@dataclass(frozen=True, slots=True)
class BlockSettings:
    """`steps` of `batch` rows over all processes, `rows_at_once` of them in a forward of each process.

    The learning rate warms up over the share `warmup` of the steps, then follows a cosine down to zero.

    anchors: random blocks of a row and step, at most.
    gamma: slot k, from 0 on, has the weight exp(-k / gamma).
    loss: losses and the weight of each in their sum: "ce", the cross-entropy of the text's own tokens, for those that
        can be drafted; "kl", the divergence from the target's distribution over the draft vocabulary; "tv", half the
        sum of the absolute differences from it. DSpark: (("ce", 0.1), ("tv", 0.9)).
    patience: validations without a new best, after which the run stops (None: it does not).
    num_tokens: drafted in each round of a validation (None: all that a block predicts).
    max_new_tokens: decoded for each prompt of a validation.
    save_every: steps between checkpoints (None: there are none, for runs of seconds).

    Raises ValueError for a number out of range, and for losses that are none or come twice."""

    steps: int
    batch: int = 16
    rows_at_once: int = 4
    lr: float = 6e-4
    warmup: float = 0.04
    anchors: int = 512
    gamma: float = 4.0
    loss: tuple[tuple[str, float], ...] = (("ce", 1.0),)
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    patience: int | None = None
    num_tokens: int | None = None
    max_new_tokens: int = 128
    seed: int = 0
    save_every: int | None = 500
    log_every: int = 10
    validate_every: int = 500

    def __post_init__(self):
        require_counts(self)
        require_at_least_one(self, ("anchors", "num_tokens", "max_new_tokens", "patience"))
        if not self.gamma > 0 or math.isinf(self.gamma):
            raise ValueError(f"gamma must be a number above 0, got {self.gamma}")
        names = [name for name, _ in self.loss]
        if not names or len({*names}) != len(names) or any(name not in LOSSES for name in names):
            raise ValueError(f"loss must have some of {', '.join(LOSSES)}, each once, got {self.loss}")
        if any(not weight > 0 or math.isinf(weight) for _, weight in self.loss):
            raise ValueError(f"the weight of a loss must be a number above 0, got {self.loss}")

    def lr_at(self, step: int) -> float:
        """The learning rate at `step`."""
        return cosine(step, self.steps, self.warmup) * self.lr

    def slot_weights(self, slots: int) -> list[float]:
        """The weight of each slot's mean loss; their sum is 1.

        >>> [round(weight, 3) for weight in BlockSettings(1, gamma=2.0).slot_weights(3)]
        [0.506, 0.307, 0.186]
        """
        weights = [math.exp(-slot / self.gamma) for slot in range(slots)]
        return [weight / sum(weights) for weight in weights]
