"""The settings of a training run of an EAGLE-3, P-EAGLE or MTP drafter."""

from dataclasses import dataclass
from typing import Literal

from specdec.training.learner import cosine, require_at_least_one, require_counts

LOSSES = ("kl", "ce", "tv")


@dataclass(frozen=True, slots=True)
class UnrolledSettings:
    """`steps` of `batch` rows over all processes, `rows_at_once` of them in a forward of each process.

    The learning rate warms up over the share `warmup` of the steps, then follows a cosine down to zero.

    depth: tokens that are drafted after each token of a text (steps of the training-time test).
    decay: the loss of the k-th of them, from 0 on, has the weight decay^k.
    loss: "kl", the divergence from the target's distribution over the draft vocabulary; "tv", half the sum of the
        absolute differences from it; "ce", the cross-entropy of the text's own tokens, for those that can be drafted.
    keep, keep_least: of the tokens that learn, the share max(keep^k, keep_least) has a k-th further one (P-EAGLE's
        conditional dropping: 0.7 and 0.2); which they are is drawn for each step, and whose k-th one is left out has
        none after it. Only P-EAGLE's network is then run less.
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
    keep: float = 1.0
    keep_least: float = 0.2
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
        for name in ("decay", "keep", "keep_least"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie above 0 and up to 1, got {getattr(self, name)}")

    def lr_at(self, step: int) -> float:
        """The learning rate at `step`."""
        return cosine(step, self.steps, self.warmup) * self.lr

    def kept(self, step: int) -> float:
        """The share of tokens that have the further token `step`, from 0 on.

        >>> [round(UnrolledSettings(1, keep=0.7).kept(step), 3) for step in range(6)]
        [1.0, 0.7, 0.49, 0.343, 0.24, 0.2]
        """
        return max(self.keep**step, min(1.0, self.keep_least))
