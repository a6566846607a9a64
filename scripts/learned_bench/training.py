"""Training a drafter for as long as the Medusa heads were trained, on the same rows.

The rule, fixed beforehand: a few steps are timed; the number of steps is the heads' seconds of training over the median
of these steps' seconds, rounded. Seconds of training are those of the loop's steps, from drawing gradients to the new
weights; the first step, which prepares kernels, counts as the mean of the others, checkpoints and validations do not
count."""

import statistics
import tempfile
from itertools import pairwise
from pathlib import Path

import torch

from scripts.medusa_bench.models import accelerator_for, training_rows
from specdec.training.acceptance import decode_prompts
from specdec.trees.tree import TokenTree


def step_seconds(log, tokens):
    """Mean seconds of a step of `tokens` over a log, without those of its first step.

    >>> step_seconds([{"step": 0, "tokens_per_second": 1.0}, {"step": 4, "tokens_per_second": 20.0}], 10)
    0.5
    """
    if len(log) < 2:
        return tokens / log[0]["tokens_per_second"]
    spent = [(b["step"] - a["step"], tokens / b["tokens_per_second"]) for a, b in pairwise(log)]
    return sum(count * seconds for count, seconds in spent) / sum(count for count, _ in spent)


def heads_seconds(preset, heads_log):
    """Seconds of the heads' training, from their log."""
    return preset["heads_steps"] * step_seconds(heads_log, preset["heads_batch"] * preset["context"])


def _train(kind, preset, chosen, model, data, work, steps, every):
    """Train a new module; returns it and its log."""
    rows, (_, seed) = training_rows(preset, *data), data
    torch.manual_seed(seed + 5)
    module = kind.new(model, rows, chosen)
    log = kind.train(model, module, rows, work, chosen, steps, seed, every, accelerator_for(model))
    return module, log


def make_timing(kind, preset, own, model, folder, seed):
    """The seconds of some steps of a training that is thrown away."""
    chosen = own[kind.key]
    with tempfile.TemporaryDirectory() as work:
        steps = own["timed_steps"]
        _, log = _train(kind, preset, chosen, model, (folder, seed), Path(work), steps, (1, None))
    tokens = chosen["settings"]["batch"] * preset["context"]
    each = [tokens / record["tokens_per_second"] for record in log]
    return {"each": each, "step_seconds": statistics.median(each[own["warm_steps"] :])}


def steps_for(seconds, timing):
    """How many steps take as long.

    >>> steps_for(100.0, {"step_seconds": 0.3})
    333
    """
    return max(1, round(seconds / timing["step_seconds"]))


def make_trained(kind, preset, own, model, folder, seed, steps):
    """Train for so many steps and save the drafter."""
    chosen, work = own[kind.key], folder / f"{kind.key}_work"
    module, log = _train(kind, preset, chosen, model, (folder, seed), work, steps, (max(1, steps // 20), 250))
    parameters = sum(p.numel() for p in module.parameters())
    kind.save(module, folder / kind.key)
    tokens = chosen["settings"]["batch"] * preset["context"]
    return {
        "parameters": parameters, "steps": steps, "tokens_seen": steps * tokens,
        "training_seconds": steps * step_seconds(log, tokens), "log": log,
    }  # fmt: skip


def make_tree(kind, module, own, target, prompts, tokens):
    """The static tree that is best by how often the child of each rank is accepted on `prompts`, token ids."""
    from specdec import optimal_tree

    nodes, depth, width = own["tree"]
    wide = kind.wide(module, TokenTree.from_widths([min(width, 6), *[3, 2, 1][: depth - 1]]))
    acceptance = sorted(decode_prompts(target, wide, prompts, tokens).rank_acceptance, reverse=True)
    tree = optimal_tree(acceptance, nodes + 1, max_depth=depth)
    return {"acceptance": acceptance, "choices": tree.choices, "depth": tree.max_depth}
