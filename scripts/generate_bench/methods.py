"""The methods that `scripts.bench_generate` compares: a process each, which yields one row for every batch size."""

import gc
import os
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

import specdec
from medusa import MedusaDrafter, MedusaHeads
from scripts.common.entry import one_line
from scripts.common.gpu_timing import ceilings
from scripts.generate_bench.models import Models, card_of, load, needs_draft, prompts, to_host
from scripts.generate_bench.peers import ASSISTED, EAGER, LOOKUP, STATIC, peer_row
from scripts.generate_bench.quantised import NONE, kinds_of
from scripts.generate_bench.rounds import PARTS, clock, forward_seconds, take_apart
from scripts.generate_bench.speeds import WARM_UP, NotAvailable, speeds
from scripts.generate_bench.untrained import BLOCKS, EAGLE3, untrained_dspark, untrained_eagle3
from specdec import TokenTree

MODES = ("eager", "graph", "compile")
KINDS = ("autoregressive", "chain", "tree", "medusa", "lookup")
AUTO, COSTS, LONG_RUN, ROOFLINE = "auto", "costs", "long-run", "roofline"  # AUTO: drafts of whatever shape pays
OURS = tuple(f"{kind}-{mode}" for kind in (*KINDS, AUTO, COSTS, LONG_RUN) for mode in MODES)
METHODS = (ROOFLINE, EAGER, STATIC, ASSISTED, LOOKUP, *OURS)
HEADS, NODES = 5, 64
RANKS = (0.7, 0.12, 0.06, 0.03)  # plausible acceptance by rank, for the tree of NODES; nothing here was measured


def tree_of_heads() -> TokenTree:
    """The 64-node tree, as deep as there are heads."""
    return specdec.optimal_tree(RANKS, NODES, max_depth=HEADS)


def drafter_of(kind: str, models: Models, options):
    """`(drafter or None, what about it is a synthetic control or None)`."""
    exact = "exact " * (len(set(kinds_of(vars(options)))) == 1)
    exact = f"{exact}{options.draft_layers}-layer draft" if options.model is None else None
    if kind == "chain" and options.acceptance is not None:
        return specdec.SyntheticDrafter(
            needs_draft(models), options.acceptance, options.length
        ), f"planted acceptance {options.acceptance:g}"
    if kind in ("chain", AUTO):
        return specdec.ModelDrafter(needs_draft(models), options.length), exact
    if kind == "tree":
        return specdec.ModelDrafter(needs_draft(models), tree=tree_of_heads()), exact
    if kind == "medusa":
        heads = MedusaHeads.for_model(models.target, HEADS, output="shared")
        return MedusaDrafter(heads, tree_of_heads()), f"{HEADS} untrained heads"
    if kind == EAGLE3:
        return untrained_eagle3(models.target), "an untrained EAGLE-3 drafter"
    if kind in BLOCKS:
        return untrained_dspark(kind, models.target), "an untrained DSpark drafter"
    return (specdec.PromptLookupDrafter(options.length), None) if kind == "lookup" else (None, None)


def runner_of(models: Models, mode: str) -> specdec.ModelRunner:
    """A runner of that mode; raises NotAvailable where the device has none."""
    try:
        return specdec.ModelRunner(models.target, mode=mode)
    except ValueError as error:
        raise NotAvailable(f"not available here: {error}") from error


def our_row(kind: str, mode: str, models: Models, options, batch: int) -> dict:
    """One of our generators, and its round taken apart."""
    ids, mask = prompts(models, options, batch)
    drafter, note = drafter_of(kind, models, options)
    generator = specdec.SpeculativeGenerator(runner_of(models, mode), drafter, tree="auto" if kind == AUTO else None)
    row, whole = speeds(
        lambda new_tokens: generator.generate(ids, mask, max_new_tokens=new_tokens, seed=options.seed), batch, options
    )
    out, stats = whole.result, whole.result.stats.pooled
    row |= {
        "note": note,
        "tokens": out.sequences[:, ids.shape[1] :].tolist(),
        "host_rounds": out.stats.host,
        "round_seconds": stats.round_seconds,
        "graph_bytes": graph_bytes() if options.device == "cuda" else None,
    }
    row |= {name: getattr(stats, name) for name in ("tokens_per_round", "acceptance_rate", "step_seconds", "overhead")}
    if kind == AUTO:  # its rounds have several shapes
        return row | {"shapes": dict(Counter(stats.shapes))}
    half = options.new_tokens // 2  # the mean context of the rounds that were timed
    text = out.sequences[:, : ids.shape[1] + half]
    try:
        parts = take_apart(generator, text, torch.cat([mask, mask.new_ones(batch, half)], 1), options.new_tokens - half)
    except Exception as error:  # the speeds stand without it
        return row | {"parts_error": one_line(error)}
    # on a CPU rounds through the host run other code than these parts, so the difference would mean nothing
    comparable = stats.round_seconds and (options.device == "cuda" or out.stats.host is None)
    host = stats.round_seconds - parts["whole"] if comparable else None
    return row | {"parts": {name: parts[name] for name in (*PARTS, "whole")} | {"host": host},
                  "capture_seconds": parts["capture_seconds"], "capture_bytes": parts["capture_bytes"]}  # fmt: skip


