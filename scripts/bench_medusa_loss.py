"""Time and memory of training Medusa heads: our chunked loss, the plain loss, and the frozen backbone's forward pass.

    python -m scripts.bench_medusa_loss [--json scripts/results/medusa_loss_h200.json]
    python -m scripts.bench_medusa_loss --device cpu --dtype float32 --vocab 500 --hidden 32 --layers 2 --sequence 32

A synthetic control: a Llama of 8B shape with random weights, random hidden states and labels (not zeros, which a card
multiplies faster). It shows times and, on a GPU, memory, not that anything is learned. All take turns in one loop, so
that a slow moment hits all: the backbone's forward pass; the plain loss, all logits [K, B, S, V] at once; ours head by
head, as the training loop does it; ours as `medusa_loss`. Loss memory is the peak above what was there before, less the
gradients of the heads' parameters, which every way holds in the end.

Why a share of labels: a head with an output layer of its own does three matrix products a label (forward, by state, by
weight), together 6 K S H V floating-point operations, more than the 2 * 7e9 * S of the backbone's forward pass: no
implementation of the full loss stays under 40 % of it. Output layers not learned whole (shared, low_rank) and a random
share of each step's labels (`TrainingSettings.label_share`) do less. The bound beside a measured ratio is operations
over operations, as if both ran at one speed.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from medusa.config import OUTPUTS
from medusa.heads import MedusaHeads
from medusa.losses import head_loss, medusa_loss
from specdec.info import commit, environment
from specdec.report.terminal import table
from specdec.training.backbone import Backbone
from specdec.training.checkpoint import write_json
from specdec.training.labels import IGNORED, count_labels

BACKBONE, PLAIN, EACH, WHOLE = "backbone forward", "plain loss", "ours, head by head", "ours, medusa_loss"
SHARES, DECAY, RANK = (1.0, 0.5, 0.25), 0.8, 64


def build_model(vocab: int, hidden: int, layers: int, sequence: int, device: torch.device, dtype: torch.dtype):
    """A frozen Llama with random weights: 8B shape at its size, and the same proportions at others."""
    head_dim = min(128, hidden // 4)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=7 * hidden // 2, num_hidden_layers=layers,
        head_dim=head_dim, num_attention_heads=hidden // head_dim, num_key_value_heads=max(1, hidden // head_dim // 4),
        max_position_embeddings=max(16, sequence), tie_word_embeddings=False,
    )  # fmt: skip
    with device:  # 8 billion random numbers take minutes on a CPU, and a moment here
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval().requires_grad_(False)


def build_heads(model, num_heads: int, output: str) -> MedusaHeads:
    """Heads of the model's dtype with random weights, so that no gradient is zero."""
    rank = min(RANK, model.config.hidden_size) if output == "low_rank" else None
    with model.device:
        heads = MedusaHeads.for_model(model, num_heads, output=output, rank=rank)
    for parameter in heads.parameters():
        nn.init.normal_(parameter, std=0.02)
    return heads


def bound(model, heads: MedusaHeads, labels: int, batch: int, sequence: int) -> float:
    """Operations of the matrix products of heads (of one block) and loss over those of the backbone's causal forward.

    `labels` are those of all heads. A weight costs a label 6, or 4 if it is frozen or nothing below it learns; in the
    backbone, a token 2."""
    config, own = model.config, heads.heads[0][heads.config.num_layers :]
    frozen = 0 if heads.config.output == "own" else config.hidden_size * config.vocab_size
    above = labels * (4 * config.hidden_size**2 + 4 * frozen + 6 * sum(p.numel() for p in own.parameters()))
    named = model.base_model.named_parameters()
    weights = sum(p.numel() for name, p in named if p.ndim == 2 and "embed_tokens" not in name)
    attention = sequence * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    return above / (2 * batch * sequence * (weights + attention))


