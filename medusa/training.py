"""The training loop: Medusa-1 on a frozen backbone, then Medusa-2's joint steps with LoRA (Cai et al. 2024, 2.2).

A step is a function of (settings, seed, step) alone: its rows, its dropout, its learning rates. So a resumed run equals
an uninterrupted one bit for bit, and several GPUs see the batch that one would. Gradients are sums over the batch
divided by counts of labels that every process knows beforehand, whatever the number of processes or rows at a time."""

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medusa.calibration import head_ranks, top_accuracies
from medusa.heads import MedusaHeads
from medusa.losses import head_loss, model_loss
from medusa.settings import TrainingSettings
from specdec.training.backbone import Backbone
from specdec.training.checkpoint import save_atomically
from specdec.training.data import Rows
from specdec.training.labels import IGNORED, count_labels


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
    from tqdm import tqdm

    accelerator, output = accelerator or Accelerator(), Path(output)
    main = accelerator.is_main_process
    trainer = _trainer(model, heads, rows, settings, accelerator, adapter)
    run = _run(settings, rows, heads)
    first, records = _resume(output / "checkpoint.pt", run, trainer)

    heads.train()
    hidden, tokens, seconds = not (progress and main), 0, 0.0
    bar = tqdm(range(first, settings.steps), initial=first, total=settings.steps, desc="heads", disable=hidden)
    for step in bar:
        last = step == settings.steps - 1
        batch = _thinned(rows.batch(step, settings.batch, settings.seed), settings, step)
        began = time.perf_counter()
        record = _step(trainer, batch, step, output)
        tokens, seconds = tokens + int((batch.documents >= 0).sum()), seconds + time.perf_counter() - began
        if validation is not None and main and (last or (step + 1) % settings.validate_every == 0):
            record |= _validate(trainer, validation)
        if last or "head_0_top_1" in record or step % settings.log_every == 0:
            record["tokens_per_second"], tokens, seconds = tokens / seconds, 0, 0.0
            records.append(record)
            bar.set_postfix(loss=f"{record['loss']:.3f}")
            accelerator.log({name: value for name, value in record.items() if name != "step"}, step=step)
        if main and (last or (step + 1) % settings.save_every == 0):
            state = {"run": run, **trainer.state(), "step": step + 1, "records": records}
            save_atomically(state, output / "checkpoint.pt")
    heads.eval()
    return records


@dataclass(frozen=True, slots=True)
class _Trainer:
    """One process's part of a run. `learned` are the parameters that change: of the heads, and of the adapter."""

    backbone: Backbone
    heads: MedusaHeads
    settings: TrainingSettings
    accelerator: Any  # accelerate.Accelerator; accelerate and peft are optional
    adapter: Any  # peft.PeftModel or None
    learned: dict[str, list[nn.Parameter]]
    optimizer: torch.optim.Optimizer

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters that change."""
        return [parameter for group in self.learned.values() for parameter in group]

    def state(self) -> dict:
        """Weights and optimizer, for the checkpoint."""
        weights = {name: [p.detach() for p in group] for name, group in self.learned.items()}
        return {**weights, "optimizer": self.optimizer.state_dict()}

    def autocast(self) -> torch.autocast:
        """bf16 arithmetic for mixed precision, and where the model is in 16 bits while the heads are not."""
        model = self.backbone.model
        low = model.dtype in (torch.bfloat16, torch.float16)
        return torch.autocast(
            model.device.type, torch.bfloat16, enabled=low or self.accelerator.mixed_precision == "bf16"
        )


def _trainer(model, heads: MedusaHeads, rows: Rows, settings: TrainingSettings, accelerator, adapter) -> _Trainer:
    """Check that the parts fit, freeze the backbone and make the optimizer.

    All processes begin with the first one's weights."""
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ValueError(f"mixed precision is no or bf16, got {accelerator.mixed_precision}")
    if (settings.joint_steps > 0) != (adapter is not None):
        raise ValueError("joint_steps and an adapter go together: both for Medusa-2, neither for Medusa-1")
    world = accelerator.num_processes
    if settings.batch < world:
        raise ValueError(f"batch must be at least the number of processes, {world}, got {settings.batch}")
    backbone = Backbone(model)
    if adapter is not None and not backbone.plain_logits:
        raise ValueError(
            f"{type(model).__name__} scales or caps its logits after the output layer, so Medusa-2's loss of the model "
            "would be another's"
        )
    if bool((rows.documents > 0).any()):
        backbone.require_packing()
    model.requires_grad_(False)
    for name, parameter in model.named_parameters() if adapter is not None else ():
        parameter.requires_grad_("lora_" in name)
    learned = {
        "heads": [p for p in heads.parameters() if p.requires_grad],
        "adapter": [p for p in model.parameters() if p.requires_grad],
    }
    optimizer = torch.optim.AdamW([{"params": group} for group in learned.values() if group], lr=0.0, betas=(0.9, 0.95),
                                  weight_decay=settings.weight_decay, fused=model.device.type == "cuda")  # fmt: skip
    trainer = _Trainer(backbone, heads, settings, accelerator, adapter, learned, optimizer)
    for parameter in trainer.parameters if world > 1 else ():
        torch.distributed.broadcast(parameter.data, 0)
    return trainer


