"""What quantised weights make of a round: plain decoding, verification and speculation, all kinds side by side.

    python -m scripts.bench_quantised_rounds --bars --json FILE       # the 8B shape, on a GPU
    python -m scripts.bench_quantised_rounds --kinds 16-bit int4 --lengths 3 5 7
    # seconds: checks every path, its figures mean nothing
    python -m scripts.bench_quantised_rounds --shape toy --device cpu --prompt 16 --new-tokens 12 --repeats 1

All targets are in memory at once and take turns: every pass decodes one text with each method of each kind. Weights are
random ones that count, and a target's first layers, quantised as it is, are an exactly right draft: a synthetic control
(scripts/generate_bench/models.py). Kinds are torchao's, rounded to the nearest; "int4-output" has an output layer in 4
bits too. Speeds are of whole calls, batch 1, prompt included; "over plain" is over the plain decoding of the 16-bit
target in the same passes. Forwards are timed by themselves (scripts/generate_bench/rounds.py): over one token, 6, 16,
and a tree of 64. "auto" lets `tree="auto"` choose; "chain N" are fixed lengths beside it. "self" drafts for the 16-bit
target by its own copy in 4 bits, which misses as often as it misses."""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

import specdec
from scripts.common.entry import add_bars_option, one_line, run_script
from scripts.common.quantise import GROUP, quantise
from scripts.generate_bench.methods import NODES, tree_of_heads
from scripts.generate_bench.models import SHAPES, build_shape
from scripts.generate_bench.rounds import clock, forward_seconds
from specdec import SpeculativeGenerator, TokenTree
from specdec.cli.results import hand_over, make_result
from specdec.drafters.early_exit import first_layers
from specdec.drafters.quantised_self import QuantisedSelfDrafter

SIXTEEN, OUTPUT = "16-bit", "int4-output"
KINDS = (SIXTEEN, "int8", "fp8", "int4", OUTPUT)
PLAIN, AUTO, SELF = "plain", "auto", "self"
FORWARDS = {
    "1": TokenTree.chain(0), "6": TokenTree.chain(5), "16": TokenTree.chain(15), f"tree {NODES}": tree_of_heads(),
}  # fmt: skip
LEAST = {"int8": 1.65, "fp8": 1.65, "int4": 2.0, OUTPUT: 2.15}
TREE_MOST = {"int8": 1.0, "fp8": 1.0, "int4": 0.9}


def make_pair(kind: str, options: argparse.Namespace):
    """A target of the shape and its first layers, both in weights of `kind`."""
    dtype = getattr(torch, options.dtype)
    target = build_shape(options.shape, options.draft_layers, "counting", dtype, options.device, options.seed).target
    target.generation_config.eos_token_id = None
    if kind != SIXTEEN:
        quantise(target, "int4" if kind == OUTPUT else kind, options.group, output=kind == OUTPUT)
    return target, first_layers(target, options.draft_layers)


def methods_of(kind: str, options: argparse.Namespace) -> tuple[specdec.ModelRunner, dict[str, SpeculativeGenerator]]:
    """The runner of a kind's target, and a generator for each method."""
    target, draft = make_pair(kind, options)
    runner = specdec.ModelRunner(target)
    chain = lambda length: SpeculativeGenerator(runner, specdec.ModelDrafter(draft, length))
    found = {PLAIN: SpeculativeGenerator(runner, None)} | {f"chain {n}": chain(n) for n in options.lengths}
    found[AUTO] = SpeculativeGenerator(runner, specdec.ModelDrafter(draft, max(options.lengths)), tree="auto")
    if kind == SIXTEEN:
        found[SELF] = SpeculativeGenerator(runner, QuantisedSelfDrafter(target, group=options.group))
    return runner, found


def timed(generator: SpeculativeGenerator, ids: Tensor, options: argparse.Namespace) -> tuple[float, object]:
    """Seconds of a call, and what it gave."""
    wait = torch.cuda.synchronize if options.device == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    out = generator.generate(ids, max_new_tokens=options.new_tokens)
    wait()
    return time.perf_counter() - began, out


def measure(options: argparse.Namespace, say: Callable[[str], None]) -> list[dict]:
    """A row for each kind and method, and one of forwards for each kind."""
    shape, seconds = SHAPES[options.shape], clock(torch.device(options.device))
    generator = torch.Generator().manual_seed(options.seed)
    ids = torch.randint(shape["vocab_size"], (1, options.prompt), generator=generator).to(options.device)
    rows, calls, texts = [], {}, {}
    for kind in options.kinds:
        try:
            runner, methods = methods_of(kind, options)
            for name, one in methods.items():
                for _ in range(options.warm):
                    _, out = timed(one, ids, options)
                calls[kind, name] = one
                texts[kind, name] = out.sequences[0, ids.shape[1] :].tolist()
            context = options.prompt + options.new_tokens // 2
            forwards = forward_seconds(runner, 1, context, FORWARDS, seconds)
            rows.append({"kind": kind, "method": "forwards", "forward_seconds": forwards, "error": None})
        except Exception as error:
            rows.append({"kind": kind, "method": None, "error": one_line(error)})
        say(f"{kind}: warm")
    taken = {key: list[float]() for key in calls}
    outs = {}
    for turn in range(options.repeats):
        for key in list(calls) if turn % 2 == 0 else list(reversed(calls)):
            once, outs[key] = timed(calls[key], ids, options)
            taken[key].append(once)
    base = taken.get((SIXTEEN, PLAIN))
    for (kind, name), passes in taken.items():
        stats = outs[kind, name].stats.pooled
        ratios = [one / mine for one, mine in zip(base, passes, strict=True)] if base else []
        rows.append({
            "kind": kind, "method": name, "seconds": passes, "error": None,
            "tokens_per_second": options.new_tokens / statistics.median(passes),
            "over_plain": statistics.median(ratios) if ratios else None, "ratios": ratios,
            "tokens_per_round": stats.tokens_per_round, "acceptance_rate": stats.acceptance_rate,
            "same_text_as_plain": texts[kind, name] == texts[kind, PLAIN],
            "shapes": sorted(set(stats.shapes)),
        })  # fmt: skip
    return rows