def graph_bytes() -> int:
    """Memory that CUDA graphs hold: pools of torch's allocator other than the default one."""
    return sum(
        segment["total_size"] for segment in torch.cuda.memory_snapshot() if tuple(segment["segment_pool_id"]) != (0, 0)
    )


def cost_row(mode: str, models: Models, options, batch: int) -> dict:
    """Seconds of a forward over 1 and γ + 1 tokens and a tree, and of a draft step, at a run's mean context."""
    seconds, context = clock(torch.device(options.device), mode), options.prompt + options.new_tokens // 2
    shapes = {
        "1": TokenTree.chain(0),
        str(options.length + 1): TokenTree.chain(options.length),
        f"tree {NODES}": tree_of_heads(),
    }
    target = runner_of(models, mode)
    found = forward_seconds(target, batch, context, shapes, seconds)
    draft = None
    if models.draft is not None:
        runner = specdec.ModelRunner(models.draft)
        runner.match_mode(target)
        draft = forward_seconds(runner, batch, context, {"1": TokenTree.chain(0)}, seconds)["1"]
    return {"forward_seconds": found, "draft_seconds": draft, "context": context}


def long_row(mode: str, models: Models, options, batch: int) -> dict:
    """`options.long_run` rounds of chains, call after call, and the memory before and after."""
    ids, mask = prompts(models, options, batch)
    drafter, note = drafter_of("chain", models, options)
    generator, rounds, began = specdec.SpeculativeGenerator(runner_of(models, mode), drafter), 0, time.perf_counter()
    call = lambda: generator.generate(ids, mask, max_new_tokens=options.new_tokens).stats.rows[0].rounds
    for _ in range(WARM_UP):
        call()
    before = memory(options.device)
    while rounds < options.long_run:
        rounds += call()
    after = memory(options.device)
    return {"note": note, "rounds": rounds, "before": before, "after": after, "seconds": [time.perf_counter() - began]}


def memory(device: str) -> dict:
    """Bytes `allocated` and `reserved` on the card, and `resident` of this process; None where unknown."""
    gc.collect()
    statm, cuda = Path("/proc/self/statm"), device == "cuda"
    return {
        "allocated": torch.cuda.memory_allocated() if cuda else None,
        "reserved": torch.cuda.memory_reserved() if cuda else None,
        "resident": int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else None,
    }


def roofline_row(options) -> dict:
    """Bytes that decoding moves, and bytes a second that the device reads or copies, whichever is more."""
    plain = set(kinds_of(vars(options))) == {NONE}
    where = ("meta" if options.model is None else "cpu") if plain else options.device  # int4 lies as the device wants
    card = card_of(load(options, device=where))
    limits = (
        ceilings(torch.device(options.device))
        if options.device == "cuda"
        else ceilings(torch.device("cpu"), megabytes=64, size=64)
    )
    return card | {"bandwidth": max(limits["read_bytes"], limits["copy_bytes"]), "ceilings": limits}


def measure(method: str, options) -> Iterator[dict]:
    """The rows of one method; a batch size that fails gives a row with an `error`. Raises NotAvailable."""
    if method == ROOFLINE:
        yield {"method": method, "batch": None} | roofline_row(options)
        return
    models = load(options)
    to_host(models, options)
    kind, mode = method.rsplit("-", 1)
    makers = {
        "transformers": partial(peer_row, method),
        COSTS: partial(cost_row, mode),
        LONG_RUN: partial(long_row, mode),
    }
    make = makers.get(kind, partial(our_row, kind, mode))
    batches = (
        options.batch[:1]
        if kind == LONG_RUN
        else [n for n in options.batch if n == 1]
        if method in (ASSISTED, LOOKUP)
        else options.batch
    )
    for batch in batches:
        gc.collect()
        if options.device == "cuda":  # nothing that an earlier row compiled, recorded or cached counts here
            torch.compiler.reset()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            row = make(models, options, batch)
            if any(len(tokens) != options.new_tokens for tokens in row.get("tokens", ())):
                raise ValueError(
                    f"not every row has {options.new_tokens} new tokens, so its speed would mean something else"
                )
        except NotAvailable:  # at no batch size
            raise
        except Exception as error:
            row = {"error": one_line(error)}
        yield {"method": method, "batch": batch} | row