def _step(trainer: _Trainer, batch: Rows, step: int, output: Path) -> dict:
    """One step of the optimizer on the whole batch; returns its record."""
    heads, settings, optimizer = trainer.heads, trainer.settings, trainer.optimizer
    joint = settings.steps - step <= settings.joint_steps
    counts = count_labels(batch.labels, heads.config.num_heads, batch.documents)
    if not all(counts):
        raise ValueError(
            f"the rows of step {step} have no label for head {counts.index(0) - 1}: take more rows a step, or longer "
            "texts"
        )
    losses = _gradients(trainer, batch, counts, step, joint)
    norm = nn.utils.clip_grad_norm_(trainer.parameters, settings.max_grad_norm)
    record = _record(step, losses.tolist(), counts, float(norm), settings, joint)
    if not all(math.isfinite(value) for value in record.values()):
        if trainer.accelerator.is_main_process:
            save_atomically({"step": step, **_tensors(batch)}, output / "bad_batch.pt")
        trainer.accelerator.wait_for_everyone()
        raise FloatingPointError(
            f"step {step}: {record}; its batch is in {output / 'bad_batch.pt'}, the weights before it in "
            f"{output / 'checkpoint.pt'}"
        )
    for group, lr in zip(optimizer.param_groups, (settings.heads_lr(step), settings.adapter_lr(step)), strict=False):
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return record


def _gradients(trainer: _Trainer, batch: Rows, counts: list[int], step: int, joint: bool) -> Tensor:
    """Accumulate the gradients of the batch's mean losses over all processes; returns the losses, sums over labels.

    A process whose rows have no label for a head adds zeros."""
    settings, learned, weight = trainer.settings, trainer.learned, trainer.settings.weight_of_heads(step)
    mine, world = trainer.accelerator.process_index, trainer.accelerator.num_processes
    weights = [1.0 / counts[0], *(weight * settings.decay**head / count for head, count in enumerate(counts[1:]))]
    own = list(range(mine, settings.batch, world))
    losses = torch.zeros(len(counts), device=trainer.backbone.model.device)
    for start in range(0, len(own), settings.rows_at_once):
        torch.manual_seed(hash((settings.seed, step, start, mine)) % 2**63)  # dropout repeats after a resume
        part = batch.take(own[start : start + settings.rows_at_once])
        losses += _backward(trainer, part, weights, joint)
    if world > 1:
        changed = learned["heads"] + (learned["adapter"] if joint else [])
        for parameter in changed:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for tensor in (losses, *(parameter.grad for parameter in changed)):
            torch.distributed.all_reduce(tensor)
    return losses


