"""tree="auto" beside the best fixed tree or chain of a sweep and plain decoding, on the pair of `scripts.bench_medusa`.

    # some ten minutes on one H200 to train, unless bench_medusa has run there; then some minutes a batch size
    python -m scripts.bench_auto_tree --output runs/medusa --stages-only
    python -m scripts.bench_auto_tree --output runs/medusa --json scripts/results/auto_tree_h200.json
    # a minute: checks the path, its figures mean nothing
    python -m scripts.bench_auto_tree --output runs/smoke --preset smoke --device cpu --batches 1 --passes 1

For every batch size and temperature, with Medusa heads and with the draft model: fixed trees and chains decode all
texts in turn; then the fastest of them is measured again, interleaved with auto and with plain decoding, after auto has
run until it captures nothing new. What is done is kept in the output folder and not run again, so a run may be cut by
`--seconds` and repeated. Options that are not listed below are those of `scripts.bench_medusa`.
"""

import argparse
import gc
import json
import statistics
import time
from itertools import cycle, islice, zip_longest

from medusa import MedusaDrafter, calibrated_tree
from scripts.bench_medusa import make_stages, opened, options_of, stage
from scripts.common.entry import run_script
from scripts.medusa_bench.models import calibration_ranks
from specdec import AutoregressiveGenerator, ModelDrafter, SpeculativeGenerator, optimal_tree
from specdec.cli.results import hand_over, make_result
from specdec.report.stats import pool
from specdec.report.terminal import table
from specdec.trees.tree import TokenTree

HEADS, DRAFT, PLAIN, AUTO = "Medusa", "draft model", "plain", "auto"
LENGTHS = {HEADS: (1, 2, 3, 5), DRAFT: (1, 2, 3, 5, 8)}
SIZES = (8, 16, 32, 64)
WARM_CALLS, MOST_WARM = 4, 24  # passes without a new capture after which auto is measured, and all passes
OF_BEST, OF_PLAIN, MEDUSA_GAIN = 0.98, 0.98, 1.15


def make_trees(preset, target, heads, draft, tokenizer, folder):
    """The best trees of each size, by the heads' ranks and by how often the draft model's children are accepted."""
    found, _ = calibration_ranks(preset, AutoregressiveGenerator(target), heads, tokenizer, folder)
    wide = SpeculativeGenerator(target, ModelDrafter(draft, tree=TokenTree.from_widths((6, 3, 2, 1))))
    stats = []
    for texts in texts_of(folder, "calibration", 4)[:4]:
        batch = tokenizer(texts, return_tensors="pt", padding=True).to(target.device)
        out = wide.generate(batch.input_ids, batch.attention_mask, max_new_tokens=preset["tokens"])
        stats.append(out.stats.pooled)
    acceptance = sorted(pool(stats).rank_acceptance, reverse=True)
    trees = {HEADS: [calibrated_tree(found, size) for size in SIZES]}
    trees[DRAFT] = [optimal_tree(acceptance, size, max_depth=6) for size in SIZES]
    return {"acceptance": acceptance} | {name: [tree.choices for tree in some] for name, some in trees.items()}


