"""What the figures of an evaluation show: numbers by method, from its runs."""

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

from specdec.evaluation.methods import OURS
from specdec.evaluation.runs import Run, calls, pooled, throughput
from specdec.evaluation.summary import speedup, tokens_per_round
from specdec.report.intervals import Estimate, share
from specdec.report.stats import RoundStats

SIZES = ("num_tokens", "nodes")  # options of drafters that say how much they draft


def speedup_of(mine: Sequence[Run], plain: Sequence[Run]) -> Estimate:
    """Without an interval, a bar alone, where there are too few prompts."""
    value = throughput(mine) / throughput(plain)
    return speedup(mine, plain) or Estimate(value, value, value)


def tokens_of(mine: Sequence[Run], plain: Sequence[Run] = ()) -> Estimate | None:
    """Tokens per round, pooled; without an interval where there are too few prompts, None for methods without rounds.

    `plain` does not count; it is there so that `by_task` can take this for an estimate."""
    value = pooled(mine).tokens_per_round
    return None if value is None else tokens_per_round(mine) or Estimate(value, value, value)


def by_task(runs: Sequence[Run], baseline: str, estimate: Callable) -> dict[str, dict[str, Estimate | None]]:
    """Estimates by method and by task, of a task with several kinds by kind; None where there are too few prompts."""
    several = len({run.task for run in runs}) > 1
    label = lambda run: f"{run.task}\n{run.kind}" if several else run.kind
    found: dict[str, dict[str, Estimate | None]] = {}
    for method in shown_in(runs, baseline):
        for name in dict.fromkeys(map(label, runs)):
            here = [run for run in runs if label(run) == name]
            mine, plain = ([run for run in here if run.method == one] for one in (method, baseline))
            found.setdefault(method, {})[name] = estimate(mine, plain) if mine and plain else None
    return {method: of for method, of in found.items() if any(of.values())}


def by_batch(runs: Sequence[Run], baseline: str) -> dict[str, dict[int, Estimate]]:
    """Speedups by method and batch size."""
    found: dict[str, dict[int, Estimate]] = {}
    for method in shown_in(runs, baseline):
        for batch in sorted({run.batch for run in runs}):
            mine, plain = (
                [run for run in runs if (run.method, run.batch) == (one, batch)] for one in (method, baseline)
            )
            if mine and plain:
                found.setdefault(method, {})[batch] = speedup_of(mine, plain)
    return found


def ratios_of(runs: Sequence[Run], baseline: str) -> dict[str, list[float]]:
    """Of each method the speedup of every prompt, all its repeats and turns together."""
    found = {}
    for method in shown_in(runs, baseline):
        sums = []
        for name in (method, baseline):
            of_method = [run for run in runs if run.method == name]
            of_calls, clusters = calls(of_method), {run.call: run.cluster for run in of_method}
            key = lambda call, clusters=clusters: repr(clusters[call])
            sums.append({
                cluster: [sum(part) for part in zip(*(of_calls[call] for call in group), strict=True)]
                for cluster, group in groupby(sorted(of_calls, key=key), key)
            })  # fmt: skip
        mine, plain = sums
        found[method] = [n / s / (plain[one][0] / plain[one][1]) for one, (n, s) in mine.items() if one in plain]
    return found


def by_length(runs: Sequence[Run], baseline: str, families: Mapping[str, str]) -> dict[str, dict[int, Estimate]]:
    """Speedups by family and length, of families that drafted chains of several lengths."""
    found: dict[str, dict[int, Estimate]] = {}
    plain = [run for run in runs if run.method == baseline]
    for method, stats in drafted_of(runs).items():
        sizes = [(nodes, levels) for nodes, levels, _ in stats.uncut if nodes]
        if plain and method in families and all(nodes == levels for nodes, levels in sizes):
            mine = [run for run in runs if run.method == method]
            found.setdefault(families[method], {})[max(levels for _, levels in sizes)] = speedup_of(mine, plain)
    return {family: of for family, of in found.items() if len(of) > 1}


def by_budget(runs: Sequence[Run], families: Mapping[str, str]) -> dict[str, dict[float, Estimate | None]]:
    """Tokens per round by family and nodes that a round with a draft verifies, a mean, the root included.

    A method that shares its family with no other goes by its own name."""
    found: dict[str, dict[float, Estimate | None]] = {}
    drafted = drafted_of(runs)
    shared = [families.get(method) for method in drafted]
    for method, stats in drafted.items():
        sizes = [nodes for nodes, *_ in stats.uncut if nodes]
        family = families.get(method)
        name = family if family is not None and shared.count(family) > 1 else method
        mine = [run for run in runs if run.method == method]
        found.setdefault(name, {})[1 + sum(sizes) / len(sizes)] = tokens_of(mine)
    return found


def families_of(settings: Mapping[str, Any], model: str) -> dict[str, str]:
    """For each method of a model what its drafter is but for the size of its drafts; `settings` of a result.

    >>> families_of({"drafter": ["a/b", "early-exit:layers=2,num_tokens=3", "lookup:num_tokens=4"]}, "")
    {'b': 'b', 'early-exit:layers=2,num_tokens=3': 'early-exit:layers=2', 'lookup:num_tokens=4': 'lookup'}
    """
    if "models" in settings:
        methods = [one for of in settings["models"] if of["name"] == model for one in of["methods"]]
        named = [(one["name"], one["drafter"], [x for x in (one["tree"], one["rule"]) if x]) for one in methods]
    else:
        specs = settings.get("drafter") or ()
        named = [(spec.rpartition("/")[2] or spec, spec, []) for spec in ([specs] if isinstance(specs, str) else specs)]
    return {name: " ".join([_without_size(spec), *more]) for name, spec, more in named}


def _without_size(spec: str) -> str:
    """A drafter's name without its size and the folders of its path.

    >>> _without_size("dynamic:path=a/b,num_tokens=12,width=3")
    'dynamic:path=b,width=3'
    """
    place, _, given = spec.partition(":")
    options = [option.partition("=") for option in given.split(",") if option]
    kept = [f"{name}{equals}{value.rpartition('/')[2]}" for name, equals, value in options if name not in SIZES]
    return ":".join([place.rpartition("/")[2] or place, *([",".join(kept)] if kept else [])])


def drafted_of(runs: Sequence[Run]) -> dict[str, RoundStats]:
    """All rounds of every method that drafted."""
    found = {name: pooled([run for run in runs if run.method == name]) for name in shown_in(runs, OURS)}
    return {name: stats for name, stats in found.items() if sum(stats.proposed)}


def alpha_of(stats: RoundStats) -> float | None:
    """Accepted among the tokens that were tested, as if all positions were alike."""
    tried = [stats.trials(i) for i in range(1, max(stats.depths, default=0) + 1)]
    found = share(sum(s for s, _ in tried), sum(n for _, n in tried))
    return None if found is None else found.value


def shown_in(runs: Sequence[Run], baseline: str) -> list[str]:
    """The methods, without the baseline; those without rounds come last, so that colours are the same everywhere."""
    names = dict.fromkeys(run.method for run in runs if run.method != baseline)
    drafted = {run.method for run in runs if run.rounds}
    return sorted(names, key=lambda name: (name == OURS, name not in drafted))
