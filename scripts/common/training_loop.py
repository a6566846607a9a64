"""The loop that trains small models: AdamW, cosine schedule, bf16 autocast, exact resume from the last checkpoint."""

import json
import math
import time
from pathlib import Path

import torch

from specdec.training.checkpoint import save_atomically


def cosine_lr(step, steps, peak, warmup):
    """Learning rate at `step`: linear warm-up over `warmup` steps, then a cosine down to zero at `steps`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def make_optimizer(model, weight_decay):
    """AdamW that decays matrices only."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=next(model.parameters()).is_cuda)


def train(model, loss_of, *, steps, lr, checkpoint, evaluate=None, weight_decay=0.1, warmup=200, save_every_s=60.0,
          log_every=100, log=print):  # fmt: skip
    """Train `model` for `steps` and return the log, a list of records.

    `loss_of(step)` draws that step's batch (the same one for the same step, so a resumed run equals an uninterrupted
    one) and returns the loss. `evaluate()` returns a dictionary for the record at the start, every tenth and the end.
    The state lives in `checkpoint`."""
    optimizer, device = make_optimizer(model, weight_decay), next(model.parameters()).device
    start, records, spent = 0, [], 0.0
    if Path(checkpoint).exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start, records, spent = state["step"], state["records"], state["seconds"]
        log(f"resumed {checkpoint} at step {start}")
    began = saved = time.monotonic()

    def save(step):
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "records": records}
        save_atomically(state | {"seconds": spent + time.monotonic() - began}, checkpoint)

    for step in range(start, steps):
        rate = cosine_lr(step, steps, lr, min(warmup, max(1, steps // 10)))
        loss, norm = _step(model, optimizer, loss_of, step, rate, device)
        due, last = time.monotonic() - saved > save_every_s, step == steps - 1
        logged = step % log_every == 0 or last
        if (logged or due) and not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
            # before anything broken is saved
            raise FloatingPointError(
                f"loss is {loss.item()}, gradient norm {norm.item()} at step {step}; the last checkpoint is "
                f"{checkpoint}"
            )
        if logged:
            record = {"step": step, "loss": round(loss.item(), 4), "grad_norm": round(norm.item(), 3)}
            record["seconds"] = round(spent + time.monotonic() - began, 1)
            if evaluate and (step % max(1, steps // 10) < log_every or last):
                record |= evaluate()
            records.append(record)
            log(json.dumps(record))
        if due:
            save(step + 1)
            saved = time.monotonic()
    if start < steps:
        save(steps)
    return records


def _step(model, optimizer, loss_of, step, lr, device):
    """One step of the optimizer; returns the loss and the gradient norm, on the device."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        loss = loss_of(step)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, norm
