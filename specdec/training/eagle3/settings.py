"""The settings of a training run of an EAGLE-3 drafter."""

from dataclasses import dataclass
from typing import Literal

from specdec.training.learner import cosine, require_at_least_one, require_counts

LOSSES = ("kl", "ce", "tv")


@dataclass(frozen=True, slots=True)
class Eagle3Settings:
    """`steps` of `batch` rows over all processes, `rows_at_once` of them in a forward of each process.

    The learning rate warms up over the share `warmup` of the steps, then follows a cosine down to zero.

    depth: tokens that are drafted after each token of a text (steps of the training-time test).
    decay: the loss of the k-th of them, from 0 on, has the weight decay^k.
    loss: "kl", the divergence from the target's distribution over the draft vocabulary; "tv", half the sum of the
        absolute differences from it; "ce", the cross-entropy of the text's own tokens, for those that can be drafted.
    patience: validations without a new best, after which the run stops (None: it does not).
    num_tokens: drafted in each round of a validation.
    max_new_tokens: decoded for each prompt of a validation.
    save_every: steps between checkpoints (None: there are none, for runs of seconds).

    Raises ValueError for a number out of range."""

    steps: int
    batch: int = 16
    rows_at_once: int = 4
    lr: float = 1e-3
    warmup: float = 0.04
    depth: int = 3
    decay: float = 0.8
    loss: Literal["kl", "ce", "tv"] = "kl"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    patience: int | None = None
    num_tokens: int = 5
    max_new_tokens: int = 128
    seed: int = 0
    save_every: int | None = 500
    log_every: int = 10
    validate_every: int = 500

    def __post_init__(self):
        require_counts(self)
        require_at_least_one(self, ("depth", "num_tokens", "max_new_tokens", "patience"))
        if self.loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {self.loss!r}")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay must lie above 0 and up to 1, got {self.decay}")

    def lr_at(self, step: int) -> float:
        """The learning rate at `step`."""
        return cosine(step, self.steps, self.warmup) * self.lr