def plain_loss(heads: MedusaHeads, hidden: Tensor, labels: Tensor, lm_head: nn.Module) -> Tensor:
    """As the original Medusa code: the logits of all heads, then each head's cross-entropy."""
    logits = heads(hidden, lm_head)
    loss_of = lambda k: nn.functional.cross_entropy(
        logits[k, :, : -(k + 2)].float().flatten(0, 1), labels[:, k + 2 :].flatten()
    )
    return sum(DECAY**k * loss_of(k) for k in range(len(logits)))


def ways(heads: MedusaHeads, hidden: Tensor, labels: Tensor, lm_head: nn.Module) -> dict[str, Callable]:
    """The losses; each call leaves gradients in the heads and returns the loss. `labels` are on the CPU."""
    on_device = labels.to(hidden.device)

    def backward(loss: Tensor) -> Tensor:
        loss.backward()
        return loss.detach()

    def each() -> Tensor:
        counts = count_labels(labels, heads.config.num_heads)[1:]
        return sum(
            backward(DECAY**k / count * head_loss(heads, k, hidden, labels, lm_head)) for k, count in enumerate(counts)
        )

    return {PLAIN: lambda: backward(plain_loss(heads, hidden, on_device, lm_head)), EACH: each,
            WHOLE: lambda: backward(medusa_loss(heads, hidden, labels, lm_head, decay=DECAY)[0])}  # fmt: skip


def check(steps: dict[str, Callable], heads: MedusaHeads) -> dict[str, dict]:
    """A first call of each: whether memory suffices, and how far loss and gradients lie from the plain loss's."""
    norm = lambda tensors: sum(float(x.float().norm()) ** 2 for x in tensors) ** 0.5
    found, reference = {}, None
    for name, step in steps.items():
        heads.zero_grad(set_to_none=True)
        try:
            out = step()
        except torch.OutOfMemoryError:
            found[name] = {"status": "out of memory"}
            continue
        found[name], gradients = {"status": "ok"}, [p.grad for p in heads.parameters()]
        if name == PLAIN:
            loss, reference, size = float(out), gradients, norm(gradients)
        elif name != BACKBONE and reference:
            apart = norm(a.float() - b.float() for a, b in zip(gradients, reference, strict=True))
            found[name] |= {
                "loss": float(out),
                "loss_difference": abs(float(out) - loss) / loss,
                "gradient_difference": apart / size,
            }
    return found


def measure(steps: dict[str, Callable], heads: MedusaHeads, repeats: int, device: torch.device) -> dict[str, dict]:
    """Milliseconds, and bytes of loss memory and of the raw peak above what was there before, None on a CPU."""
    cuda = device.type == "cuda"
    nothing = lambda: None
    wait, forget_peak = (torch.cuda.synchronize, torch.cuda.reset_peak_memory_stats) if cuda else (nothing, nothing)
    times, peaks = {name: [] for name in steps}, {name: [] for name in steps}
    for repeat in range(1 + repeats):
        for name, step in steps.items():
            heads.zero_grad(set_to_none=True)
            wait()
            forget_peak()
            before, began = torch.cuda.memory_allocated(), time.perf_counter()
            step()
            wait()
            if repeat:
                times[name].append(1e3 * (time.perf_counter() - began))
                peaks[name].append(torch.cuda.max_memory_allocated() - before)
    gradients = sum(p.numel() * p.element_size() for p in heads.parameters())
    return {
        name: {
            "milliseconds": statistics.median(times[name]),
            "range": [min(times[name]), max(times[name])],
            "peak_bytes": max(peaks[name]) if cuda else None,
            "loss_bytes": max(peaks[name]) - gradients if cuda and name != BACKBONE else None,
        }
        for name in steps
    }


