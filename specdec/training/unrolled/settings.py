"""The settings of a training run of an EAGLE-3, P-EAGLE or MTP drafter."""

from dataclasses import dataclass
from typing import Literal

from specdec.training.learner import require_at_least_one
from specdec.training.network_settings import NetworkSettings

LOSSES = ("kl", "ce", "tv")


@dataclass(frozen=True, slots=True)
class UnrolledSettings(NetworkSettings):
    """Those of `NetworkSettings`, and:

    depth: tokens that are drafted after each token of a text (steps of the training-time test).
    decay: the loss of the k-th of them, from 0 on, has the weight decay^k.
    loss: "kl", the divergence from the target's distribution over the draft vocabulary; "tv", half the sum of the
        absolute differences from it; "ce", the cross-entropy of the text's own tokens, for those that can be drafted.
    keep, keep_least: of the tokens that learn, the share max(keep^k, keep_least) has a k-th further one (P-EAGLE's
        conditional dropping: 0.7 and 0.2); which they are is drawn for each step, and whose k-th one is left out has
        none after it. Only P-EAGLE's network is then run less.
    num_tokens: drafted in each round of a validation.

    Raises ValueError for a number out of range."""

    depth: int = 3
    decay: float = 0.8
    loss: Literal["kl", "ce", "tv"] = "kl"
    keep: float = 1.0
    keep_least: float = 0.2
    num_tokens: int = 5

    def __post_init__(self):
        NetworkSettings.__post_init__(self)  # a class with slots has no super() here
        require_at_least_one(self, ("depth", "num_tokens"))
        if self.loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {self.loss!r}")
        for name in ("decay", "keep", "keep_least"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie above 0 and up to 1, got {getattr(self, name)}")

    def kept(self, step: int) -> float:
        """The share of tokens that have the further token `step`, from 0 on.

        >>> [round(UnrolledSettings(1, keep=0.7).kept(step), 3) for step in range(6)]
        [1.0, 0.7, 0.49, 0.343, 0.24, 0.2]
        """
        return max(self.keep**step, min(1.0, self.keep_least))
