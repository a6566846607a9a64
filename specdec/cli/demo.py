"""`specdec demo`: the shipped pair on held-out prompts, ours beside transformers, in one run."""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from specdec.cli.command import Command, new_parser, quiet_transformers
from specdec.cli.kinds import make_drafter
from specdec.cli.results import hand_over, make_result
from specdec.drafters import ModelDrafter
from specdec.evaluation.figures.draw import save
from specdec.evaluation.measure import Bench, jobs_of, run_all
from specdec.evaluation.methods import OURS, PLAIN, Method, ours, theirs
from specdec.evaluation.questions import shipped_questions
from specdec.evaluation.reporting import environment_of
from specdec.evaluation.runs import ALL, Run, chosen, pooled, record_of, throughput
from specdec.evaluation.sampling import settings_for
from specdec.evaluation.summary import summarise, table_of
from specdec.evaluation.texts import Texts
from specdec.generation.generators import AutoregressiveGenerator, SpeculativeGenerator
from specdec.planning.costs import Costs, measure_costs
from specdec.report.comparison_plots import caption, palette
from specdec.report.headless import NOT_DRAWN, headless_pyplot
from specdec.report.intervals import Estimate, share
from specdec.report.plots import SpeedupPoint
from specdec.report.terminal import authors, coloured
from specdec.tiny_pair import TinyPair, load_tiny_pair

ASSISTED, SPECULATIVE = "transformers assisted", "specdec speculative"
TEMPERATURES = (0.0, 1.0)
BELOW_THE_CURVE = (
    "The curve assumes that tokens are accepted independently with one α, and that a round takes γ draft steps and one "
    "verification; the points are whole calls, which also run the prompt, draw and accept tokens and cut their last "
    "draft short, so they tend to lie below it. Bars: 95% interval of α, quartiles of the speedup over prompts."
)


def parser(prog: str = "specdec demo") -> argparse.ArgumentParser:
    """The options and their defaults."""
    options = new_parser(prog, "The shipped pair on held-out prompts, beside transformers, with a table and a plot.")
    add = options.add_argument
    add("--prompts", type=int, default=3, help="prompts of each kind (default 3, at most 8)")
    add("--max-new-tokens", type=int, default=64)
    add("--num-tokens", type=int, default=3, help="draft length γ, also for transformers' assisted generation")
    threads = "threads for all methods; the shipped matrices are too small to gain from more"
    add("--threads", type=int, default=1, help=threads)
    add("--plot", default="specdec_demo.png", metavar="FILE", help="where the plot goes")
    add("--json", metavar="FILE", help="where the figures go (default: to standard output if that is no terminal)")
    add("--seed", type=int, default=0)
    drafter = "one more method of that name (may be given again); DRAFTER as for specdec bench"
    add("--drafter", action="append", default=[], metavar="NAME=DRAFTER", help=drafter)
    return options


def run(options: argparse.Namespace) -> None:
    """Run every method on every prompt, side by side; print tokens, table and plot path, and write the figures."""
    _check(options)
    torch.set_num_threads(options.threads)
    quiet_transformers()
    pair = load_tiny_pair()
    generators = _generators(pair, options)
    assisted = {
        "assistant_model": pair.draft, "num_assistant_tokens": options.num_tokens,
        "num_assistant_tokens_schedule": "constant", "assistant_confidence_threshold": 0.0,
    }  # fmt: skip
    methods: dict[str, Method] = {PLAIN: theirs(pair.target), ASSISTED: theirs(pair.target, **assisted)}
    methods |= {name: ours(generator) for name, generator in generators.items()}
    sampling = partial(settings_for, pair.target)
    bench = Bench(methods, Texts(pair.tokenizer), sampling, options.max_new_tokens)
    runs = run_all(bench, jobs_of(shipped_questions(options.prompts), TEMPERATURES, seed=options.seed))
    _show_text(pair, runs)
    rows = summarise(runs)
    print(table_of(rows))
    speed = {method: throughput([r for r in runs if r.method == method]) for method in methods}
    over = {other: speed[SPECULATIVE] / speed[other] for other in methods if other != SPECULATIVE}
    ratios = ", ".join(f"{ratio:.2f}x {other}" for other, ratio in over.items())
    print(f"\n{SPECULATIVE}, pooled over everything: {ratios}")
    drafter = generators[SPECULATIVE].drafter
    costs = measure_costs(generators[OURS].target, drafter.runner, (options.num_tokens + 1,))
    verify = costs.verify_at(options.num_tokens + 1)
    print(
        f"γ = {options.num_tokens}; on this machine a draft step costs {costs.draft:.2f} and a verification "
        f"{verify:.2f} autoregressive steps"
    )
    more = {"pooled_speedup_over": over, "costs": {"draft": costs.draft, "verify": verify}}
    result = make_result("demo", vars(options), rows, [record_of(run) for run in runs], **more)
    _plot(runs, rows, pair, costs, options, environment_of(result))
    hand_over(result, options.json)


