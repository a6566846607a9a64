"""The training loop of all learned drafters.

A step is a function of (settings, seed, step) alone: its rows, its dropout, its learning rates. So a resumed run equals
an uninterrupted one bit for bit, and several GPUs see the batch that one would. Gradients are sums over the batch
divided by counts of labels that every process knows beforehand, whatever the number of processes or rows at a time."""

import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from specdec.training.checkpoint import save_atomically
from specdec.training.data import Rows
from specdec.training.learner import Learner
from specdec.training.sharding import shard_layers


def train(learner: Learner, rows: Rows, output: str | Path, accelerator, progress: bool = True,
          shard: bool = False) -> list[dict]:  # fmt: skip
    """Train in place over `rows`; returns the log, a list of records.

    A record's "tokens_per_second" counts the steps since the record before, over all processes. The state lives in
    `output`/checkpoint.pt, from which a killed run goes on; trackers of the accelerator get every record. With a watch
    the weights of the best validation remain. With `shard` the model's layers are spread over the processes
    (`sharding.shard_layers`), and stay so; what learns is whole in each. Raises ValueError for a checkpoint of other
    settings; FloatingPointError for a loss that is not finite, before the weights change, with the batch in
    `output`/bad_batch.pt."""
    from tqdm import tqdm

    _require_usable(learner, rows, accelerator, shard)
    output, main, settings = Path(output), accelerator.is_main_process, learner.settings
    run = _Run(learner, accelerator, _optimizer(learner), output, shard)
    run.share_weights()
    identity = _identity(learner, rows)
    first = run.resume(identity)

    learner.module.train()
    hidden, tokens, seconds = not (progress and main), 0, 0.0
    bar = tqdm(range(first, settings.steps), initial=first, total=settings.steps, desc=learner.name, disable=hidden)
    for step in bar:
        batch = learner.prepare(rows.batch(step, settings.batch, settings.seed), step)
        began = time.perf_counter()
        record = run.step(batch, step)
        tokens, seconds = tokens + int((batch.documents >= 0).sum()), seconds + time.perf_counter() - began
        last = step == settings.steps - 1
        validated = run.validate() if last or (step + 1) % settings.validate_every == 0 else {}
        last = last or run.stopped
        if last or validated or step % settings.log_every == 0:
            record |= validated
            record["tokens_per_second"], tokens, seconds = tokens / seconds, 0, 0.0
            run.records.append(record)
            bar.set_postfix(loss=f"{record['loss']:.3f}", tokens_per_second=f"{record['tokens_per_second']:,.0f}")
            accelerator.log({name: value for name, value in record.items() if name != "step"}, step=step)
        if main and settings.save_every and (last or (step + 1) % settings.save_every == 0):
            run.save(identity, step + 1)
        if last:
            break
    run.take_best()
    learner.module.eval()
    return run.records


def autocast(model, accelerator) -> torch.autocast:
    """bf16 arithmetic for mixed precision, and where the model is in 16 bits while the drafter is not."""
    low = model.dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(model.device.type, torch.bfloat16, enabled=low or accelerator.mixed_precision == "bf16")


def require_precision(accelerator) -> None:
    """Raise ValueError for a mixed precision other than bf16."""
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ValueError(f"mixed precision is no or bf16, got {accelerator.mixed_precision}")


