"""The settings that training runs of all networks share."""

from dataclasses import dataclass

from specdec.training.learner import cosine, require_at_least_one, require_counts


@dataclass(frozen=True, slots=True)
class NetworkSettings:
    """`steps` of `batch` rows over all processes, `rows_at_once` of them in a forward of each process.

    The learning rate warms up over the share `warmup` of the steps, then follows a cosine down to zero.

    patience: validations without a new best, after which the run stops (None: it does not).
    max_new_tokens: decoded for each prompt of a validation.
    save_every: steps between checkpoints (None: there are none, for runs of seconds).

    Raises ValueError for a number out of range."""

    steps: int
    batch: int = 16
    rows_at_once: int = 4
    lr: float = 1e-3
    warmup: float = 0.04
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    patience: int | None = None
    max_new_tokens: int = 128
    seed: int = 0
    save_every: int | None = 500
    log_every: int = 10
    validate_every: int = 500

    def __post_init__(self):
        require_counts(self)
        require_at_least_one(self, ("max_new_tokens", "patience"))

    def lr_at(self, step: int) -> float:
        """The learning rate at `step`."""
        return cosine(step, self.steps, self.warmup) * self.lr
