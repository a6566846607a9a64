"""The settings of a training run."""

import math
from dataclasses import dataclass

from specdec.training.learner import cosine, require_counts


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """`steps` of `batch` rows over all processes, `rows_at_once` of them in a forward of each process.

    Learning rates warm up over the share `warmup` of their steps, then follow a cosine down to zero. With `label_share`
    below 1 each step learns a random share of the labels, which saves work in the heads but not in the backbone. The
    last `joint_steps` are Medusa-2's: the backbone learns too, in the adapter's weights; on `self_distilled` text its
    loss is the divergence from the model as it was. `lr` None is 1e-3, and 2e-3 with joint steps. `heads_weight` None
    is 0.2, and with self-distillation a sine up to 0.01. Raises ValueError for a number out of range."""

    steps: int
    batch: int = 16
    rows_at_once: int = 4
    lr: float | None = None
    warmup: float = 0.1
    decay: float = 0.8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    label_share: float = 1.0
    joint_steps: int = 0
    backbone_lr: float = 5e-4
    heads_weight: float | None = None
    self_distilled: bool = False
    seed: int = 0
    save_every: int = 500
    log_every: int = 10
    validate_every: int = 500

    def __post_init__(self):
        require_counts(self)
        if not 0 <= self.joint_steps <= self.steps:
            raise ValueError(f"joint_steps must lie in 0 … {self.steps}, got {self.joint_steps}")
        if not 0 < self.label_share <= 1:
            raise ValueError(f"label_share must lie above 0 and up to 1, got {self.label_share}")

    def heads_lr(self, step: int) -> float:
        """The heads' learning rate at `step`."""
        return cosine(step, self.steps, self.warmup) * (self.lr or (2e-3 if self.joint_steps else 1e-3))

    def adapter_lr(self, step: int) -> float:
        """The backbone's learning rate at `step`: zero until the joint steps begin."""
        return cosine(step - self.steps + self.joint_steps, self.joint_steps, self.warmup) * self.backbone_lr

    def weight_of_heads(self, step: int) -> float:
        """The weight of the heads' loss beside the model's own: 1 while the backbone is frozen."""
        into = step - self.steps + self.joint_steps
        if into < 0:
            return 1.0
        if self.heads_weight is not None or not self.self_distilled:
            return 0.2 if self.heads_weight is None else self.heads_weight
        return 0.01 * math.sin(math.pi / 2 * (into + 1) / self.joint_steps)
