"""The lines of a table: all tokens over all seconds of a method, speedups over a baseline, and their intervals."""

import statistics
from collections.abc import Mapping, Sequence

from specdec.evaluation.methods import OURS, PLAIN
from specdec.evaluation.runs import ALL, Run, calls, pooled, throughput
from specdec.planning.costs import Costs
from specdec.report.bootstrap import ratio_interval
from specdec.report.intervals import Estimate, median
from specdec.report.stats import RoundStats
from specdec.report.terminal import table

EQUAL = {True: "yes", False: "NO", None: "-"}  # how tables write whether texts are the target's own


def summarise(runs: Sequence[Run], baseline: str = OURS) -> list[dict]:
    """The table's lines: for each model, task, batch size, temperature and kind of prompts each method."""
    places = list(dict.fromkeys((r.model, r.task, r.batch, r.temperature) for r in runs))
    rows = []
    for place in places:
        here = [r for r in runs if (r.model, r.task, r.batch, r.temperature) == place]
        kinds = list(dict.fromkeys(r.kind for r in here))
        for kind in [*kinds, ALL] if len(kinds) > 1 else [ALL]:
            of_kind = [r for r in here if kind in (r.kind, ALL)]
            methods = {name: [r for r in of_kind if r.method == name] for name in dict.fromkeys(r.method for r in here)}
            if not methods.get(baseline):
                raise ValueError(f"nothing was decoded by {baseline}, the baseline of all speedups")
            rows += [_summary(name, kind, methods, baseline) for name in methods]
    return rows


def _summary(name: str, kind: str, methods: Mapping[str, Sequence[Run]], baseline: str) -> dict:
    mine, found = methods[name], pooled(methods[name])
    partners, own = calls(methods[baseline]), calls(mine)
    ratios = [_speed(own[call]) / _speed(partners[call]) for call in own]
    middle = median(ratios)
    pairs = [[r.rounds.round_seconds for r in group if r.rounds] for group in (mine, methods.get(OURS, ()))]
    rounds, steps = ([x for x in group if x is not None] for group in pairs)  # None: a text of one round
    plain = methods.get(PLAIN) or methods[baseline]
    texts = {(r.call, r.kind, r.prompt): r.digest for r in plain}
    same = all(r.digest == texts[r.call, r.kind, r.prompt] for r in mine)
    first = mine[0]
    return {
        "name": name,
        "kind": kind,
        "temperature": first.temperature,
        "model": first.model,
        "task": first.task,
        "batch": first.batch,
        "tokens_per_second": throughput(mine),
        "tokens_per_round": found.tokens_per_round,
        "tokens_per_round_interval": _bounds(tokens_per_round(mine)),
        "acceptance_rate": found.acceptance_rate,
        "overhead": statistics.median(rounds) / statistics.median(steps) if rounds and steps else None,
        "speedup": throughput(mine) / throughput(methods[baseline]),
        "speedup_median": middle.value,
        "speedup_quartiles": [middle.low, middle.high],
        "speedup_interval": _bounds(speedup(mine, methods[baseline])),
        "reused": sum({r.call: r.reused for r in mine}.values()),
        "identical": None if first.temperature else same,
        "prompts": len({r.cluster for r in mine}),
        "calls": len(own),
    }


def speedup(runs: Sequence[Run], baseline: Sequence[Run], level: float = 0.95) -> Estimate | None:
    """Tokens a second of a method over those of a baseline, with an interval over prompts; calls are paired."""
    sums: dict[tuple, list[float]] = {}
    for group, (tokens, seconds) in ((runs, (0, 1)), (baseline, (2, 3))):
        clusters, of_calls = {r.call: r.cluster for r in group}, calls(group)
        for call, cluster in clusters.items():
            parts = sums.setdefault(cluster, [0.0] * 4)
            parts[tokens] += of_calls[call][0]
            parts[seconds] += of_calls[call][1]
    columns = list(zip(*sums.values(), strict=True))
    return ratio_interval([columns[0], columns[3]], [columns[1], columns[2]], level)


def tokens_per_round(runs: Sequence[Run]) -> Estimate | None:
    """Tokens per round, pooled, with a 95% interval over prompts; None for methods without rounds."""
    sums: dict[tuple, list[int]] = {}
    for run in runs:
        if run.rounds:
            parts = sums.setdefault(run.cluster, [0, 0])
            parts[0] += sum(run.rounds.emitted)
            parts[1] += run.rounds.rounds
    columns = list(zip(*sums.values(), strict=True))
    return ratio_interval([columns[0]], [columns[1]]) if columns else None


def table_of(rows: Sequence[dict], baseline: str = OURS) -> str:
    """The lines of `summarise` as text; columns that say the same in all lines are left out."""
    number = lambda value: "-" if value is None else f"{value:.2f}"
    columns = {"method": [r["name"] for r in rows]}
    for name in ("model", "task", "batch"):
        if len({r[name] for r in rows}) > 1:
            columns[name] = [str(r[name]) for r in rows]
    columns |= {
        "prompts": [r["kind"] for r in rows], "temp": [f"{r['temperature']:g}" for r in rows],
        "tok/s": [f"{r['tokens_per_second']:.1f}" for r in rows],
    }  # fmt: skip
    for title, name in (("tokens per round", "tokens_per_round"), ("acceptance rate", "acceptance_rate"),
                        ("overhead", "overhead"), (f"speedup over {baseline}", "speedup")):  # fmt: skip
        columns[title] = [number(r[name]) for r in rows]
    columns["its quartiles"] = ["{:.2f} … {:.2f}".format(*r["speedup_quartiles"]) for r in rows]
    if any(r["reused"] for r in rows):
        columns["reused"] = [str(r["reused"]) for r in rows]
    columns["identical to target greedy"] = [EQUAL[r["identical"]] for r in rows]
    return table(list(columns), [list(line) for line in zip(*columns.values(), strict=True)])


def expected_speedup(stats: RoundStats, costs: Costs) -> float | None:
    """The speedup that the parts of a round allow: tokens a round over the costs of drafting and verifying it.

    Drafting is what a draft model's steps cost, one per level, and nothing for other drafters."""
    if not stats.rounds or stats.tokens_per_round is None:
        return None
    sizes, depths = (statistics.fmean(values) for values in (stats.proposed, stats.depths))
    return stats.tokens_per_round / (depths * costs.draft + costs.verify_at(max(1, round(sizes) + 1)))


def _speed(call: tuple[int, float]) -> float:
    return call[0] / call[1]


def _bounds(found: Estimate | None) -> list[float] | None:
    return None if found is None else [found.low, found.high]
