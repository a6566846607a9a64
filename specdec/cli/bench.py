"""`specdec bench`: is drafting worth it for a user's own target, drafters and prompts?"""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from specdec.cli.command import (
    Command,
    add_model_options,
    dtype_and_device,
    new_parser,
    quiet_transformers,
    require_at_least_one,
)
from specdec.cli.kinds import describe_drafters, make_drafter
from specdec.cli.prompts import load_tokenizer
from specdec.cli.results import hand_over, make_result, read_result
from specdec.drafters import Drafter
from specdec.drafters.base import runners_of
from specdec.evaluation.figures.draw import save
from specdec.evaluation.measure import Bench, jobs_of, run_all
from specdec.evaluation.methods import OURS, PLAIN, Method, ours, peer_of, theirs
from specdec.evaluation.questions import Question, read_questions, shipped_questions, some_of
from specdec.evaluation.reporting import environment_of
from specdec.evaluation.runs import ALL, chosen, pooled, record_of, rounds_of
from specdec.evaluation.sampling import notes_on, settings_for, used_by_ours
from specdec.evaluation.summary import expected_speedup, summarise, table_of
from specdec.evaluation.texts import Texts
from specdec.generation.generators import AutoregressiveGenerator, SpeculativeGenerator
from specdec.loading import load_model
from specdec.model.runner import ModelRunner
from specdec.planning.costs import SIZES, measure_costs
from specdec.report.definitions import Definition, definitions, table_of_definitions
from specdec.report.headless import NOT_DRAWN, headless_pyplot

ABOUT = """Is drafting worth it for your pair?

Decodes each prompt with transformers' generate (plain, and assisted where it can draft the same way), with plain
decoding here, and with each drafter, side by side; then prints one table and one sentence a drafter, and draws tokens/s
beside what the parts of a round allow. Texts of temperature 0 are compared with transformers'."""


def parser(prog: str = "specdec bench") -> argparse.ArgumentParser:
    """The options and their defaults."""
    options = new_parser(prog, f"{ABOUT}\n\n{describe_drafters()}")
    add = options.add_argument
    add("--target", help="folder or hub id")
    add("--drafter", action="append", default=[], metavar="DRAFTER", help="see above; may be given again")
    prompts = "a prompt a line, or .jsonl / .json of texts, {prompt}, {messages} or {turns} (default: 8 that ship)"
    add("--prompts", metavar="FILE", help=prompts)
    add("--limit", type=int, help="prompts to take, evenly from the file (default: all)")
    add("--chat", action="store_true", help="texts are users' messages, for the tokenizer's chat template")
    add("--num-tokens", type=int, help="draft length γ of all drafters (default: their own)")
    add("--max-new-tokens", type=int, default=128)
    add("--temperature", type=float, nargs="+", default=[0.0], help="one or more; 0 (default) is greedy")
    add("--repeats", type=int, default=3, help="passes over all prompts")
    add("--seed", type=int, default=0)
    add("--definitions", action="store_true", help="print acceptance by the definitions of other projects too")
    add("--threads", type=int, help="of the CPU, for all methods (default: torch's)")
    add_model_options(add)
    add("--plot", default="specdec_bench.png", metavar="FILE", help="where the plot goes")
    add("--json", metavar="FILE", help="where the figures go (default: to standard output if that is no terminal)")
    add("--from", dest="source", metavar="FILE", help="print and draw an earlier --json FILE; nothing is measured")
    return options


def run(options: argparse.Namespace) -> None:
    """Measure, or read an earlier result; print the table and the verdicts, and draw the plot."""
    result = _measured(options) if options.source is None else read_result(options.source, "bench")
    print(table_of(result["methods"], PLAIN))
    print("\n" + "\n".join([*result["verdicts"], *result.get("notes", ())]))
    if options.definitions:
        for name, found in result.get("definitions", {}).items():
            print(f"\n{name}\n{table_of_definitions([Definition(**one) for one in found])}")
    plot(result, options.plot)
    if options.json is not None or options.source is None:
        hand_over(result, options.json)


