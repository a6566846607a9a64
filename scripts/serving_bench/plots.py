"""Figures of a result of `scripts.bench_serving`. Needs matplotlib."""

from collections.abc import Sequence
from pathlib import Path

from scripts.serving_bench.experiments import CLIENTS, LOAD, REQUESTS, SWEEP
from scripts.serving_bench.methods import PLAIN
from specdec.report.headless import NOT_DRAWN, headless_pyplot


def draw(rows: Sequence[dict], folder: Path) -> list[str]:
    """Draw what there is into `folder` -> lines that say which files were written, or why none."""
    plt = headless_pyplot()
    if plt is None:
        return [NOT_DRAWN]
    folder.mkdir(parents=True, exist_ok=True)
    said = []
    for experiment, make in ((REQUESTS, _speeds), (LOAD, _load), (CLIENTS, _load), (SWEEP, _sweep)):
        mine = [row for row in rows if row["experiment"] == experiment and row.get("tokens_per_second")]
        if experiment == LOAD:  # a trace's own arrivals are no place on an axis
            mine = [row for row in mine if row["rate"] is not None]
        if mine:
            figure = make(plt, mine)
            figure.savefig(folder / f"{experiment}.png", dpi=120)
            plt.close(figure)
            said.append(f"drawn: {folder / f'{experiment}.png'}")
    return said


def _speeds(plt, rows: Sequence[dict]):
    """Throughput of each method, from the slowest to the fastest pass."""
    figure, axes = plt.subplots(figsize=(8, 0.5 * len(rows) + 1.2), layout="constrained")
    speeds = [row["tokens_per_second"] for row in rows]
    spread = [row["range"]["tokens_per_second"] for row in rows]
    errors = [[s - low for s, (low, _) in zip(speeds, spread, strict=True)],
              [high - s for s, (_, high) in zip(speeds, spread, strict=True)]]  # fmt: skip
    axes.barh([row["title"] for row in rows], speeds, xerr=errors, color="lightsteelblue")
    axes.invert_yaxis()
    axes.set_xlabel("useful tokens a second (line: slowest to fastest pass)")
    return figure


def _load(plt, rows: Sequence[dict]):
    """Throughput and latencies against the load."""
    name, label = ("rate", "requests a second") if rows[0]["experiment"] == LOAD else ("clients", "clients")
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.8), layout="constrained")
    panels = (("tokens_per_second", "tokens a second"), ("goodput", "goodput, requests a second"),
              ("first_token", "time to first token, s"), ("itl", "inter-token latency, s"))  # fmt: skip
    for title, mine in _by_title(rows).items():
        mine = sorted(mine, key=lambda row: row[name])
        for ax, (figure_name, _) in zip(axes, panels, strict=True):
            points = [(row[name], row[figure_name]) for row in mine if row.get(figure_name) is not None]
            if points and isinstance(points[0][1], dict):
                (line,) = ax.plot([x for x, _ in points], [y["p50"] for _, y in points], "o-", label=title)
                ax.plot([x for x, _ in points], [y["p99"] for _, y in points], ":", color=line.get_color())
            else:
                ax.plot([x for x, _ in points], [y for _, y in points], "o-", label=title)
    for ax, (_, text) in zip(axes, panels, strict=True):
        ax.set(xlabel=label, ylabel=text, ylim=(0, None))
    figure.suptitle("solid: median; dotted: p99", fontsize=9)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _sweep(plt, rows: Sequence[dict]):
    """Speed over the engine without drafts, by the number of rows."""
    plain = {row["batch"]: row["tokens_per_second"] for row in rows if row["method"] == PLAIN}
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for title, mine in _by_title(rows).items():
        mine = [row for row in mine if row["batch"] in plain and row["method"] != PLAIN]
        points = [(row["batch"], row["tokens_per_second"] / plain[row["batch"]]) for row in mine]
        if points:
            axes.plot(*zip(*sorted(points), strict=True), "o-", label=title)
    axes.axhline(1, color="gray", lw=0.8)
    axes.set(xscale="log", xlabel="requests at the same time", ylabel="speed over no draft", ylim=(0, None))
    axes.set_xticks(sorted(plain), [str(batch) for batch in sorted(plain)])
    axes.minorticks_off()
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _by_title(rows: Sequence[dict]) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for row in rows:
        found.setdefault(row["title"], []).append(row)
    return found
