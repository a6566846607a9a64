"""The training loop: Medusa-1 on a frozen backbone, and Medusa-2's joint steps with LoRA behind it (Cai et al. 2024,
section 2.2).

A step is a function of (settings, seed, step) alone: its rows, its dropout, its learning rates. So a resumed run equals
an uninterrupted one bit for bit, and several GPUs see the batch that one would. Gradients are sums over the batch
divided by counts of labels that every process knows beforehand, whatever the number of processes or rows at a time."""

import math
from dataclasses import asdict
from pathlib import Path

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
    """Train `heads` in place on what `model` makes of `rows`; returns the log, a list of records.

    `model` stays frozen, in whatever dtype or quantisation it is; `heads` are best in float32, with
    `Accelerator(mixed_precision="bf16")`. For joint steps `adapter` is a `peft.PeftModel` around `model`. The state
    lives in `output`/checkpoint.pt, from which a killed run goes on; trackers of the accelerator get every record.
    Raises ValueError for rows without a label for every head or a checkpoint of other settings; FloatingPointError when
    a loss is not finite, before the weights are touched, with the batch in `output`/bad_batch.pt."""
    from accelerate import Accelerator
    from tqdm import tqdm

    accelerator, output = accelerator or Accelerator(), Path(output)
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ValueError(f"mixed precision is no or bf16, got {accelerator.mixed_precision}")
    if (settings.joint_steps > 0) != (adapter is not None):
        raise ValueError("joint_steps and an adapter go together: both for Medusa-2, neither for Medusa-1")
    world, mine = accelerator.num_processes, accelerator.process_index
    if settings.batch < world:
        raise ValueError(f"batch must be at least the number of processes, {world}, got {settings.batch}")
    backbone = Backbone(model)
    if adapter is not None and not backbone.plain_logits:
        raise ValueError(
            f"{type(model).__name__} scales or caps its logits behind the output layer, so Medusa-2's loss of "
            "the model would be another's"
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
    parameters = learned["heads"] + learned["adapter"]
    optimizer = torch.optim.AdamW([{"params": group} for group in learned.values() if group], lr=0.0, betas=(0.9, 0.95),
                                  weight_decay=settings.weight_decay, fused=model.device.type == "cuda")  # fmt: skip
    _agree([p.data for p in parameters], world)
    run = _run(settings, rows, heads)
    first, records = _resume(output / "checkpoint.pt", run, optimizer, learned)

    heads.train()
    bar = tqdm(
        range(first, settings.steps),
        initial=first,
        total=settings.steps,
        desc="heads",
        disable=not (progress and accelerator.is_main_process),
    )
    for step in bar:
        joint, batch = (
            settings.steps - step <= settings.joint_steps,
            _thinned(rows.batch(step, settings.batch, settings.seed), settings, step),
        )
        counts = count_labels(batch.labels, heads.config.num_heads, batch.documents)
        if not all(counts):
            raise ValueError(
                f"the rows of step {step} have no label for head {counts.index(0) - 1}: take more rows a "
                "step, or longer texts"
            )
        weights = [
            1.0 / counts[0],
            *(settings.weight_of_heads(step) * settings.decay**head / count for head, count in enumerate(counts[1:])),
        ]
        own = list(range(mine, settings.batch, world))
        losses = torch.zeros(len(counts), device=model.device)
        for start in range(0, len(own), settings.rows_at_once):
            torch.manual_seed(hash((settings.seed, step, start, mine)) % 2**63)  # dropout repeats after a resume
            part = batch.take(own[start : start + settings.rows_at_once])
            losses += _backward(backbone, heads, part, weights, accelerator, adapter if joint else None, settings)
        _sum_over_processes(losses, learned["heads"] + (learned["adapter"] if joint else []), world)
        norm = nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        record = _record(step, losses.tolist(), counts, float(norm), settings, joint)
        if not all(math.isfinite(value) for value in record.values()):
            if accelerator.is_main_process:
                bad = {"step": step, "tokens": batch.tokens, "labels": batch.labels, "documents": batch.documents}
                save_atomically(bad, output / "bad_batch.pt")
            accelerator.wait_for_everyone()
            raise FloatingPointError(
                f"step {step}: {record}; its batch is in {output / 'bad_batch.pt'}, the weights before it in "
                f"{output / 'checkpoint.pt'}"
            )
        for group, lr in zip(
            optimizer.param_groups, (settings.heads_lr(step), settings.adapter_lr(step)), strict=False
        ):
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        last = step == settings.steps - 1
        if (
            validation is not None
            and accelerator.is_main_process
            and (last or (step + 1) % settings.validate_every == 0)
        ):
            with _autocast(model, accelerator):
                accuracies = head_ranks(heads.eval(), model, validation).accuracies()
            heads.train()
            record |= {
                f"head_{head}_top_{top}": share
                for head, shares in enumerate(top_accuracies(accuracies))
                for top, share in shares.items()
            }
        if last or "head_0_top_1" in record or step % settings.log_every == 0:
            records.append(record)
            bar.set_postfix(loss=f"{record['loss']:.3f}")
            accelerator.log({name: value for name, value in record.items() if name != "step"}, step=step)
        if accelerator.is_main_process and (last or (step + 1) % settings.save_every == 0):
            values = {name: [p.detach() for p in group] for name, group in learned.items()}
            save_atomically(
                {"run": run, **values, "optimizer": optimizer.state_dict(), "step": step + 1, "records": records},
                output / "checkpoint.pt",
            )
    heads.eval()
    return records


def _backward(
    backbone: Backbone,
    heads: MedusaHeads,
    batch: Rows,
    weights: list[float],
    accelerator,
    adapter,
    settings: TrainingSettings,
) -> Tensor:
    """Add the gradients of some rows' weighted losses; returns the losses, sums over labels: the model's own (0 where
    it is frozen), each head's.
    """
    tokens, teacher = batch.tokens.to(backbone.model.device, non_blocking=True), None
    losses = torch.zeros(len(weights), device=tokens.device)
    if (
        adapter is not None and settings.self_distilled
    ):  # first, since checkpointed layers run again in the mode that they find
        backbone.model.eval()
        with _autocast(backbone.model, accelerator), adapter.disable_adapter(), torch.no_grad():
            teacher = backbone(tokens, batch.documents)
    with _autocast(backbone.model, accelerator), torch.set_grad_enabled(adapter is not None):
        backbone.model.train(adapter is not None)
        hidden = backbone(tokens, batch.documents)
    states = hidden.detach().requires_grad_(
        adapter is not None
    )  # the gradients of all losses gather here before they go down once
    for head in range(heads.config.num_heads):
        with _autocast(backbone.model, accelerator):
            loss = head_loss(heads, head, states, batch.labels, backbone.lm_head, batch.documents)
        (weights[head + 1] * loss).backward()
        losses[head + 1] = loss.detach()
    if adapter is not None:
        with _autocast(backbone.model, accelerator):
            loss = model_loss(backbone.lm_head, states, batch.labels, batch.documents, teacher)
        (weights[0] * loss).backward()
        losses[0] = loss.detach()
        if states.grad is not None:  # None where no row of these has a label
            hidden.backward(states.grad)
    backbone.model.eval()
    return losses


def _autocast(model, accelerator):
    """bf16 arithmetic where it was asked for, and where the model is in 16 bits while the heads are not."""
    low = model.dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(model.device.type, torch.bfloat16, enabled=low or accelerator.mixed_precision == "bf16")


def _thinned(batch: Rows, settings: TrainingSettings, step: int) -> Rows:
    """The batch with a random `label_share` of its labels left."""
    if settings.label_share == 1:
        return batch
    generator = torch.Generator().manual_seed(hash((settings.seed, step)) % 2**63)
    kept = torch.rand(batch.labels.shape, generator=generator) < settings.label_share
    return Rows(batch.tokens, torch.where(kept, batch.labels, IGNORED), batch.documents)


def _agree(weights: list[Tensor], world: int) -> None:
    """All processes begin with the first one's weights."""
    for weight in weights if world > 1 else ():
        torch.distributed.broadcast(weight, 0)


def _sum_over_processes(losses: Tensor, parameters: list[nn.Parameter], world: int) -> None:
    """Losses and gradients become those of the whole batch; a process whose rows had no label for a head adds zeros."""
    if world > 1:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for tensor in (losses, *(parameter.grad for parameter in parameters)):
            torch.distributed.all_reduce(tensor)


def _record(
    step: int, losses: list[float], counts: list[int], norm: float, settings: TrainingSettings, joint: bool
) -> dict:
    means = [loss / count for loss, count in zip(losses, counts, strict=True)]
    of_heads = sum(settings.decay**head * mean for head, mean in enumerate(means[1:]))
    total = means[0] + settings.weight_of_heads(step) * of_heads if joint else of_heads
    record = {"step": step, "loss": total, "grad_norm": norm, "lr": settings.heads_lr(step)} | (
        {"model_loss": means[0]} if joint else {}
    )
    return record | {f"head_{head}_loss": mean for head, mean in enumerate(means[1:])}


def _run(settings: TrainingSettings, rows: Rows, heads: MedusaHeads) -> dict:
    """Which run a checkpoint belongs to."""
    run = {
        name: value
        for name, value in asdict(settings).items()
        if name not in ("save_every", "log_every", "validate_every")
    }
    sums = {
        f"sum_of_{name}": int(getattr(rows, name).sum(dtype=torch.int64)) for name in ("tokens", "labels", "documents")
    }
    return run | {"rows": list(rows.tokens.shape), **sums, "heads": asdict(heads.config)}


@torch.no_grad()
def _resume(path: Path, run: dict, optimizer, learned: dict[str, list[nn.Parameter]]) -> tuple[int, list[dict]]:
    """The step to go on from and the records so far; (0, []) without a checkpoint."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        return 0, []
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state["run"] != run:
        other = {
            name: (state["run"].get(name), value) for name, value in run.items() if state["run"].get(name) != value
        }
        raise ValueError(
            f"{path} belongs to a run with other settings (there, here): {other}; choose another output "
            "folder or remove it"
        )
    for name, group in learned.items():
        for parameter, saved in zip(group, state[name], strict=True):
            parameter.copy_(saved)
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["records"]
