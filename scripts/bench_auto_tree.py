"""tree="auto" beside the best fixed tree or chain of a sweep and plain decoding, on the pair of `scripts.bench_medusa`.

    # some ten minutes on one H200 to train, unless bench_medusa has run there; then some minutes a batch size
    python -m scripts.bench_auto_tree --output runs/medusa --stages-only
    python -m scripts.bench_auto_tree --output runs/medusa --json scripts/results/auto_tree_h200.json
    # a minute: checks the path, its figures mean nothing
    python -m scripts.bench_auto_tree --output runs/smoke --preset smoke --device cpu --batches 1 --passes 1

For every batch size and temperature, with Medusa heads and with the draft model: fixed trees and chains decode all
texts in turn, those near the best for longer; then the fastest of them is measured again, interleaved with auto and
with plain decoding, after auto has run until it captures nothing new. Speeds are those of median passes; as sampled
texts differ from pass to pass, the table shows the quartiles of auto over the fastest fixed shape too. What is done is
kept in the output folder and not run again, so a run may be cut by `--seconds` and repeated. Options that are not
listed below are those of `scripts.bench_medusa`.
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
from specdec.report.intervals import median
from specdec.report.stats import pool
from specdec.report.terminal import table
from specdec.trees.tree import TokenTree

HEADS, DRAFT, PLAIN, AUTO = "Medusa", "draft model", "plain", "auto"
LENGTHS = {HEADS: (1, 2, 3, 5), DRAFT: (1, 2, 3, 5, 8)}
SIZES = (8, 16, 32, 64)
NEAR = 0.9  # of the best speed: fixed shapes that are measured for longer
WARM_CALLS, MOST_WARM = 4, 24  # passes without a new capture after which auto is measured, and all passes
CALL = ("texts", "repeat", "new_tokens", "seconds", "tokens_per_round", "rounds")  # of the record of a call
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
    """Lists of `batch` prompts, two at least, of all kinds in turn, each prompt once; too few are repeated."""
    kinds = json.loads((folder / "prompts.json").read_text())[part].values()
    texts = [one["text"] for row in zip_longest(*kinds) for one in row if one is not None]
    count = min(max(2, len(texts) // batch), max(2, 8 // batch))
    texts = list(islice(cycle(texts), count * batch))
    return [texts[start : start + batch] for start in range(0, count * batch, batch)]


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
                     "rounds": max(len(row.emitted) for row in out.stats.rows),
                     "shapes": stats.as_dict()["shapes"], "host": out.stats.host}
                )  # fmt: skip

    def side_by_side(self, methods, least, seconds):
        """Passes of all methods in turn, back and forth: `least` of them, and more until they took so long each."""
        began, first = time.perf_counter(), 1 + max((one["repeat"] for one in self.records), default=-1)
        repeat = first
        while repeat < first + least or time.perf_counter() - began < seconds * len(methods):
            for name in list(methods)[:: 1 if repeat % 2 else -1]:
                self.one_pass(name, methods[name], repeat)
            repeat += 1

    def speed(self, name, repeat=None):
        """Tokens a second of the named method, in one pass or all: of each batch of texts the median of the passes'
        seconds for a token, of which the mean counts, so that texts of any length weigh alike."""
        taken = {}
        for one in self.records:
            if one["method"] == name and repeat in (None, one["repeat"]):
                taken.setdefault(one["texts"], []).append(one["seconds"] / one["new_tokens"])
        return 1 / statistics.fmean(map(statistics.median, taken.values()))

    def passes(self, name):
        """The passes of the named method."""
        return sorted({one["repeat"] for one in self.records if one["method"] == name})


def warm_up(runs, generator):
    """Run auto until it captures nothing new; returns the rounds that it holds."""
    held = lambda: generator._captured._rounds.count
    still, passes = 0, 0
    while still < WARM_CALLS and passes < MOST_WARM:
        before = held()
        runs.one_pass(AUTO, generator, None)
        still, passes = still + 1 if held() == before else 0, passes + 1
    return held()


def sweep_of(runs, generators, own):
    """{shape: tokens a second} of all fixed shapes; those within NEAR of the best run for longer."""
    for _ in range(2):
        for name, generator in generators.items():
            runs.one_pass(name, generator, None)
    runs.side_by_side(generators, own.passes, 0)
    best = max(map(runs.speed, generators))
    near = {name: generator for name, generator in generators.items() if runs.speed(name) > NEAR * best}
    runs.side_by_side(near, 0, own.sweep_seconds)
    return {name.partition(", ")[2]: runs.speed(name) for name in generators}


def believed(generator, batch):
    """What auto expects of the shapes that it knows: tokens, seconds and speed of each, and the loss in idle slots."""
    rows = generator.target.slots_for(batch)
    return [
        {"shapes": fit.beliefs(rows), "last": fit.last[rows].name if rows in fit.last else None,
         "idle": fit.idle[rows].per_token if rows in fit.idle else 0.0}
        for fit in generator._automatic._fits.values()
    ]  # fmt: skip


def measure(plain, drafters, sweeps, runs, own, batch):
    """A row for each drafter: the sweep, its winner, and auto and plain decoding beside the winner."""
    rows, target = [], plain.target
    for _ in range(2):
        runs.one_pass(PLAIN, plain, None)
    for name, sweep in sweeps.items():
        fixed = {f"{name}, {s}": SpeculativeGenerator(target, drafters[name], tree=tree) for s, tree in sweep.items()}
        speeds = sweep_of(runs, fixed, own)
        winner = max(speeds, key=speeds.get)
        auto = SpeculativeGenerator(target, drafters[name], tree="auto")
        captured = warm_up(runs, auto)
        three = {PLAIN: plain, winner: fixed[f"{name}, {winner}"], AUTO: auto}
        methods = {f"{name}, beside: {method}": generator for method, generator in three.items()}
        for method, generator in methods.items():
            runs.one_pass(method, generator, None)
        runs.side_by_side(methods, own.beside, own.beside_seconds / len(methods))
        speed = {method: runs.speed(f"{name}, beside: {method}") for method in three}
        of = lambda method, repeat, name=name: runs.speed(f"{name}, beside: {method}", repeat)
        each = [of(AUTO, n) / of(winner, n) for n in runs.passes(f"{name}, beside: {AUTO}")]
        shapes = [one["shapes"] for one in runs.records if one["method"] == f"{name}, beside: {AUTO}"][-1]
        rows.append(
            {"name": name, "winner": winner, "sweep": speeds, "tokens_per_second": speed, "captured": captured,
             "captured_beside": auto._captured._rounds.count - captured, "believed": believed(auto, batch),
             "auto_over_winner": speed[AUTO] / speed[winner], "each": each, "shapes": shapes,
             "auto_over_plain": speed[AUTO] / speed[PLAIN], "winner_over_plain": speed[winner] / speed[PLAIN]}
        )  # fmt: skip
        del fixed, auto, three, methods, generator
        gc.collect()  # graphs hold memory
    return rows


def columns(records):
    """The records of calls as one for each method and cell, with a list of each of its calls' numbers."""
    found = {}
    for one in records:
        about = {name: one[name] for name in ("method", "batch", "temperature")}
        kept = found.setdefault(tuple(about.values()), about | {name: [] for name in CALL} | {"shapes": {}})
        for name in CALL:
            kept[name].append(round(one[name], 6))
        for shape, rounds in one["shapes"].items():
            kept["shapes"][shape] = kept["shapes"].get(shape, 0) + rounds
        if one["host"] is not None:
            kept["host"] = one["host"]
    return list(found.values())


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


