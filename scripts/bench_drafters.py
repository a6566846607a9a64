"""Compare drafters, trees and the automatic policy on the shipped pair, against the figures that they are held to.

    python -m scripts.bench_drafters [--tokens 96] [--prompts 3] [--json scripts/results/drafters_cpu.json]
    python -m scripts.bench_drafters --device cuda --chains-only --kinds code --prompts 8 --tokens 256 \\
        --json scripts/results/drafters_h200.json

Per kind of held-out prompts: plain decoding, chains of every length, prompt lookup, suffix decoding (without a memory,
which would know a text the second time), the target's own weights in 4 and 8 bits (for their tokens in a round: a CPU
has no kernel for them), `tree="auto"`, and `tree="auto"` with a draft that is always wrong (a synthetic control: its
weights are noise). Then trees against chains of the same verify size, in tokens per round, which do not depend on this
machine. Every text is decoded by all methods one after the other, `--repeats` times, so that a slow moment hits all; a
method's speed is its tokens over the sum of its best times a text. About ten minutes on one core. On a GPU the pair
runs in bfloat16 and its rounds are captured as CUDA graphs; a chain's figure is then held to twice plain decoding's on
code.
"""

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers.utils import logging

import specdec
from scripts.common.entry import add_bars_option, run_script
from specdec.info import commit, environment
from specdec.planning.theory import expected_tree_tokens
from specdec.report.stats import RoundStats, pool
from specdec.report.terminal import table
from specdec.training.checkpoint import write_json
from specdec.trees.tree import TokenTree

LENGTHS = (2, 3, 4, 5, 6, 8, 10)
SIZES = (16, 32, 64)
PLAIN, AUTO, WRONG, LOOKUP = "plain", "auto", "auto, always wrong", "prompt lookup"
SUFFIX = "suffix decoding"
SELF = "quantised self {bits}-bit, chain 5"


def noise_model(model):
    """A model of the same shape with random weights."""
    twin = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator).to(parameter) * parameter.std())
    return twin


def encoded(pair, text: str) -> torch.Tensor:
    """`[1, S]`, where the models are."""
    return pair.tokenizer(text, return_tensors="pt").input_ids.to(pair.target.device)


def measure(methods: dict[str, Callable], pair, prompts: int, tokens: int, repeats: int, do_sample: bool) -> dict:
    """{kind: {method: {"tokens_per_second", "tokens_per_round", "shapes"}}}."""
    found = {}
    for kind, texts in pair.prompts.items():
        best: dict[tuple[str, int], float] = {}
        stats: dict[str, list[RoundStats]] = {name: [] for name in methods}
        counts: dict[str, int] = dict.fromkeys(methods, 0)
        for repeat in range(repeats):
            for number, text in enumerate(texts[:prompts]):
                ids = encoded(pair, text)
                for name, generator in methods.items():
                    began = time.perf_counter()
                    out = generator.generate(ids, max_new_tokens=tokens, do_sample=do_sample, seed=number)
                    seconds = time.perf_counter() - began
                    best[name, number] = min(seconds, best.get((name, number), seconds))
                    stats[name].append(out.stats.pooled)
                    counts[name] += int(out.lengths[0]) if repeat == 0 else 0
        spent = {name: sum(seconds for (method, _), seconds in best.items() if method == name) for name in methods}
        found[kind] = {
            name: {
                "tokens_per_second": counts[name] / spent[name],
                "tokens_per_round": pool(stats[name]).tokens_per_round,
                "shapes": pool(stats[name]).as_dict()["shapes"],
            }
            for name in methods
        }
        speeds = {name: row["tokens_per_second"] for name, row in found[kind].items()}
        over = ", ".join(f"{name} {speed / speeds[PLAIN]:.2f}x" for name, speed in speeds.items())
        print(f"{kind}: {over}", flush=True)
    return found


def tree_rounds(target, pair, tree: TokenTree, prompts: int, tokens: int) -> RoundStats:
    """The rounds of the draft model on `tree`, pooled over all kinds, at temperature 1."""
    generator = specdec.SpeculativeGenerator(target, specdec.ModelDrafter(pair.draft, tree=tree))
    texts = [text for kind in pair.prompts.values() for text in kind[:prompts]]
    sampled = lambda text, n: generator.generate(encoded(pair, text), max_new_tokens=tokens, do_sample=True, seed=n)
    return pool([sampled(text, n).stats.pooled for n, text in enumerate(texts)])