def texts_of(folder, part, batch):
    """Lists of `batch` prompts, of all kinds in turn, each prompt once; too few are repeated."""
    kinds = json.loads((folder / "prompts.json").read_text())[part].values()
    texts = [one["text"] for row in zip_longest(*kinds) for one in row if one is not None]
    count = max(1, len(texts) // batch)
    texts = list(islice(cycle(texts), count * batch))
    return [texts[start : start + batch] for start in range(0, count * batch, batch)][: max(1, 8 // batch)]


def shapes_of(trees):
    """{drafter: {name: tree}} of the sweep."""
    found = {}
    for name, lengths in LENGTHS.items():
        tree_of = lambda choices: TokenTree.from_choices([tuple(path) for path in choices])
        all_trees = [*map(TokenTree.chain, lengths), *map(tree_of, trees[name])]
        label = lambda tree: f"chain {tree.size - 1}" if tree.is_chain else f"tree {tree.size}"
        found[name] = {label(tree): tree for tree in all_trees}
    return found


class Runs:
    """Calls of methods over the same batches of texts, with the seconds and tokens of each."""

    def __init__(self, batches, tokenizer, device, temperature, tokens):
        encode = lambda texts: tokenizer(texts, return_tensors="pt", padding=True).to(device)
        self._batches, self._tokens, self.records = [encode(texts) for texts in batches], tokens, []
        self._options = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}

    def one_pass(self, name, generator, repeat):
        """Decode all texts; repeat None: to warm up."""
        for number, batch in enumerate(self._batches):
            began = time.perf_counter()
            options = {"do_sample": False, "seed": (repeat or 0) % 100 + 100 * number} | self._options
            out = generator.generate(batch.input_ids, batch.attention_mask, max_new_tokens=self._tokens, **options)
            seconds = time.perf_counter() - began
            if repeat is not None:
                stats = out.stats.pooled
                self.records.append(
                    {"method": name, "texts": number, "repeat": repeat, "new_tokens": int(out.lengths.sum()),
                     "seconds": seconds, "tokens_per_round": stats.tokens_per_round,
                     "shapes": stats.as_dict()["shapes"], "host": out.stats.host}
                )  # fmt: skip

    def speed(self, name, repeats):
        """Tokens a second of the named method in some repeats: of each batch of texts the median."""
        mine = [one for one in self.records if one["method"] == name and one["repeat"] in repeats]
        each = {number: [one for one in mine if one["texts"] == number] for number in range(len(self._batches))}
        middle = lambda of, what: statistics.median(one[what] for one in of)
        return sum(middle(some, "new_tokens") for some in each.values()) / sum(
            middle(some, "seconds") for some in each.values()
        )


def warm_up(runs, generator):
    """Run auto until it captures nothing new; returns the rounds that it holds."""
    held = lambda: generator._captured._rounds.count
    still, passes = 0, 0
    while still < WARM_CALLS and passes < MOST_WARM:
        before = held()
        runs.one_pass(AUTO, generator, None)
        still, passes = still + 1 if held() == before else 0, passes + 1
    return held()


def measure(plain, drafters, sweeps, runs, passes, repeats):
    """A row for each drafter: the sweep, its winner, and auto and plain decoding beside the winner."""
    rows, target = [], plain.target
    for _ in range(2):
        runs.one_pass(PLAIN, plain, None)
    for name, sweep in sweeps.items():
        generators = {shape: SpeculativeGenerator(target, drafters[name], tree=tree) for shape, tree in sweep.items()}
        for repeat in [None, None, *range(-passes, 0)]:
            for shape, generator in generators.items():
                runs.one_pass(f"{name}, {shape}", generator, repeat)
        speeds = {shape: runs.speed(f"{name}, {shape}", range(-passes, 0)) for shape in sweep}
        winner = max(speeds, key=speeds.get)
        auto = SpeculativeGenerator(target, drafters[name], tree="auto")
        captured = warm_up(runs, auto)
        three = {PLAIN: plain, winner: generators[winner], AUTO: auto}
        for repeat in range(repeats):
            for method in list(three)[:: 1 if repeat % 2 else -1]:
                runs.one_pass(f"{name}, beside: {method}", three[method], repeat)
        speed = {method: runs.speed(f"{name}, beside: {method}", range(repeats)) for method in three}
        each = [
            runs.speed(f"{name}, beside: {AUTO}", [n]) / runs.speed(f"{name}, beside: {winner}", [n])
            for n in range(repeats)
        ]
        shapes = [one["shapes"] for one in runs.records if one["method"] == f"{name}, beside: {AUTO}"][-1]
        rows.append(
            {"name": name, "winner": winner, "sweep": speeds, "tokens_per_second": speed, "captured": captured,
             "auto_over_winner": speed[AUTO] / speed[winner], "each": each, "shapes": shapes,
             "auto_over_plain": speed[AUTO] / speed[PLAIN], "winner_over_plain": speed[winner] / speed[PLAIN]}
        )  # fmt: skip
        del generators, auto, three
        gc.collect()  # graphs hold memory
    return rows


def bars_of(rows):
    """What is asked, and what was measured."""
    asked = []
    for row in rows:
        where = f"{row['name']}, batch {row['batch']}, temperature {row['temperature']:g}"
        asked.append((f"auto over the best fixed shape: {where}", row["auto_over_winner"], OF_BEST))
        asked.append((f"auto over plain: {where}", row["auto_over_plain"], OF_PLAIN))
        if (row["name"], row["batch"], row["temperature"]) == (HEADS, 4, 0.7):
            best = max(row["auto_over_plain"], row["winner_over_plain"])
            asked.append((f"the better of both over plain: {where}", best, MEDUSA_GAIN))
    return [{"what": what, "value": value, "at_least": least, "met": value >= least} for what, value, least in asked]


def show(rows, judged):
    """Print the tables."""
    lines = [
        [row["name"], str(row["batch"]), f"{row['temperature']:g}", row["winner"],
         f"{row['tokens_per_second'][PLAIN]:.0f}", f"{row['winner_over_plain']:.2f}", f"{row['auto_over_plain']:.2f}",
         f"{row['auto_over_winner']:.3f}", f"{min(row['each']):.3f} … {max(row['each']):.3f}", str(row["captured"]),
         ", ".join(sorted(row["shapes"], key=row["shapes"].get, reverse=True)[:2])]
        for row in rows
    ]  # fmt: skip
    header = ["drafter", "batch", "temp", "best fixed", "plain tok/s", "best/plain", "auto/plain", "auto/best",
              "passes", "captured", "auto ran"]  # fmt: skip
    missed = [f"NOT MET: {bar['what']}: {bar['value']:.3f} < {bar['at_least']:g}" for bar in judged if not bar["met"]]
    print("\n".join([*missed, f"{len(judged) - len(missed)} of {len(judged)} requirements met", ""]))
    print(table(header, lines))


def parse(arguments):
    """(Options of this script, those of `scripts.bench_medusa`)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--stages-only", action="store_true", help="train and calibrate, measure nothing")
    add("--batches", type=int, nargs="+", default=[1, 4, 16, 32], metavar="B")
    add("--temperatures", type=float, nargs="+", default=[0.0, 0.7], metavar="T")
    add("--passes", type=int, default=2, help="of the sweep over all texts")
    add("--beside", type=int, default=8, help="passes of winner, auto and plain")
    own, others = parser.parse_known_args(arguments)
    return own, options_of(others)


def main(arguments=None):
    """Run all stages, then every cell of the table that is not there yet."""
    began = time.perf_counter()
    own, options = parse(arguments)
    preset, device = opened(options)
    folder = options.output
    _, model, tokenizer, heads, draft = make_stages(options, preset, folder, device, options.seed)
    plain = AutoregressiveGenerator(model, mode=options.mode)
    trees = stage(folder, "trees", lambda: make_trees(preset, plain.target, heads, draft, tokenizer, folder))
    if own.stages_only:
        return
    sweeps = shapes_of(trees)
    largest = sweeps[HEADS][max((s for s in sweeps[HEADS] if s.startswith("tree")), key=lambda s: int(s.split()[1]))]
    drafters = {HEADS: MedusaDrafter(heads, largest), DRAFT: ModelDrafter(draft)}
    rows, records, complete = [], [], True
    for batch in own.batches:
        for temperature in own.temperatures:
            name = f"auto-{batch}-{temperature:g}-{options.mode}"
            if time.perf_counter() - began > options.seconds and not (folder / f"{name}.json").exists():
                complete = False
                continue
            runs = Runs(texts_of(folder, "evaluation", batch), tokenizer, device, temperature, preset["tokens"])
            cell = lambda runs=runs: {
                "rows": measure(plain, drafters, sweeps, runs, own.passes, own.beside), "records": runs.records,
            }  # fmt: skip
            found, about = stage(folder, name, cell), {"batch": batch, "temperature": temperature}
            rows += [row | about for row in found["rows"]]
            records += [record | about for record in found["records"]]
    judged = bars_of(rows)
    settings = vars(own) | {"preset": options.preset, **preset, "mode": options.mode, "seed": options.seed}
    result = make_result("auto tree", settings, rows, records, bars=judged, trees=trees, complete=complete)
    hand_over(result, None if options.json is None else str(options.json))
    show(rows, judged)


if __name__ == "__main__":
    run_script(main)