def quartiles(values):
    """The middle half of some values, as text."""
    middle = median(values)
    return f"{middle.low:.3f} … {middle.high:.3f}"


def show(rows, judged):
    """Print the tables."""
    lines = [
        [row["name"], str(row["batch"]), f"{row['temperature']:g}", row["winner"],
         f"{row['tokens_per_second'][PLAIN]:.0f}", f"{row['winner_over_plain']:.2f}", f"{row['auto_over_plain']:.2f}",
         f"{row['auto_over_winner']:.3f}", quartiles(row["each"]), str(len(row["each"])), str(row["captured"]),
         ", ".join(sorted(row["shapes"], key=row["shapes"].get, reverse=True)[:2])]
        for row in rows
    ]  # fmt: skip
    header = ["drafter", "batch", "temp", "best fixed", "plain tok/s", "best/plain", "auto/plain", "auto/best",
              "quartiles", "passes", "captured", "auto ran"]  # fmt: skip
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
    add("--passes", type=int, default=2, help="of each shape of the sweep over all texts, at least")
    add("--sweep-seconds", type=float, default=2, help="of each shape that is not far behind")
    add("--beside", type=int, default=8, help="passes of winner, auto and plain over all texts, at least")
    add("--beside-seconds", type=float, default=15, help="of these passes, for each line of the table")
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
            cell = lambda runs=runs, batch=batch: {
                "rows": measure(plain, drafters, sweeps, runs, own, batch), "records": runs.records,
            }  # fmt: skip
            found, about = stage(folder, name, cell), {"batch": batch, "temperature": temperature}
            rows += [row | about for row in found["rows"]]
            records += [record | about for record in found["records"]]
    judged = bars_of(rows)
    settings = vars(own) | {"preset": options.preset, **preset, "mode": options.mode, "seed": options.seed}
    result = make_result("auto tree", settings, rows, columns(records), bars=judged, trees=trees, complete=complete)
    hand_over(result, None if options.json is None else str(options.json))
    show(rows, judged)


if __name__ == "__main__":
    run_script(main)
