"""Throughput and memory of training an EAGLE-3 drafter for a frozen target, beside the target's forward alone.

    python -m scripts.bench_training --json scripts/results/training_h200.json      # some minutes on one H200
    python -m scripts.bench_training --preset toy                                   # seconds on a CPU

A synthetic control: a Llama of 8B shape with random weights, random tokens, all of them learned. It shows times and
memory, not that anything is learned. A step is the training loop's own, from a batch on the CPU to the new weights; the
forward alone gives features and last hidden states of the same rows, as many at a time, and runs before and after the
steps that are timed. Weights and optimiser: the target's weights, the drafter's and AdamW's two moments; gradients and
activations are what a step needs beyond them. The bound is matrix products over matrix products, as if all ran at one
speed. The requirements are judged on the first of `--lengths`.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator

from scripts.bench_medusa_loss import build_model
from scripts.common.entry import add_bars_option, run_script
from specdec.cli.results import hand_over, make_result
from specdec.drafters.eagle3.module import Eagle3Model
from specdec.report.terminal import table
from specdec.training.backbone import Backbone
from specdec.training.data import Rows
from specdec.training.eagle3.network import new_eagle3
from specdec.training.eagle3.training import train_eagle3
from specdec.training.network import choose_draft_tokens
from specdec.training.unrolled.settings import UnrolledSettings

PRESETS = {
    "8b": {"vocab": 128256, "hidden": 4096, "layers": 32, "draft_vocab": 32000, "tokens": 8192, "lengths": [2048, 8192],
           "rows_at_once": 1, "depths": [3, 7], "warm": 3, "repeats": 8},
    "toy": {"vocab": 200, "hidden": 32, "layers": 3, "draft_vocab": 64, "tokens": 64, "lengths": [16, 64],
            "rows_at_once": 2, "depths": [1, 2], "warm": 1, "repeats": 2},
}  # fmt: skip
AT_LEAST, MEMORY = {3: 0.5, 7: 0.35}, 1.3  # of the forward's speed by depth; of weights and optimiser


def random_rows(count: int, length: int, vocab: int) -> Rows:
    """Rows of random tokens, a text each, that are learned everywhere."""
    tokens = torch.randint(vocab, (count, length), generator=torch.Generator().manual_seed(0)).int()
    return Rows(tokens, tokens, torch.zeros_like(tokens))


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def forward_seconds(backbone: Backbone, network: Eagle3Model, rows: Rows, at_once: int, repeats: int) -> list[float]:
    """Seconds of each of `repeats` forwards of all rows, `at_once` of them at a time."""
    device, layers, found = backbone.model.device, network.config.target_layers, []
    batch = rows.take(slice(None))
    for repeat in range(repeats + 1):
        synchronise(device)
        began = time.perf_counter()
        with torch.no_grad():
            for start in range(0, len(rows), at_once):
                backbone.features(batch.tokens[start : start + at_once].to(device), layers)
        synchronise(device)
        found += [time.perf_counter() - began] if repeat else []
    return found


def parameters_of(model: torch.nn.Module) -> int:
    """How many numbers the matrices hold that a token is multiplied with, an embedding's not."""
    skipped = ("embed_tokens", "lm_head")
    return sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and not any(s in name for s in skipped))


def bound(model, network: Eagle3Model, length: int, depth: int) -> float:
    """Operations of the forward alone over those of a step with the forward, for each token.

    A weight costs 2 in a forward, 6 with gradients, 4 where nothing below learns; causal attention 2 L D a head forward
    and 3.5 times that with gradients, whose backward computes the scores twice; the target's logits are needed once."""
    config, own = model.config, network.config
    attention = lambda heads, dim: 2 * length * heads * dim
    alone = 2 * parameters_of(model.base_model)
    alone += config.num_hidden_layers * attention(config.num_attention_heads, config.head_dim)
    head, fusion = own.hidden_size * own.draft_vocab_size, network.fc.weight.numel()
    layer = parameters_of(network) - fusion
    each = 6 * (layer + head) + 4.5 * own.num_layers * attention(own.num_heads, own.head_dim)
    return alone / (alone + 4 * fusion + 2 * head + depth * each)


def held_bytes(model, network: Eagle3Model) -> int:
    """Bytes of all weights, and of two moments of those that learn."""
    size = lambda tensors: sum(x.numel() * x.element_size() for x in tensors)
    return (
        size(model.parameters())
        + size(network.parameters())
        + 2 * size(p for p in network.parameters() if p.requires_grad)
    )


def measure(backbone: Backbone, network: Eagle3Model, length: int, depth: int, options) -> dict:
    """One row of the table: steps of training with `depth`, and forwards before and after them."""
    model, count = backbone.model, options.tokens // length
    rows, at_once = random_rows(count, length, options.vocab), min(options.rows_at_once, count)
    settings = UnrolledSettings(
        options.warm + options.repeats, batch=count, rows_at_once=at_once, lr=1e-4, depth=depth, loss=options.loss,
        save_every=None, log_every=1, validate_every=options.warm + options.repeats,
    )  # fmt: skip
    cuda = model.device.type == "cuda"
    alone = forward_seconds(backbone, network, rows, at_once, options.repeats)
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        accelerator = Accelerator(mixed_precision="bf16" if cuda else "no")
        log = train_eagle3(model, network, rows, folder, settings, (), accelerator, progress=False)
    peak = torch.cuda.max_memory_allocated() if cuda else None
    network.zero_grad(set_to_none=True)
    alone += forward_seconds(backbone, network, rows, at_once, options.repeats)
    steps = [options.tokens / record["tokens_per_second"] for record in log][options.warm :]
    step, forward, held = statistics.median(steps), statistics.median(alone), held_bytes(model, network)
    return {
        "length": length, "rows": count, "rows_at_once": at_once, "depth": depth, "step_seconds": step,
        "forward_seconds": forward, "step_range": [min(steps), max(steps)], "forward_range": [min(alone), max(alone)],
        "tokens_per_second": options.tokens / step, "over_forward": forward / step,
        "bound": bound(model, network, length, depth), "held_bytes": held, "peak_bytes": peak,
        "peak_over_held": peak and peak / held, "losses": [record["loss"] for record in log],
    }  # fmt: skip


