"""Learned drafters beside Medusa heads that were trained for the same time, on the target of `scripts.bench_medusa`.

    # two calls of ten minutes on one H200; the output folder stays between them
    python -m scripts.bench_learned --output runs/medusa --seconds 400
    python -m scripts.bench_learned --output runs/medusa --seconds 480 --json scripts/results/learned_h200.json
    # a minute: checks the path, its figures mean nothing
    python -m scripts.bench_learned --output runs/smoke --preset smoke --device cpu

Stages: corpus and tokenizer, target, heads and calibration of their tree as in bench_medusa, whose folder serves too;
then for every learned drafter some timed steps, the training, the best static tree; then the evaluation. How many steps
a drafter is trained follows from the heads' seconds by the rule of `scripts/learned_bench/training.py`.
Held-out prompts are decoded one at a time by all methods one after the other, in passes over all prompts; of each
prompt the pass of median time counts. Nothing new is begun after `--seconds`; the same command goes on. Options that
are not listed below are those of `scripts.bench_medusa`.
"""

import argparse
import json
import time
from itertools import islice, zip_longest

from medusa import MedusaGenerator
from scripts import bench_medusa
from scripts.bench_medusa import MEDUSA, bar_table, make_stages, opened, options_of
from scripts.common.entry import run_script
from scripts.common.side_by_side import ALL, OURS, differences, records, run_all, show, summarise
from scripts.learned_bench.kinds import KINDS, chain, grown, marginals
from scripts.learned_bench.presets import PRESETS
from scripts.learned_bench.training import heads_seconds, make_timing, make_trained, make_tree, steps_for
from scripts.medusa_bench.models import TREE_SIZE
from specdec import AutoregressiveGenerator, SpeculativeGenerator
from specdec.cli.results import hand_over, make_result
from specdec.training.checkpoint import refuse_other_settings
from specdec.trees.tree import TokenTree

TEMPERATURES = _, WARM = (0.0, 0.7)
CHAIN, TREE, FASTER, MEDUSA_LENGTH = 1.15, 1.4, 2.0, 2.6  # what is asked; the last is bench_medusa's of 30 November
GROWN, CONDITIONAL, CODE = 1.15, 1.3, 2.5  # of DSpark


def prompts_of(folder, part, count=None):
    """`{kind: [text, …]}`, `count` of all kinds in turn (None: all)."""
    kinds = json.loads((folder / "prompts.json").read_text())[part]
    turns = zip_longest(*([(kind, one["text"]) for one in some] for kind, some in kinds.items()))
    found = {}
    for kind, text in islice((one for turn in turns for one in turn if one is not None), count):
        found.setdefault(kind, []).append(text)
    return found


def stages_within(seconds, began):
    """`bench_medusa.stage`, but SystemExit instead of beginning a stage so many seconds after the time `began`."""

    def stage(folder, name, make):
        if not (folder / f"{name}.json").exists() and time.perf_counter() - began > seconds:
            raise SystemExit(f"{name} was not begun within --seconds {seconds:g}; run the same command again to go on")
        return bench_medusa.stage(folder, name, make)

    return stage


def make_learned(names, own, preset, folder, model, tokenizer, target, heads, seed, stage):
    """Train what is not there yet; returns ({name: its records}, {method: drafter})."""
    budget, trained, methods = heads_seconds(preset, heads["log"]), {}, {}
    asked = [tokenizer(text).input_ids for texts in prompts_of(folder, "calibration").values() for text in texts]
    for name in names:
        kind = KINDS[name]
        timing = stage(folder, f"{kind.key}-timing", lambda k=kind: make_timing(k, preset, own, model, folder, seed))
        steps = steps_for(budget, timing)
        said = f"{budget:.1f} s of the heads / {timing['step_seconds']:.4f} s a step = {steps} steps"
        print(f"{name}: {said}", flush=True)
        make = lambda k=kind, steps=steps: make_trained(k, preset, own, model, folder, seed, steps)
        training = stage(folder, f"{kind.key}-training", make)
        module = kind.load(target, folder / kind.key)
        found, tree = None, None
        if kind.wide is not None:
            found = stage(
                folder, f"{kind.key}-tree",
                lambda k=kind, m=module: make_tree(k, m, own, target, asked, preset["tokens"]),
            )  # fmt: skip
            tree = TokenTree.from_choices([tuple(path) for path in found["choices"]])
        methods |= kind.methods(name, module, own, tree)
        over = training["training_seconds"] / budget
        trained[name] = {"timing": timing, "training": training, "tree": found, "seconds_over_heads": over}
        print(f"{name}: trained for {over:.3f} of the heads' time", flush=True)
    return trained, methods