def _check(options: argparse.Namespace) -> None:
    """Raise ValueError or FileNotFoundError naming an option that is out of range."""
    for name, low, high in (("prompts", 1, 8), ("max_new_tokens", 8, 512), ("num_tokens", 1, 16), ("threads", 1, 1024)):
        if not low <= getattr(options, name) <= high:
            raise ValueError(f"--{name.replace('_', '-')} must lie in {low} … {high}, got {getattr(options, name)}")
    for name in ("plot", "json"):
        given = getattr(options, name)
        if given is not None and not Path(given).absolute().parent.is_dir():
            raise FileNotFoundError(f"--{name} {given}: its folder does not exist")


def _generators(pair: TinyPair, options: argparse.Namespace) -> dict:
    """Our generators by method."""
    plain = AutoregressiveGenerator(pair.target)
    found = {OURS: plain, SPECULATIVE: SpeculativeGenerator(plain.target, ModelDrafter(pair.draft, options.num_tokens))}
    for given in options.drafter:
        name, _, spec = given.partition("=")
        if not (name and spec) or name in (PLAIN, ASSISTED, *found):
            raise ValueError(f"--drafter is NEW_NAME=DRAFTER, got {given!r}")
        found[name] = SpeculativeGenerator(plain.target, make_drafter(spec, plain.target))
    return found


def _show_text(pair: TinyPair, runs: Sequence[Run]) -> None:
    colour = sys.stdout.isatty()
    for temperature in TEMPERATURES:
        shown = chosen(runs, SPECULATIVE, ALL, temperature)[0]
        assert shown.rounds is not None
        prompt = pair.prompts[shown.kind][int(shown.prompt)]
        drafted = authors(shown.rounds, shown.new_tokens)
        colours = " (green), the others by the target (blue)" if colour else ""
        print(f"--- temperature {temperature:g}: {sum(drafted)} of {len(drafted)} tokens written by the draft{colours}")
        print(coloured(pair.tokenizer, prompt, shown.tokens, drafted, colour) + "\n")


def _plot(runs: Sequence[Run], rows: Sequence[dict], pair: TinyPair, costs: Costs, options: argparse.Namespace,
          environment: str) -> None:  # fmt: skip
    pyplot = headless_pyplot()
    if pyplot is None:
        print(NOT_DRAWN, file=sys.stderr)
        return
    from specdec.report.plots import plot_acceptance_by_position, plot_speedup_against_theory

    names = {"greedy": 0.0, "temperature 1": 1.0}
    measured = {name: pooled(chosen(runs, SPECULATIVE, ALL, temperature)) for name, temperature in names.items()}
    verify = costs.verify_at(options.num_tokens + 1)
    with palette():
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
        caption(figure, environment)  # before labels find their places
        plot_acceptance_by_position(left, measured, {"temperature 1": pair.record["expected_acceptance"]})
        points = _points(runs, rows, options.num_tokens)
        plot_speedup_against_theory(right, points, options.num_tokens, costs.draft, verify, BELOW_THE_CURVE)
        save(figure, Path(options.plot), environment)
    print(f"plot: {options.plot}")


def _points(runs: Sequence[Run], rows: Sequence[dict], num_tokens: int) -> list[SpeedupPoint]:
    """Of every kind of prompts and temperature the speedup at its acceptance."""
    points = []
    for row in rows:
        if row["name"] == SPECULATIVE and row["kind"] != ALL:
            stats = pooled(chosen(runs, SPECULATIVE, row["kind"], row["temperature"]))
            tried = [stats.trials(i) for i in range(1, num_tokens + 1)]
            alpha = share(sum(s for s, _ in tried), sum(n for _, n in tried))  # accepted among those tested
            speedup = Estimate(row["speedup_median"], *row["speedup_quartiles"])
            if alpha is not None:
                points.append(SpeedupPoint(f"{row['kind']}, T={row['temperature']:g}", alpha, speedup))
    return points


COMMAND = Command(parser, run)