def bars_of(rows: Sequence[dict], length: int) -> list[dict]:
    """What is asked, and what was measured on rows of `length`; None where nothing was."""
    judged = []
    for row in rows:
        if row["length"] == length and row["depth"] in AT_LEAST:
            where = f"{row['depth']} steps of training-time test, rows of {length}"
            speed, memory = row["over_forward"], row["peak_over_held"]
            asked = AT_LEAST[row["depth"]]
            judged.append({"what": f"tokens/s over the frozen forward's, {where}", "value": speed, "at_least": asked,
                           "met": speed >= asked})  # fmt: skip
            judged.append({"what": f"peak memory over weights and optimiser, {where}", "value": memory,
                           "at_most": MEMORY, "met": None if memory is None else memory <= MEMORY})  # fmt: skip
    return judged


def show(rows: Sequence[dict], judged: Sequence[dict]) -> str:
    """The table of figures, and that of requirements if there are any in `judged`."""
    cell = lambda value, form=".3f", scale=1.0: "-" if value is None else format(value / scale, form)
    lines = [
        [f"{row['rows']} x {row['length']}", str(row["rows_at_once"]), str(row["depth"]),
         cell(row["tokens_per_second"], ",.0f"), cell(row["step_seconds"], ".1f", 1e-3),
         cell(row["forward_seconds"], ".1f", 1e-3), cell(row["over_forward"]), cell(row["bound"]),
         cell(row["peak_bytes"], ".2f", 2**30), cell(row["held_bytes"], ".2f", 2**30), cell(row["peak_over_held"])]
        for row in rows
    ]  # fmt: skip
    header = ["rows", "at once", "depth", "tokens/s", "step ms", "forward ms", "over forward", "bound", "peak GiB",
              "held GiB", "peak/held"]  # fmt: skip
    said = {True: "met", False: "NOT MET", None: "not measured"}
    asked = [
        [bar["what"], f">= {bar['at_least']}" if "at_least" in bar else f"<= {bar['at_most']}", cell(bar["value"]),
         said[bar["met"]]]
        for bar in judged
    ]  # fmt: skip
    shown = table(header, lines)
    return shown + ("\n\n" + table(["figure", "asked", "measured", ""], asked) if asked else "")


def profiled(work: Callable[[], object], device: torch.device) -> str:
    """The operations of some work that take longest."""
    from torch.profiler import ProfilerActivity, profile

    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as found:
        work()
        synchronise(device)
    by = "self_device_time_total" if cuda else "self_cpu_time_total"
    return found.key_averages().table(sort_by=by, row_limit=40, max_name_column_width=90)


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; what is not given is the preset's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, cuda = parser.add_argument, torch.cuda.is_available()
    add("--preset", choices=PRESETS, default="8b" if cuda else "toy")
    for name, value in PRESETS["8b"].items():
        several = {"nargs": "+"} if isinstance(value, list) else {}
        add(f"--{name.replace('_', '-')}", type=int, help="default: the preset's", **several)
    add("--loss", choices=["kl", "ce", "tv"], default="kl")
    add("--device", choices=["cpu", "cuda"], default="cuda" if cuda else "cpu")
    add("--profile", action="store_true", help="show which kernels steps of the first row take, and measure nothing")
    add("--json", metavar="FILE", help="write everything that was measured to FILE")
    add_bars_option(parser)
    options = parser.parse_args(arguments)
    for name, value in PRESETS[options.preset].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if wrong := [length for length in options.lengths if options.tokens % length]:
        raise ValueError(f"rows of {wrong} do not make {options.tokens} tokens a step")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    options = options_of(arguments)
    torch.manual_seed(0)
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = build_model(options.vocab, options.hidden, options.layers, max(options.lengths), device, dtype)
    drafted, _ = choose_draft_tokens(random_rows(1, options.tokens, options.vocab), options.draft_vocab, options.vocab)
    with device:
        network = new_eagle3(model, drafted)
    backbone = Backbone(model)
    if options.profile:
        once = argparse.Namespace(**vars(options) | {"warm": 1, "repeats": 1})
        print(profiled(lambda: measure(backbone, network, options.lengths[0], options.depths[0], once), device))
        return
    rows = [measure(backbone, network, length, depth, options) for length in options.lengths
            for depth in options.depths]  # fmt: skip
    judged = bars_of(rows, options.lengths[0])
    print(show(rows, judged if options.bars else ()))
    note = "Synthetic control: random weights and tokens; no memory figures on a CPU"
    hand_over(make_result("training", vars(options), rows, [], bars=judged, note=note), options.json)


if __name__ == "__main__":
    run_script(main)
