"""Tables and the plot of `scripts.bench_cpu`, from a result alone, so that a saved one prints again."""

import sys

from scripts.cpu_bench.options import note_of
from scripts.generate_bench.report import audit_lines, cell
from specdec.report.headless import NOT_DRAWN, headless_pyplot
from specdec.report.terminal import table


def main_table(result: dict) -> str:
    """Speeds of all methods."""
    compared = {entry["method"]: entry for entry in result["audit"]}
    own = {entry["method"]: entry for entry in result["sampled"]}
    lines = []
    for row in result["methods"]:
        if "error" in row:
            lines.append([row["name"], "failed", *["-"] * 5])
            continue
        speeds = [
            "{:.1f} ({:.1f} … {:.1f})".format(row[f"tokens_per_{clock}_second"], *row[f"{clock}_quartiles"])
            for clock in ("wall", "cpu")
        ]
        entry, found = compared.get(row["name"]), own.get(row["name"])
        same = "-" if entry is None else f"{entry['identical']} of {entry['texts']}"
        whose = f"{'yes' if found['own'] else 'NO'} ({found['gap']:.3f})" if found and "own" in found else "-"
        rounds = cell(row["tokens_per_round"])
        lines.append([row["name"], *speeds, rounds, cell(row["peak_bytes"], ".2f", 2**-30), same, whose])
    reference = result["audit"][0]["reference"] if result["audit"] else "the reference"
    header = ["method", "tok/s, wall (quartiles)", "tok/s, CPU time", "tokens per round", "peak GiB",
              f"greedy texts as {reference}", "samples the target's own (gap)"]  # fmt: skip
    return table(header, lines)


def ratio_table(result: dict) -> str:
    """Ratios of speeds with their intervals, both clocks in a line."""
    by_pair: dict[tuple[str, str], dict] = {}
    for row in result["ratios"]:
        by_pair.setdefault((row["above"], row["below"]), {})[row["clock"]] = row
    lines = [[f"{above} / {below}", *(_ratio(rows[clock]) for clock in ("wall", "cpu"))]
             for (above, below), rows in by_pair.items()]  # fmt: skip
    return table(["speed of one over the other", "wall (95% interval)", "CPU time"], lines)


def _ratio(row: dict) -> str:
    low, high = row["interval"] or (None, None)
    return f"{row['value']:.2f} ({cell(low)} … {cell(high)})"


def report(result: dict) -> str:
    """All that a result shows."""
    lines = [note_of(result["settings"]), *_versions(result["versions"]), "", main_table(result), "",
             ratio_table(result), ""]  # fmt: skip
    lines += [f"not measured: {row['name']}: {row['error']}" for row in result["methods"] if "error" in row]
    for entry in result["sampled"]:
        if entry["failed"]:
            lines.append(f"{entry['method']}: {entry['failed']} sampled calls failed, the first: {entry['error']}")
        if not entry.get("own", True):
            lines.append(f"{entry['method']}: sampled text is not the target's own: {entry['tokens']} tokens, gap "
                         f"{entry['gap']:.3f}, p {entry['p_value']:.1g}")  # fmt: skip
    return "\n".join([*lines, *audit_lines(result["audit"])])


def _versions(versions: dict[str, dict]) -> list[str]:
    return [f"{engine}: " + ", ".join(f"{name} {version}" for name, version in found.items() if version)
            for engine, found in versions.items()]  # fmt: skip


def plot(result: dict, path: str) -> None:
    """Speeds of all methods by both clocks."""
    pyplot = headless_pyplot()
    if pyplot is None:
        print(NOT_DRAWN, file=sys.stderr)
        return
    from specdec.report.plots import plot_speeds

    names = [row["name"] for row in result["methods"] if "error" not in row]
    figure, panels = pyplot.subplots(1, 2, figsize=(13, 1.8 + 0.35 * len(names)), layout="constrained", sharey=True)
    for axes, field, title in zip(panels, ("seconds", "cpu_seconds"), ("wall clock", "CPU time"), strict=True):
        samples: dict[str, list[float]] = {name: [] for name in names}
        for record in result["records"]:
            samples[record["method"]].append(record["new_tokens"] / record[field])
        plot_speeds(axes, samples)
        axes.set_title(title)
    panels[0].invert_yaxis()  # each panel inverted the axis that both share
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    print(f"plot: {path}")