def bars_of(rows: Sequence[dict], judged: bool) -> list[dict]:
    """What is asked of the 8B shape on a GPU, and what was measured."""
    speeds = {(row["kind"], row["method"]): row for row in rows if row["error"] is None and row["method"] != "forwards"}
    forwards = {row["kind"]: row["forward_seconds"] for row in rows if row["method"] == "forwards"}
    found = []

    def add(what: str, value: float | None, **bound: float) -> None:
        low, high = bound.get("at_least", float("-inf")), bound.get("at_most", float("inf"))
        met = low <= value <= high if judged and value is not None else None
        found.append({"what": what, "value": value, **bound, "judged": judged, "met": met})

    for kind, least in LEAST.items():
        if (kind, PLAIN) in speeds:
            add(f"{kind}, plain over 16-bit plain", speeds[kind, PLAIN]["over_plain"], at_least=least)
    for kind, seconds in forwards.items():
        if kind in TREE_MOST:
            add(f"{kind}, 6 tokens over 1", seconds["6"] / seconds["1"], at_most=1.05)
            add(f"{kind}, 16 tokens over 1", seconds["16"] / seconds["1"], at_most=1.25)
            if SIXTEEN in forwards:
                name = f"tree {NODES}"
                ratio = seconds[name] / forwards[SIXTEEN][name]
                add(f"{kind}, a {name} over the 16-bit target's", ratio, at_most=TREE_MOST[kind])
    if ("int4", AUTO) in speeds:
        fixed = [row["tokens_per_second"] for (kind, name), row in speeds.items() if kind == "int4" and name != AUTO]
        add("int4, auto over the best fixed length", speeds["int4", AUTO]["tokens_per_second"] / max(fixed),
            at_least=0.97)  # fmt: skip
    return found


def table(rows: Sequence[dict]) -> str:
    """Lines to read."""
    lines = ["kind         method      tok/s  over plain  tokens/round  accepted  same text"]
    for row in rows:
        head = f"{row['kind']:<12} {row['method'] or '':<9}"
        if row["error"] is not None:
            lines.append(f"{head} {row['error']}")
        elif row["method"] == "forwards":
            times = "  ".join(f"{name}: {seconds * 1e3:.3f}" for name, seconds in row["forward_seconds"].items())
            lines.append(f"{head} ms  {times}")
        else:
            over = "-" if row["over_plain"] is None else f"{row['over_plain']:.3f}"
            share = "-" if row["acceptance_rate"] is None else f"{row['acceptance_rate']:.3f}"
            lines.append(f"{head} {row['tokens_per_second']:>8.1f} {over:>10}  {row['tokens_per_round']:>12.2f} "
                         f"{share:>9}  {row['same_text_as_plain']}")  # fmt: skip
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write or print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--lengths", nargs="+", type=int, default=[3, 5, 8, 12], help="of the chains")
    for name, value, what in (
        ("prompt", 128, "prompt tokens"), ("new-tokens", 256, "new tokens of a text"), ("repeats", 5, "passes"),
        ("warm", 2, "calls of each before"), ("draft-layers", 2, "layers of the draft"), ("seed", 0, "of weights"),
        ("group", GROUP, "inner positions that share a scale in 4 bits"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{what} (default: %(default)s)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="default: bfloat16 on a GPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result to FILE")
    add_bars_option(parser)
    options = parser.parse_args(arguments)
    counts = (*options.lengths, options.new_tokens, options.repeats, options.warm, options.draft_layers, options.group)
    if min(counts) < 1 or options.prompt < 2:
        parser.error(f"counts must be at least 1 and --prompt at least 2, got {counts} and {options.prompt}")
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    if options.device == "cpu":
        torch.set_num_threads(1)
    rows = measure(options, lambda line: print(line, flush=True))
    judged = options.device == "cuda" and options.shape == "llama-3.1-8b" and options.dtype == "bfloat16"
    bars = bars_of(rows, judged)
    print(table(rows))
    if options.bars:
        print("\n".join(f"{bar['what']}: {bar['value']} (met: {bar['met']})" for bar in bars))
    settings = {name: value for name, value in vars(options).items() if name not in ("json", "bars")}
    result = make_result("quantised_rounds", json.loads(json.dumps(settings)), rows, [], bars=bars)
    hand_over(result, None if options.json is None else str(options.json))


if __name__ == "__main__":
    run_script(main)
