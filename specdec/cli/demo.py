"""`python -m specdec demo`: the shipped pair on held-out prompts, ours beside transformers, in one run."""

import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from specdec.drafters import Drafter, ModelDrafter
from specdec.generation.generators import AutoregressiveGenerator, SpeculativeGenerator
from specdec.info import environment
from specdec.planning.costs import measure_costs
from specdec.report.intervals import Estimate, share
from specdec.report.stats import GenerationStats, RoundStats, pool
from specdec.report.terminal import authors, coloured, table
from specdec.tiny_pair import TinyPair, load_tiny_pair

PLAIN, ASSISTED = "transformers generate", "transformers assisted"
OURS, SPECULATIVE = "specdec autoregressive", "specdec speculative"
TEMPERATURES, ALL = (0.0, 1.0), "all"
BELOW_THE_CURVE = (
    "The curve assumes that tokens are accepted independently with one α, and that a round takes γ draft steps and one "
    "verification; the points are whole calls, which also run the prompt, draw and accept tokens and cut their last "
    "draft short, so they tend to lie below it. Bars: 95% interval of α, quartiles of the speedup over prompts."
)


@dataclass(frozen=True, slots=True)
class Run:
    """One prompt decoded by one method; transformers' methods have no `stats`."""

    method: str
    kind: str
    temperature: float
    prompt: str
    new_tokens: tuple[int, ...]
    seconds: float
    stats: GenerationStats | None

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second of the whole call, prefill included."""
        return len(self.new_tokens) / self.seconds


def run(options) -> int:
    """Run every method on every prompt, side by side; print tokens, table, plot path and, last, one line of JSON."""
    _check(options)
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    pair = load_tiny_pair()
    generators = _generators(pair, options)
    methods, runs = (PLAIN, ASSISTED, *generators), _run_all(pair, generators, options)
    _show_text(pair, runs)
    kinds = (*pair.prompts, ALL)
    rows = [_summary(runs, method, kind, t) for t in TEMPERATURES for kind in kinds for method in methods]
    print(_table(rows))
    speed = {method: _throughput([r for r in runs if r.method == method]) for method in methods}
    over = {other: speed[SPECULATIVE] / speed[other] for other in methods if other != SPECULATIVE}
    ratios = ", ".join(f"{ratio:.2f}x {other}" for other, ratio in over.items())
    print(f"\n{SPECULATIVE}, pooled over everything: {ratios}")
    costs = measure_costs(generators[OURS].target, generators[SPECULATIVE].drafter.runner, (options.num_tokens + 1,))
    verify = costs.verify_at(options.num_tokens + 1)
    print(
        f"γ = {options.num_tokens}; on this machine a draft step costs {costs.draft:.2f} and a verification "
        f"{verify:.2f} autoregressive steps"
    )
    _plot(runs, rows, pair, costs, options)
    result = {"methods": rows, "pooled_speedup_over": over, "costs": {"draft": costs.draft, "verify": verify}}
    print(json.dumps(result | {"environment": environment()}))
    return 0


def _check(options) -> None:
    """Raise ValueError or FileNotFoundError naming an option that is out of range."""
    for name, low, high in (("prompts", 1, 8), ("max_new_tokens", 8, 512), ("num_tokens", 1, 16), ("threads", 1, 1024)):
        if not low <= getattr(options, name) <= high:
            raise ValueError(f"--{name.replace('_', '-')} must lie in {low} … {high}, got {getattr(options, name)}")
    if not Path(options.plot).absolute().parent.is_dir():
        raise FileNotFoundError(f"--plot {options.plot}: its folder does not exist")


def _run_all(pair: TinyPair, generators: dict, options) -> list[Run]:
    """Every prompt through every method, after a warm-up that does not count."""
    from tqdm import tqdm

    chosen = [(kind, prompt) for kind, prompts in pair.prompts.items() for prompt in prompts[: options.prompts]]
    jobs = [(kind, prompt, temperature) for temperature in TEMPERATURES for kind, prompt in chosen]
    _run_prompt(pair, generators, jobs[0], min(16, options.max_new_tokens), options.seed)
    runs = []
    for number, job in enumerate(tqdm(jobs, desc="prompts", file=sys.stderr)):
        runs += _run_prompt(pair, generators, job, options.max_new_tokens, options.seed + number)
    return runs


def _generators(pair: TinyPair, options) -> dict:
    """Our generators by method; transformers' assisted generation is set to draft the same γ in every round."""
    plain, assistant = AutoregressiveGenerator(pair.target), pair.draft.generation_config
    assistant.num_assistant_tokens = options.num_tokens
    assistant.num_assistant_tokens_schedule = "constant"
    assistant.assistant_confidence_threshold = 0.0
    drafters = {SPECULATIVE: ModelDrafter(pair.draft, options.num_tokens)} | {
        name: make(pair) for name, make in map(_named, options.drafter)
    }
    return {OURS: plain} | {name: SpeculativeGenerator(plain.target, drafter) for name, drafter in drafters.items()}


def _named(text: str) -> tuple[str, Callable[[TinyPair], Drafter]]:
    """The name and the function in "NAME=MODULE:FUNCTION"."""
    name, _, place = text.partition("=")
    module, _, function = place.partition(":")
    if not (name and module and function) or name in (PLAIN, ASSISTED, OURS, SPECULATIVE):
        raise ValueError(f"--drafter is NEW_NAME=MODULE:FUNCTION, got {text!r}")
    try:
        return name, getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--drafter {text}: {error}") from error