def _backward(trainer: _Trainer, batch: Rows, weights: list[float], joint: bool) -> Tensor:
    """Add the gradients of some rows' weighted losses.

    Returns the losses, sums over labels: the model's own (0 while it is frozen), then each head's."""
    backbone, heads, adapter = trainer.backbone, trainer.heads, trainer.adapter
    tokens, teacher = batch.tokens.to(backbone.model.device, non_blocking=True), None
    losses = torch.zeros(len(weights), device=tokens.device)
    if joint and trainer.settings.self_distilled:
        # before the forward with gradients, whose checkpointed layers run again in the mode they find in the backward
        backbone.model.eval()
        with trainer.autocast(), adapter.disable_adapter(), torch.no_grad():
            teacher = backbone(tokens, batch.documents)
    with trainer.autocast(), torch.set_grad_enabled(joint):
        backbone.model.train(joint)
        hidden = backbone(tokens, batch.documents)
    states = hidden.detach().requires_grad_(joint)  # sums the gradients of all losses, for one pass through the model
    for head in range(heads.config.num_heads):
        with trainer.autocast():
            loss = head_loss(heads, head, states, batch.labels, backbone.lm_head, batch.documents)
        (weights[head + 1] * loss).backward()
        losses[head + 1] = loss.detach()
    if joint:
        with trainer.autocast():
            loss = model_loss(backbone.lm_head, states, batch.labels, batch.documents, teacher)
        (weights[0] * loss).backward()
        losses[0] = loss.detach()
        if states.grad is not None:  # None where no row of these has a label
            hidden.backward(states.grad)
    backbone.model.eval()
    return losses


def _validate(trainer: _Trainer, validation: Rows) -> dict[str, float]:
    """How often each head's first 1, 5 and 10 choices hold the right token, by name of the record."""
    with trainer.autocast():
        accuracies = head_ranks(trainer.heads.eval(), trainer.backbone.model, validation).accuracies()
    trainer.heads.train()
    shares = enumerate(top_accuracies(accuracies))
    return {f"head_{head}_top_{top}": share for head, tops in shares for top, share in tops.items()}


def _thinned(batch: Rows, settings: TrainingSettings, step: int) -> Rows:
    """The batch with a random `label_share` of its labels left."""
    if settings.label_share == 1:
        return batch
    generator = torch.Generator().manual_seed(hash((settings.seed, step)) % 2**63)
    kept = torch.rand(batch.labels.shape, generator=generator) < settings.label_share
    return Rows(batch.tokens, torch.where(kept, batch.labels, IGNORED), batch.documents)


def _tensors(rows: Rows) -> dict[str, Tensor]:
    return {"tokens": rows.tokens, "labels": rows.labels, "documents": rows.documents}


def _record(
    step: int, losses: list[float], counts: list[int], norm: float, settings: TrainingSettings, joint: bool
) -> dict:
    means = [loss / count for loss, count in zip(losses, counts, strict=True)]
    of_heads = sum(settings.decay**head * mean for head, mean in enumerate(means[1:]))
    total = means[0] + settings.weight_of_heads(step) * of_heads if joint else of_heads
    record = {"step": step, "loss": total, "grad_norm": norm, "lr": settings.heads_lr(step)}
    own = {"model_loss": means[0]} if joint else {}
    return record | own | {f"head_{head}_loss": mean for head, mean in enumerate(means[1:])}


def _run(settings: TrainingSettings, rows: Rows, heads: MedusaHeads) -> dict:
    """What tells one run from another: a checkpoint is resumed by its own run only."""
    told = {name: value for name, value in asdict(settings).items() if not name.endswith("_every")}
    sums = {f"sum_of_{name}": int(tensor.sum(dtype=torch.int64)) for name, tensor in _tensors(rows).items()}
    return told | {"rows": list(rows.tokens.shape), **sums, "heads": asdict(heads.config)}


@torch.no_grad()
def _resume(path: Path, run: dict, trainer: _Trainer) -> tuple[int, list[dict]]:
    """The step to go on from and the records so far; (0, []) without a checkpoint."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        return 0, []
    state = torch.load(path, map_location="cpu", weights_only=True)
    there = state["run"]
    if there != run:
        other = {name: (there.get(name), value) for name, value in run.items() if there.get(name) != value}
        raise ValueError(
            f"{path} belongs to a run with other settings (there, here): {other}; choose another output folder or "
            "remove it"
        )
    for name, group in trainer.learned.items():
        for parameter, saved in zip(group, state[name], strict=True):
            parameter.copy_(saved)
    trainer.optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["records"]