def _measured(options: argparse.Namespace) -> dict:
    if options.target is None or not options.drafter:
        raise ValueError("--target and at least one --drafter are needed, or --from FILE")
    require_at_least_one(options, "num_tokens", "max_new_tokens", "repeats", "limit", "threads")
    if any(temperature < 0 for temperature in options.temperature):
        raise ValueError(f"--temperature must be >= 0, got {options.temperature}")
    for name in (options.plot, options.json or "."):
        if not Path(name).absolute().parent.is_dir():
            raise FileNotFoundError(f"the folder of {name} does not exist")
    dtype, device = dtype_and_device(options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    quiet_transformers()
    target = ModelRunner(load_model(options.target, dtype, device), mode=options.mode)
    tokenizer = load_tokenizer(options)
    drafters = {}
    for spec in options.drafter:
        name = spec if _name(spec) in drafters else _name(spec)
        drafters[name] = make_drafter(spec, target, num_tokens=options.num_tokens)
    methods: dict[str, Method] = {PLAIN: theirs(target.model), OURS: ours(AutoregressiveGenerator(target))}
    for spec, drafter in drafters.items():
        peer = peer_of(drafter)
        if peer is not None:
            methods[f"{spec} in transformers"] = theirs(target.model, **peer)
        methods[spec] = ours(SpeculativeGenerator(target, drafter))
    bench = Bench(
        methods, Texts(tokenizer, device, options.chat), partial(settings_for, target.model), options.max_new_tokens
    )
    runs = run_all(bench, jobs_of(_questions(options), options.temperature, options.repeats, options.seed))
    rows = summarise(runs, PLAIN)
    costs = _costs(target, drafters)
    for row in rows:
        if row["name"] in drafters:
            stats = pooled(chosen(runs, row["name"], row["kind"], row["temperature"]))
            row["expected_speedup"] = expected_speedup(stats, costs[row["name"]])
    shown = ("plot", "json", "source", "definitions")
    settings = {name: value for name, value in vars(options).items() if name not in shown}
    parts = {name: {"draft": cost.draft, "sizes": cost.sizes, "verify": cost.verify} for name, cost in costs.items()}
    verdicts = [_verdict(rows, name, t) for name in drafters for t in options.temperature]
    if target.dtype.itemsize < 4 and any(row["identical"] is False for row in rows):
        kind = str(target.dtype).removeprefix("torch.")
        verdicts.append(f"NO: the target runs in {kind}, where near-ties may go either way; --dtype float32 tells.")
    compared = {
        f"{name}, temperature {t:g}": [asdict(one) for one in definitions(rounds_of(chosen(runs, name, ALL, t)))]
        for name in drafters for t in options.temperature
    }  # fmt: skip
    used = {f"{t:g}": used_by_ours(target.model, bench.sampling(t)) for t in options.temperature}
    more = {"costs": parts, "verdicts": verdicts, "definitions": compared, "sampling": used}
    notes = [note for of_temperature in used.values() for note in notes_on(target.model, of_temperature)]
    return make_result("bench", settings, rows, [record_of(run) for run in runs], **more, notes=notes)


def _name(spec: str) -> str:
    """What the table calls a drafter: of a path only its last folder."""
    return spec.rpartition("/")[2] or spec


def _questions(options: argparse.Namespace) -> list[Question]:
    questions = shipped_questions(2) if options.prompts is None else read_questions(options.prompts)
    return some_of(questions, options.limit)


def _costs(target: ModelRunner, drafters: Mapping[str, Drafter]) -> dict:
    """Measured costs of each drafter's rounds, up to its largest draft."""
    found = {}
    for name, drafter in drafters.items():
        sizes = sorted({*SIZES, drafter.traits.max_tokens + 1})
        sizes = [size for size in sizes if size <= drafter.traits.max_tokens + 1]
        found[name] = measure_costs(target, next(runners_of(drafter), None), sizes)
    return found


def _verdict(rows: Sequence[dict], name: str, temperature: float) -> str:
    """One sentence: whether a drafter pays over transformers' generate and over plain decoding here, and why."""
    at = {row["name"]: row for row in rows if row["kind"] == ALL and row["temperature"] == temperature}
    row, plain = at[name], at[OURS]
    over_plain = row["tokens_per_second"] / plain["tokens_per_second"]
    low, high = row["speedup_interval"] or (0.0, math.inf)
    worth = "worth it" if low > 1 and over_plain > 1 else "not worth it" if high < 1 or over_plain < 1 else "undecided"
    known = f"95% interval over prompts {low:.2f} … {high:.2f}" if low else "too few prompts for an interval"
    said = (
        f"{name}, temperature {temperature:g}: {worth}. {row['speedup']:.2f}x transformers' generate ({known}), "
        f"{over_plain:.2f}x plain decoding here"
    )
    if row["overhead"] is not None:
        said += f": {row['tokens_per_round']:.2f} tokens a round for {row['overhead']:.2f} steps"
    if row["expected_speedup"] is not None:
        said += f"; its parts allow {row['expected_speedup']:.2f}x plain decoding"
    return said + "."


def plot(result: dict, path: str) -> None:
    """Draw tokens/s of every method beside what theory expects."""
    pyplot = headless_pyplot()
    if pyplot is None:
        print(NOT_DRAWN, file=sys.stderr)
        return
    from specdec.report.plots import plot_speeds

    temperatures = list(dict.fromkeys(row["temperature"] for row in result["methods"]))
    names = {row["name"] for row in result["methods"]}
    size = ((4 + 0.09 * max(map(len, names))) * len(temperatures), 1.8 + 0.4 * len(names))
    figure, panels = pyplot.subplots(1, len(temperatures), figsize=size, layout="constrained", squeeze=False)
    for axes, temperature in zip(panels[0], temperatures, strict=True):
        rows = [r for r in result["methods"] if r["temperature"] == temperature and r["kind"] == ALL]
        plain = next(row["tokens_per_second"] for row in rows if row["name"] == OURS)
        samples: dict[str, list[float]] = {}
        for record in result["records"]:
            if record["temperature"] == temperature:
                samples.setdefault(record["method"], []).append(record["new_tokens"] / record["seconds"])
        expected = {row["name"]: plain * row["expected_speedup"] for row in rows if row.get("expected_speedup")}
        plot_speeds(axes, samples, expected)
        axes.set_title("greedy" if temperature == 0 else f"temperature {temperature:g}")
    save(figure, Path(path), environment_of(result))
    print(f"plot: {path}")


COMMAND = Command(parser, run)