def _run_prompt(
    pair: TinyPair, generators: dict, job: tuple[str, str, float], max_new_tokens: int, seed: int
) -> list[Run]:
    """All methods on one prompt, one after the other, so that a slow moment of the machine hits them alike."""
    kind, prompt, temperature = job
    target: Any = pair.target  # whose `generate` transformers does not type
    ids = pair.tokenizer(prompt, return_tensors="pt").input_ids
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    runs = []
    for method in (PLAIN, ASSISTED, *generators):
        torch.manual_seed(seed)
        began = time.perf_counter()
        if method in generators:
            out = generators[method].generate(ids, max_new_tokens=max_new_tokens, seed=seed, **sampling)
            sequence, stats = out.sequences, out.stats
        else:
            assistant = {"assistant_model": pair.draft} if method == ASSISTED else {}
            given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": max_new_tokens}
            sequence, stats = target.generate(ids, **given, **sampling, **assistant), None
        seconds = time.perf_counter() - began
        runs.append(Run(method, kind, temperature, prompt, tuple(sequence[0, ids.shape[1] :].tolist()), seconds, stats))
    return runs


def _summary(runs: list[Run], method: str, kind: str, temperature: float) -> dict:
    """One line of the table: all tokens over all seconds, and the median and quartiles of the prompts' speedups."""
    chosen = [r for r in runs if r.method == method and r.temperature == temperature and kind in (r.kind, ALL)]
    partner = {(r.method, r.prompt): r for r in runs if r.temperature == temperature}
    baseline = [partner[OURS, r.prompt] for r in chosen]
    ratios = [r.tokens_per_second / partner[OURS, r.prompt].tokens_per_second for r in chosen]
    stats = [r.stats.pooled for r in chosen if r.stats]
    pooled = pool(stats) if stats else None
    seconds = [[r.stats.pooled.round_seconds for r in group if r.stats] for group in (chosen, baseline)]
    rounds, steps = ([x for x in group if x is not None] for group in seconds)  # None: a text of one round
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    return {
        "name": method,
        "kind": kind,
        "temperature": temperature,
        "tokens_per_second": _throughput(chosen),
        "tokens_per_round": pooled and pooled.tokens_per_round,
        "acceptance_rate": pooled and pooled.acceptance_rate,
        "overhead": statistics.median(rounds) / statistics.median(steps) if rounds and steps else None,
        "speedup": _throughput(chosen) / _throughput(baseline),
        "speedup_median": statistics.median(ratios),
        "speedup_quartiles": [quartiles[0], quartiles[2]],
        "identical": None if temperature else all(r.new_tokens == partner[PLAIN, r.prompt].new_tokens for r in chosen),
        "prompts": len(chosen),
    }


def _throughput(runs: list[Run]) -> float:
    return sum(len(r.new_tokens) for r in runs) / sum(r.seconds for r in runs)


def _table(rows: list[dict]) -> str:
    header = ["method", "prompts", "temp", "tok/s", "tokens per round", "acceptance rate", "overhead", "speedup"]
    number = lambda value: "-" if value is None else f"{value:.2f}"
    names = {True: "yes", False: "NO", None: "-"}
    measured = ("tokens_per_round", "acceptance_rate", "overhead", "speedup")
    lines = [
        [r["name"], r["kind"], f"{r['temperature']:g}", f"{r['tokens_per_second']:.1f}"]
        + [number(r[name]) for name in measured]
        + [names[r["identical"]]]
        for r in rows
    ]
    return table([*header, "identical to target greedy"], lines)


def _show_text(pair: TinyPair, runs: list[Run]) -> None:
    colour = sys.stdout.isatty()
    for temperature in TEMPERATURES:
        ours = (r for r in runs if r.method == SPECULATIVE and r.temperature == temperature)
        shown, stats = next((r, r.stats) for r in ours if r.stats)
        drafted = authors(stats.rows[0], len(shown.new_tokens))
        colours = " (green), the others by the target (blue)" if colour else ""
        print(f"--- temperature {temperature:g}: {sum(drafted)} of {len(drafted)} tokens written by the draft{colours}")
        print(coloured(pair.tokenizer, shown.prompt, shown.new_tokens, drafted, colour) + "\n")


def _pooled(runs: list[Run], kind: str, temperature: float) -> RoundStats:
    ours = [r for r in runs if r.method == SPECULATIVE and r.temperature == temperature and kind in (r.kind, ALL)]
    return pool([r.stats.pooled for r in ours if r.stats])


def _plot(runs: list[Run], rows: list[dict], pair: TinyPair, costs, options) -> None:
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed, so no plot was drawn (pip install 'specdec-lab[demo]')", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    from specdec.report.plots import SpeedupPoint, plot_acceptance_by_position, plot_speedup_against_theory

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    measured = {label: _pooled(runs, ALL, t) for label, t in {"greedy": 0.0, "temperature 1": 1.0}.items()}
    plot_acceptance_by_position(left, measured, {"temperature 1": pair.record["expected_acceptance"]})
    points = []
    for row in rows:
        if row["name"] == SPECULATIVE and row["kind"] != ALL:
            stats = _pooled(runs, row["kind"], row["temperature"])
            tried = [stats.trials(i) for i in range(1, options.num_tokens + 1)]
            alpha = share(sum(s for s, _ in tried), sum(n for _, n in tried))  # accepted among those tested
            speedup = Estimate(row["speedup_median"], *row["speedup_quartiles"])
            if alpha is not None:
                points.append(SpeedupPoint(f"{row['kind']}, T={row['temperature']:g}", alpha, speedup))
    verify = costs.verify_at(options.num_tokens + 1)
    plot_speedup_against_theory(right, points, options.num_tokens, costs.draft, verify, BELOW_THE_CURVE)
    figure.savefig(options.plot, dpi=120)
    pyplot.close(figure)
    print(f"plot: {options.plot}")