@dataclass(slots=True)
class _Run:
    """One process's part of a run, and what its checkpoint holds."""

    learner: Learner
    accelerator: Any  # accelerate.Accelerator; accelerate is optional
    optimizer: torch.optim.Optimizer
    output: Path
    shard: bool = False  # the model's layers are spread: all processes run the same forwards
    records: list[dict] = field(default_factory=list)
    best: dict = field(default_factory=dict)  # {"value", "weights"} of the best validation so far
    worse: int = 0  # validations since then
    stopped: bool = False

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters that change."""
        return [parameter for group in self.learner.learned.values() for parameter in group]

    @property
    def checkpoint(self) -> Path:
        """The file of the state."""
        return self.output / "checkpoint.pt"

    def share_weights(self) -> None:
        """Let all processes have the first one's weights."""
        for parameter in self.parameters if self.accelerator.num_processes > 1 else ():
            torch.distributed.broadcast(parameter.data, 0)

    def step(self, batch: Rows, step: int) -> dict:
        """One step of the optimizer on the whole batch; returns its record."""
        learner, settings, optimizer = self.learner, self.learner.settings, self.optimizer
        counts, rates = learner.count(batch, step), learner.rates(step)
        losses = self._gradients(batch, counts, step)
        norm = nn.utils.clip_grad_norm_(self.parameters, settings.max_grad_norm)
        means = [loss / max(1, count) for loss, count in zip(losses.tolist(), counts, strict=True)]
        told = learner.report(means, step)
        record = {"step": step, "loss": told.pop("loss"), "grad_norm": float(norm), "lr": rates[0]} | told
        if not all(math.isfinite(value) for value in record.values()):
            bad = self.output / "bad_batch.pt"
            if self.accelerator.is_main_process:
                save_atomically({"step": step, **_tensors(batch)}, bad)
            self.accelerator.wait_for_everyone()
            raise FloatingPointError(
                f"step {step}: {record}; its batch is in {bad}, the weights before it in {self.checkpoint}"
            )
        for group, lr in zip(optimizer.param_groups, rates, strict=False):
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return record

    def _gradients(self, batch: Rows, counts: list[int], step: int) -> Tensor:
        """Accumulate the gradients of the batch's mean losses over all processes; returns the losses, sums over labels.

        A process whose rows have no label for a loss adds zeros."""
        learner, settings = self.learner, self.learner.settings
        mine, world = self.accelerator.process_index, self.accelerator.num_processes
        own = list(range(mine, settings.batch, world))
        losses = torch.zeros(len(counts), device=learner.backbone.model.device)
        for start in range(0, len(own), settings.rows_at_once):
            torch.manual_seed(hash((settings.seed, step, start, mine)) % 2**63)  # dropout repeats after a resume
            losses = losses + learner.backward(batch.take(own[start : start + settings.rows_at_once]), counts, step)
        if world > 1:
            changed = learner.changed(step)
            for parameter in changed:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for tensor in (losses, *(parameter.grad for parameter in changed)):
                torch.distributed.all_reduce(tensor)
        return losses

    def validate(self) -> dict[str, float]:
        """What the main process measures, {} in the others; with a watch all of them learn whether to stop."""
        watch, found = self.learner.watch, {}
        if self.accelerator.is_main_process or self.shard:
            self.learner.module.eval()
            found = self.learner.validate()
            self.learner.module.train()
        found = found if self.accelerator.is_main_process else {}
        if watch is None:
            return found
        value = torch.tensor(found.get(watch.name, -math.inf), dtype=torch.float64)
        if self.accelerator.num_processes > 1:
            value = value.to(self.learner.backbone.model.device)
            torch.distributed.broadcast(value, 0)
        if not self.best or float(value) > self.best["value"]:
            weights = [parameter.detach().to("cpu", copy=True) for parameter in self.parameters]
            self.best, self.worse = {"value": float(value), "weights": weights}, 0
        else:
            self.worse += 1
        self.stopped = watch.patience is not None and self.worse >= watch.patience
        return found

    @torch.no_grad()
    def take_best(self) -> None:
        """Put the weights of the best validation in place of the last ones."""
        for parameter, weight in zip(self.parameters, self.best.get("weights", ()), strict=False):
            parameter.copy_(weight)

    def save(self, identity: dict, step: int) -> None:
        """Write the checkpoint, from which `step` is the next."""
        weights = {name: [p.detach() for p in group] for name, group in self.learner.learned.items()}
        state = {"run": identity, **weights, "optimizer": self.optimizer.state_dict(), "step": step}
        watched = {"best": self.best, "worse": self.worse, "stopped": self.stopped} if self.learner.watch else {}
        save_atomically(state | {"records": self.records} | watched, self.checkpoint)

    @torch.no_grad()
    def resume(self, identity: dict) -> int:
        """Read the checkpoint, if there is one; returns the step to go on from."""
        path = self.checkpoint
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            return 0
        state = torch.load(path, map_location="cpu", weights_only=True)
        there = state["run"]
        if there != identity:
            other = {name: (there.get(name), value) for name, value in identity.items() if there.get(name) != value}
            raise ValueError(
                f"{path} belongs to a run with other settings (there, here): {other}; choose another output folder or "
                "remove it"
            )
        for name, group in self.learner.learned.items():
            for parameter, saved in zip(group, state[name], strict=True):
                parameter.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.records = state["records"]
        if self.learner.watch:
            self.best, self.worse, self.stopped = state["best"], state["worse"], state["stopped"]
        return self.learner.settings.steps if self.stopped else state["step"]


def _require_usable(learner: Learner, rows: Rows, accelerator, shard: bool) -> None:
    """Raise ValueError for more processes than rows of a step, or packed texts that the model lets see each other.

    With `shard` the model is spread in between."""
    require_precision(accelerator)
    world, batch = accelerator.num_processes, learner.settings.batch
    if batch < world:
        raise ValueError(f"batch must be at least the number of processes, {world}, got {batch}")
    if shard and batch % world:
        raise ValueError(f"with spread layers every process runs as many rows: {world} do not share a batch of {batch}")
    if shard:
        shard_layers(learner.backbone.model, accelerator)
    if bool((rows.documents > 0).any()):
        learner.backbone.require_packing()


def _optimizer(learner: Learner) -> torch.optim.Optimizer:
    groups = [{"params": group} for group in learner.learned.values() if group]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), weight_decay=learner.settings.weight_decay,
                             fused=learner.backbone.model.device.type == "cuda")  # fmt: skip


def _identity(learner: Learner, rows: Rows) -> dict:
    """What tells one run from another: a checkpoint is resumed by its own run only."""
    settings: Any = learner.settings
    told = {name: value for name, value in asdict(settings).items() if not name.endswith("_every")}
    sums = {f"sum_of_{name}": int(tensor.sum(dtype=torch.int64)) for name, tensor in _tensors(rows).items()}
    return told | {"rows": list(rows.tokens.shape), **sums, **learner.describe()}


def _tensors(rows: Rows) -> dict[str, Tensor]:
    return {"tokens": rows.tokens, "labels": rows.labels, "documents": rows.documents}
