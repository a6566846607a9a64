"""Training Medusa heads: Medusa-1 on a frozen backbone, then Medusa-2's joint steps with LoRA (Cai et al. 2024, 2.2).

The loop, its checkpoints and its processes are those of `specdec.training.loop`."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from medusa.calibration import head_ranks, top_accuracies
from medusa.heads import MedusaHeads
from medusa.losses import head_loss, model_loss
from medusa.settings import TrainingSettings
from specdec.training.backbone import Backbone
from specdec.training.data import Rows
from specdec.training.labels import IGNORED, count_labels
from specdec.training.loop import autocast, train


def train_medusa(
    model,
    heads: MedusaHeads,
    rows: Rows,
    output: str | Path,
    settings: TrainingSettings,
    validation: Rows | None = None,
    accelerator=None,
    adapter=None,
    progress: bool = True,
) -> list[dict]:
    """Train `heads` in place on the hidden states of `model` over `rows`; returns the log, a list of records.

    `model` stays frozen, in whatever dtype or quantisation it is; `heads` are best in float32, with
    `Accelerator(mixed_precision="bf16")`. A record's "tokens_per_second" counts the steps since the record before, over
    all processes. For joint steps `adapter` is a `peft.PeftModel` around `model`. The state
    lives in `output`/checkpoint.pt, from which a killed run goes on; trackers of the accelerator get every record.
    Raises ValueError for rows without a label for every head or a checkpoint of other settings; FloatingPointError for
    a loss that is not finite, before the weights change, with the batch in `output`/bad_batch.pt."""
    from accelerate import Accelerator

    accelerator = accelerator or Accelerator()
    learner = _learner(model, heads, settings, validation, accelerator, adapter)
    return train(learner, rows, output, accelerator, progress)


@dataclass(frozen=True, slots=True)
class _Learner:
    """A `Learner`: heads, and an adapter of the model in joint steps."""

    name: ClassVar[str] = "heads"
    watch: ClassVar[None] = None

    backbone: Backbone
    module: MedusaHeads
    settings: TrainingSettings
    validation: Rows | None
    accelerator: Any  # accelerate.Accelerator; accelerate and peft are optional
    adapter: Any  # peft.PeftModel or None
    learned: dict[str, list[nn.Parameter]]

    def describe(self) -> dict:
        """See `Learner`."""
        return {"heads": asdict(self.module.config)}

    def joint(self, step: int) -> bool:
        """Whether the model learns too."""
        return self.settings.steps - step <= self.settings.joint_steps

    def rates(self, step: int) -> Sequence[float]:
        """See `Learner`."""
        return self.settings.heads_lr(step), self.settings.adapter_lr(step)

    def changed(self, step: int) -> list[nn.Parameter]:
        """See `Learner`."""
        return self.learned["heads"] + (self.learned["adapter"] if self.joint(step) else [])

    def prepare(self, batch: Rows, step: int) -> Rows:
        """The batch with a random `label_share` of its labels left."""
        settings = self.settings
        if settings.label_share == 1:
            return batch
        generator = torch.Generator().manual_seed(hash((settings.seed, step)) % 2**63)
        kept = torch.rand(batch.labels.shape, generator=generator) < settings.label_share
        return Rows(batch.tokens, torch.where(kept, batch.labels, IGNORED), batch.documents)

    def count(self, batch: Rows, step: int) -> list[int]:
        """See `Learner`: of the model's own loss, and of each head's."""
        counts = count_labels(batch.labels, self.module.config.num_heads, batch.documents)
        if not all(counts):
            raise ValueError(
                f"the rows of step {step} have no label for head {counts.index(0) - 1}: take more rows a step, or "
                "longer texts"
            )
        return counts

    def backward(self, part: Rows, counts: Sequence[int], step: int) -> Tensor:
        """See `Learner`."""
        weight, decay = self.settings.weight_of_heads(step), self.settings.decay
        weights = [1.0 / counts[0], *(weight * decay**head / count for head, count in enumerate(counts[1:]))]
        return _backward(self, part, weights, self.joint(step))

    def report(self, means: Sequence[float], step: int) -> dict[str, float]:
        """See `Learner`."""
        of_heads = sum(self.settings.decay**head * mean for head, mean in enumerate(means[1:]))
        joint = self.joint(step)
        total = means[0] + self.settings.weight_of_heads(step) * of_heads if joint else of_heads
        own = {"model_loss": means[0]} if joint else {}
        return {"loss": total} | own | {f"head_{head}_loss": mean for head, mean in enumerate(means[1:])}

    def validate(self) -> dict[str, float]:
        """How often each head's first 1, 5 and 10 choices hold the right token, by name of the record."""
        if self.validation is None:
            return {}
        with autocast(self.backbone.model, self.accelerator):
            accuracies = head_ranks(self.module, self.backbone.model, self.validation).accuracies()
        shares = enumerate(top_accuracies(accuracies))
        return {f"head_{head}_top_{top}": share for head, tops in shares for top, share in tops.items()}


def _learner(model, heads: MedusaHeads, settings: TrainingSettings, validation: Rows | None, accelerator,
             adapter) -> _Learner:  # fmt: skip
    """Check that the parts fit, and freeze the backbone."""
    if (settings.joint_steps > 0) != (adapter is not None):
        raise ValueError("joint_steps and an adapter go together: both for Medusa-2, neither for Medusa-1")
    backbone = Backbone(model)
    if adapter is not None and not backbone.plain_logits:
        raise ValueError(
            f"{type(model).__name__} scales or caps its logits after the output layer, so Medusa-2's loss of the model "
            "would be another's"
        )
    model.requires_grad_(False)
    for name, parameter in model.named_parameters() if adapter is not None else ():
        parameter.requires_grad_("lora_" in name)
    learned = {
        "heads": [p for p in heads.parameters() if p.requires_grad],
        "adapter": [p for p in model.parameters() if p.requires_grad],
    }
    return _Learner(backbone, heads, settings, validation, accelerator, adapter, learned)


def _backward(learner: _Learner, batch: Rows, weights: list[float], joint: bool) -> Tensor:
    """Add the gradients of some rows' weighted losses.

    Returns the losses, sums over labels: the model's own (0 while it is frozen), then each head's."""
    backbone, heads, adapter = learner.backbone, learner.module, learner.adapter
    low = autocast(backbone.model, learner.accelerator)
    tokens, teacher = batch.tokens.to(backbone.model.device, non_blocking=True), None
    losses = torch.zeros(len(weights), device=tokens.device)
    if joint and learner.settings.self_distilled:
        # before the forward with gradients, whose checkpointed layers run again in the mode they find in the backward
        backbone.model.eval()
        with low, adapter.disable_adapter(), torch.no_grad():
            teacher = backbone(tokens, batch.documents)
    with low, torch.set_grad_enabled(joint):
        backbone.model.train(joint)
        hidden = backbone(tokens, batch.documents)
    states = hidden.detach().requires_grad_(joint)  # sums the gradients of all losses, for one pass through the model
    for head in range(heads.config.num_heads):
        with low:
            loss = head_loss(heads, head, states, batch.labels, backbone.lm_head, batch.documents)
        (weights[head + 1] * loss).backward()
        losses[head + 1] = loss.detach()
    if joint:
        with low:
            loss = model_loss(backbone.lm_head, states, batch.labels, batch.documents, teacher)
        (weights[0] * loss).backward()
        losses[0] = loss.detach()
        if states.grad is not None:  # None where no row of these has a label
            hidden.backward(states.grad)
    backbone.model.eval()
    return losses