def bars_of(rows, names, own):
    """What is asked of each kind, and what was measured; batch 1, greedy and over all prompts where nothing is said."""
    of = {(row["method"], row["kind"], row["temperature"]): row for row in rows}
    length = lambda method, temperature=0.0: of[method, ALL, temperature]["tokens_per_round"]
    longest, judged = max(own["chains"]), [("Medusa, tokens per round", length(MEDUSA), MEDUSA_LENGTH)]

    def fastest(name, kind=ALL):
        speeds = {key[0]: row["over_ours"]["pooled"] for key, row in of.items() if key[1:] == (kind, 0.0)}
        return max((speed, method) for method, speed in speeds.items() if method.startswith(f"{name} "))

    if "EAGLE-3" in names:
        for method, asked in ((chain("EAGLE-3", longest), CHAIN), (grown("EAGLE-3", own), TREE)):
            judged.append((f"{method} over Medusa, tokens per round", length(method) / length(MEDUSA), asked))
        speed, method = fastest("EAGLE-3")
        judged.append((f"the fastest of EAGLE-3 ({method}) over plain decoding", speed, FASTER))
    if "DSpark" in names:
        ours, alone = chain("DSpark", longest), marginals("DSpark", longest)
        tree = f"DSpark best-first tree of {max(own['grown'])}"
        if "EAGLE-3" in names:
            theirs = chain("EAGLE-3", longest)
            judged.append((f"{ours} over {theirs}, tokens per round", length(ours) / length(theirs), 1.0))
        judged.append((f"{tree} over {ours}, tokens per round", length(tree) / length(ours), GROWN))
        warm = length(ours, WARM) / length(alone, WARM)
        judged.append((f"{ours} over {alone}, tokens per round at {WARM}", warm, CONDITIONAL))
        if ("code", 0.0) in {key[1:] for key in of}:
            speed, method = fastest("DSpark", "code")
            judged.append((f"the fastest of DSpark ({method}) over plain decoding, code", speed, CODE))
    return [{"what": what, "value": value, "at_least": asked, "met": value >= asked} for what, value, asked in judged]


def parse(arguments):
    """(Options of this script, those of `scripts.bench_medusa`)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--learned", nargs="+", choices=KINDS, default=list(KINDS), help="default: all")
    own, others = parser.parse_known_args(arguments)
    return own, options_of(others)


def main(arguments=None):
    """Run all stages, then the evaluation; see the module's docstring."""
    began = time.perf_counter()
    chosen, options = parse(arguments)
    preset, device = opened(options)
    own, folder, seed = PRESETS[options.preset], options.output, options.seed
    refuse_other_settings(folder / "learned.json", {name: own[name] for name in own if name != "repeats"})
    stage = stages_within(options.seconds, began)
    stages, model, tokenizer, heads, _ = make_stages(options, preset, folder, device, seed, stage, with_draft=False)
    print(f"target: held-out loss {stages['target']['held_out_loss']}", flush=True)
    ours = AutoregressiveGenerator(model, mode=options.mode)
    learned, drafters = make_learned(
        chosen.learned, own, preset, folder, model, tokenizer, ours.target, stages["heads"], seed, stage
    )
    tree = TokenTree.from_choices([tuple(path) for path in stages["calibration"]["choices"]])
    methods = {OURS: ours.generate, MEDUSA: MedusaGenerator(ours.target, heads, tree).generate}
    methods |= {name: SpeculativeGenerator(ours.target, drafter).generate for name, drafter in drafters.items()}
    prompts, repeats = prompts_of(folder, "evaluation", own["prompts"]), options.repeats or own["repeats"]
    runs, complete = run_all(
        methods, tokenizer, prompts, TEMPERATURES, preset["tokens"], repeats,
        folder / f"learned-{options.mode}.jsonl", device, seed, began + options.seconds, batches=False,
    )  # fmt: skip
    if not any(run["temperature"] == 0 for run in runs):
        raise SystemExit("no prompt was decoded within --seconds; run the same command again to go on")
    rows = summarise(runs, methods, TEMPERATURES, prompts)
    found = differences(model, tokenizer, runs, prompts, [(name, OURS) for name in methods if name != OURS])
    judged = bars_of(rows, chosen.learned, own)
    show([row for row in rows if row["kind"] == ALL], found)
    if options.bars:
        print("\n" + bar_table(judged))
    spent = sum(run["seconds"] for run in runs)
    print(f"evaluation: {spent:.1f} s of decoding" + ("" if complete else "; it is NOT complete"))
    settings = {
        "preset": options.preset, **preset, **own, "repeats": repeats, "mode": options.mode, "seed": seed,
        "temperatures": TEMPERATURES, "tree_size": TREE_SIZE, "learned": chosen.learned,
    }  # fmt: skip
    result = make_result(
        "learned drafters", settings, rows, records(runs), bars=judged, differences=found, complete=complete,
        stages=stages, trained=learned, heads_seconds=heads_seconds(preset, stages["heads"]["log"]),
    )  # fmt: skip
    hand_over(result, str(options.json or folder / f"learned-{options.mode}.json"))


if __name__ == "__main__":
    run_script(main)
