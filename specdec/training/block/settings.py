"""The settings of a training run of a block drafter."""

import math
from dataclasses import dataclass

from specdec.training.learner import require_at_least_one
from specdec.training.network_settings import NetworkSettings

LOSSES = ("ce", "kl", "tv")


@dataclass(frozen=True, slots=True)
class BlockSettings(NetworkSettings):
    """Those of `NetworkSettings`, and:

    anchors: random blocks of a row and step, at most.
    gamma: slot k, from 0 on, has the weight exp(-k / gamma).
    loss: losses and the weight of each in their sum: "ce", the cross-entropy of the text's own tokens, for those that
        can be drafted; "kl", the divergence from the target's distribution over the draft vocabulary; "tv", half the
        sum of the absolute differences from it. DSpark: (("ce", 0.1), ("tv", 0.9)).
    num_tokens: drafted in each round of a validation (None: all that a block predicts).

    Raises ValueError for a number out of range, and for losses that are none or come twice."""

    lr: float = 6e-4
    anchors: int = 512
    gamma: float = 4.0
    loss: tuple[tuple[str, float], ...] = (("ce", 1.0),)
    num_tokens: int | None = None

    def __post_init__(self):
        NetworkSettings.__post_init__(self)  # a class with slots has no super() here
        require_at_least_one(self, ("anchors", "num_tokens"))
        if not self.gamma > 0 or math.isinf(self.gamma):
            raise ValueError(f"gamma must be a number above 0, got {self.gamma}")
        names = [name for name, _ in self.loss]
        if not names or len({*names}) != len(names) or any(name not in LOSSES for name in names):
            raise ValueError(f"loss must have some of {', '.join(LOSSES)}, each once, got {self.loss}")
        if any(not weight > 0 or math.isinf(weight) for _, weight in self.loss):
            raise ValueError(f"the weight of a loss must be a number above 0, got {self.loss}")

    def slot_weights(self, slots: int) -> list[float]:
        """The weight of each slot's mean loss; their sum is 1.

        >>> [round(weight, 3) for weight in BlockSettings(1, gamma=2.0).slot_weights(3)]
        [0.506, 0.307, 0.186]
        """
        weights = [math.exp(-slot / self.gamma) for slot in range(slots)]
        return [weight / sum(weights) for weight in weights]