def compare(backbone: Backbone, num_heads: int, output: str, batch: int, sequence: int, repeats: int) -> list[dict]:
    """The rows of one kind of output layer: every way with every share of labels."""
    model, device, rows = backbone.model, backbone.model.device, []
    heads, tokens = build_heads(model, num_heads, output), torch.randint(model.config.vocab_size, (batch, sequence))
    hidden = torch.randn(batch, sequence, model.config.hidden_size, device=device, dtype=model.dtype)
    forward = torch.no_grad()(functools.partial(backbone, tokens.to(device)))
    for share in SHARES:
        labels = torch.where(torch.rand(tokens.shape) < share, tokens, IGNORED)
        steps = {BACKBONE: forward} | ways(heads, hidden, labels, backbone.lm_head)
        seen = check(steps, heads)
        fitting = {name: step for name, step in steps.items() if seen[name]["status"] == "ok"}
        measured = measure(fitting, heads, repeats, device)
        least = bound(model, heads, sum(count_labels(labels, num_heads)[1:]), batch, sequence)
        setting = {"output": output, "label_share": share, "bound": least}
        rows += [{**setting, "what": name, **row, **measured.get(name, {})} for name, row in seen.items()]
    return rows


def bars(rows: Sequence[dict]) -> list[dict]:
    """What is asked, and what was measured; `value` and `met` are None where nothing was."""
    ratio = lambda first, second, what: first[what] / second[what] if first.get(what) and second.get(what) else None
    judged = []
    for output, share in dict.fromkeys((row["output"], row["label_share"]) for row in rows):
        of = {row["what"]: row for row in rows if (row["output"], row["label_share"]) == (output, share)}
        for name in (EACH, WHOLE) if share == 1 else ():
            memory, time_of = (ratio(of[PLAIN], of[name], what) for what in ("loss_bytes", "milliseconds"))
            judged.append({"what": f"plain loss memory over {name}, {output}", "value": memory, "at_least": 5.0})
            judged.append({"what": f"plain time over {name}, {output}", "value": time_of, "at_least": 0.9})
        judged.append({"what": f"heads + loss over backbone forward, {output}, {share:.0%} of labels", "at_most": 0.4,
                       "value": ratio(of[EACH], of[BACKBONE], "milliseconds"), "bound": of[EACH]["bound"]})  # fmt: skip
    met = lambda row: row.get("at_least", 0.0) <= row["value"] <= row.get("at_most", float("inf"))
    return [{**row, "met": None if row["value"] is None else met(row)} for row in judged]


def show(rows: Sequence[dict], judged: Sequence[dict], note: str) -> str:
    """Both tables."""
    cell = lambda value, form=".2f", scale=1: "-" if value is None else format(value / scale, form)
    header = ["output, labels, way", "ms", "loss GiB", "peak GiB", "loss differs", "gradients differ"]
    lines = [
        [
            f"{row['output']}, {row['label_share']:.0%}, {row['what']}",
            cell(row["milliseconds"]) if row["status"] == "ok" else row["status"],
            cell(row.get("loss_bytes"), scale=2**30),
            cell(row.get("peak_bytes"), scale=2**30),
            cell(row.get("loss_difference"), ".0e"),
            cell(row.get("gradient_difference"), ".0e"),
        ]
        for row in rows
    ]
    asked = [
        [
            row["what"],
            f">= {row['at_least']:g}" if "at_least" in row else f"<= {row['at_most']:g}",
            cell(row.get("bound")),
            cell(row["value"]),
            {True: "met", False: "NOT MET", None: "not measured"}[row["met"]],
        ]
        for row in judged
    ]
    return f"{note}\n\n{table(header, lines)}\n\n" + table(["figure", "asked", "bound", "measured", ""], asked)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"vocab": 128256, "hidden": 4096, "heads": 5, "sequence": 2048, "batch": 1, "repeats": 10, "layers": 32}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value, help="default %(default)s")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured to FILE")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    model = build_model(options.vocab, options.hidden, options.layers, options.sequence, device, dtype)
    given = (options.batch, options.sequence, options.repeats)
    rows = [row for output in OUTPUTS for row in compare(Backbone(model), options.heads, output, *given)]
    note = "Synthetic control: random weights, hidden states, labels; one run; heads in the run's dtype; no memory "
    note += "figures on a CPU"
    judged = bars(rows)
    print(show(rows, judged, note))
    if options.json:
        settings = vars(options) | {"json": str(options.json)}
        versions = {"schema": 1, "environment": environment(), "git_sha": commit()}
        write_json({**versions, "settings": settings, "rows": rows, "bars": judged, "note": note}, options.json)


if __name__ == "__main__":
    main()