def compare_trees(target, pair, prompts: int, tokens: int) -> list[dict]:
    """Optimal trees beside chains of the same size; acceptance by rank is measured on rounds of a wide tree."""
    wide = tree_rounds(target, pair, TokenTree.from_widths((6, 3, 2, 1)), prompts, tokens)
    acceptance = sorted(wide.rank_acceptance, reverse=True)
    print("acceptance by rank: " + ", ".join(f"{share:.3f}" for share in acceptance), flush=True)
    rows = []
    for size in SIZES:
        tree = specdec.optimal_tree(acceptance, size, max_depth=12)
        on_tree, on_chain = (
            tree_rounds(target, pair, shape, prompts, tokens).tokens_per_round
            for shape in (tree, TokenTree.chain(size - 1))
        )
        expected, ratio = expected_tree_tokens(tree, [acceptance]), on_tree / on_chain
        rows.append({
            "size": size, "parents": tree.parents, "acceptance": acceptance, "expected_tree": expected,
            "tree": on_tree, "chain": on_chain, "ratio": ratio,
        })  # fmt: skip
        print(
            f"{size} nodes: tree {on_tree:.2f} (expected {expected:.2f}), chain {on_chain:.2f}: {ratio:.2f}x",
            flush=True,
        )
    return rows


def bars(speeds: dict, trees: Sequence[dict], device: str = "cpu") -> list[dict]:
    """What is asked, and what was measured."""
    asked = []
    if trees:
        best = max(row["ratio"] for row in trees)
        asked.append(("tokens per round, best optimal tree over the chain of its size", best, 1.2))
    if lookup := speeds.get("editing", {}).get(LOOKUP):
        asked.append(("prompt lookup, tokens per round on editing prompts", lookup["tokens_per_round"], 2.0))
    for kind, found in speeds.items():
        speed = {name: row["tokens_per_second"] for name, row in found.items()}
        fixed = max(value for name, value in speed.items() if name.startswith("chain"))
        if device == "cuda" and kind == "code":
            asked.append(("the best fixed chain over plain, code", fixed / speed[PLAIN], 2.0))
        if AUTO in speed:
            asked.append((f"auto over the best fixed chain, {kind}", speed[AUTO] / fixed, 0.97))
            wrong = speed[WRONG] / speed[PLAIN]
            asked.append((f"auto with an always wrong draft over plain, {kind}", wrong, 0.95))
    return [{"what": what, "value": value, "at_least": least, "met": value >= least} for what, value, least in asked]


def methods_of(pair, chains_only: bool) -> dict[str, Callable]:
    """{name: generator}, all over one target."""
    plain = specdec.AutoregressiveGenerator(pair.target)
    speculative = lambda drafter, **options: specdec.SpeculativeGenerator(plain.target, drafter, **options)
    methods = {PLAIN: plain} | {f"chain {n}": speculative(specdec.ModelDrafter(pair.draft, n)) for n in LENGTHS}
    if not chains_only:
        methods[LOOKUP] = speculative(specdec.PromptLookupDrafter(6, 2))
        methods[SUFFIX] = speculative(specdec.SuffixDrafter(12, factor=4.0, tree=True))
        for bits, group in ((4, 32), (8, None)):  # no larger group of 4 bits fills the pair's width of 192
            drafter = specdec.QuantisedSelfDrafter(plain.target, 5, bits=bits, group=group)
            methods[SELF.format(bits=bits)] = speculative(drafter)
        methods[AUTO] = speculative(specdec.ModelDrafter(pair.draft), tree="auto")
        methods[WRONG] = speculative(specdec.ModelDrafter(noise_model(pair.draft)), tree="auto")
    return methods


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=96, help="new tokens a text")
    parser.add_argument("--prompts", type=int, default=3, help="texts of each kind")
    parser.add_argument("--repeats", type=int, default=3, help="times every method decodes every text")
    parser.add_argument("--kinds", nargs="+", metavar="KIND", help="kinds of prompts (default: all)")
    parser.add_argument("--chains-only", action="store_true", help="plain decoding and chains, nothing else")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured to FILE")
    add_bars_option(parser)
    options = parser.parse_args(arguments)
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    pair = specdec.load_tiny_pair(dtype, options.device)
    kinds = options.kinds or list(pair.prompts)
    if unknown := sorted(set(kinds) - set(pair.prompts)):
        parser.error(f"--kinds are of {', '.join(pair.prompts)}, got {', '.join(unknown)}")
    pair = replace(pair, prompts={kind: pair.prompts[kind] for kind in kinds})
    methods, began = methods_of(pair, options.chains_only), time.perf_counter()
    speeds = measure(methods, pair, options.prompts, options.tokens, options.repeats, do_sample=False)
    target = methods[PLAIN].target
    trees = [] if options.chains_only else compare_trees(target, pair, options.prompts, options.tokens)
    judged, verdict = bars(speeds, trees, options.device), {True: "met", False: "NOT MET"}
    if judged and options.bars:
        lines = [[b["what"], f">= {b['at_least']:g}", f"{b['value']:.2f}", verdict[b["met"]]] for b in judged]
        print("\n" + table(["figure", "asked", "measured", ""], lines))
    if options.json:
        settings = {name: getattr(options, name) for name in ("tokens", "prompts", "repeats", "device")}
        settings |= {"kinds": kinds, "dtype": str(dtype).removeprefix("torch.")}
        result = {
            "schema": 1, "environment": environment(), "git_sha": commit(), "settings": settings, "speeds": speeds,
            "trees": trees, "bars": judged, "wall_seconds": time.perf_counter() - began,
        }  # fmt: skip
        write_json(result, options.json)


if __name__ == "__main__":
    run_script(main)
