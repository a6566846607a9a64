"""What the calls of `scripts.bench_cpu` say: speeds, and ratios of calls side by side."""

import statistics
from collections.abc import Iterable, Sequence

from scripts.cpu_bench.methods import Method
from specdec.report.intervals import geometric_mean, median

CLOCKS = {"wall": "seconds", "cpu": "cpu_seconds"}  # names of the clocks -> fields of records


def rows_of(methods: Sequence[Method], records: Sequence[dict], failed: dict[str, str]) -> list[dict]:
    """A row for each method: medians over calls with their quartiles, or the error."""
    rows = []
    for method in methods:
        mine = [record for record in records if record["method"] == method.name]
        row = {"name": method.name, "engine": method.engine, "kind": method.kind, "temperature": 0.0}
        if not mine:
            rows.append(row | {"error": failed.get(method.name, "not measured")})
            continue
        for clock, field in CLOCKS.items():
            found = median([record["new_tokens"] / record[field] for record in mine])
            row |= {f"tokens_per_{clock}_second": found.value, f"{clock}_quartiles": [found.low, found.high]}
        rounds = sum(record["rounds"] for record in mine)
        row |= {
            "calls": len(mine),
            "tokens_per_round": sum(record["new_tokens"] for record in mine) / rounds,
            "peak_bytes": max((r["peak_bytes"] for r in mine if r["peak_bytes"]), default=None),
        }
        rows.append(row)
    return rows


def ratios_of(pairs: Iterable[tuple[str, str]], records: Sequence[dict]) -> list[dict]:
    """Speed of one method over that of another, by each clock, from calls with the same prompt in the same pass.

    The value is the geometric mean over prompts of the mean over passes; its 95% interval is Student's on the
    logarithms of the prompts, None for fewer than three."""
    calls = {(r["method"], r["prompt"], r["repeat"]): r for r in records}
    rows = []
    for above, below in pairs:
        for clock, field in CLOCKS.items():
            by_prompt: dict[int, list[float]] = {}
            for (method, prompt, repeat), mine in calls.items():
                other = calls.get((below, prompt, repeat))
                if method == above and other is not None:
                    speeds = [record["new_tokens"] / record[field] for record in (mine, other)]
                    by_prompt.setdefault(prompt, []).append(speeds[0] / speeds[1])
            if not by_prompt:
                continue
            means = [statistics.geometric_mean(ratios) for ratios in by_prompt.values()]
            found = geometric_mean(means)
            rows.append({
                "above": above, "below": below, "clock": clock, "value": statistics.geometric_mean(means),
                "interval": found and [found.low, found.high], "prompts": len(means),
            })  # fmt: skip
    return rows
