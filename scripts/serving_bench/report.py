"""Tables of a result of `scripts.bench_serving`."""

from collections.abc import Sequence

from scripts.generate_bench.report import bar_table
from scripts.serving_bench.experiments import CLIENTS, IDLE, INT8, LOAD, PREFIX, REQUESTS, SWEEP
from scripts.serving_bench.methods import PLAIN
from specdec.report.terminal import table

WHERE = {REQUESTS: "rows", CLIENTS: "clients", LOAD: "rate", SWEEP: "batch"}
HEADER = ["method", "tok/s", "least … most", "over plain", "req/s", "first token p50/p90/p99", "gap p50/p99",
          "itl p50/p90/p99", "latency p50/p99", "goodput", "steps", "tokens/round", "accepted"]  # fmt: skip


def cell(value: float | None, form: str = ".3g") -> str:
    """A number, or "-"."""
    return "-" if value is None else format(value, form)


def _quantiles(found: dict | None, *names: str) -> str:
    """Milliseconds of some percentiles."""
    return "-" if found is None else "/".join(f"{1000 * found[name]:.4g}" for name in names)


def method_line(row: dict, plain: float | None) -> list[str]:
    """One line of the table of methods."""
    speed, spread = row.get("tokens_per_second"), row.get("range", {}).get("tokens_per_second")
    return [
        row["title"], cell(speed, ".0f"), "-" if spread is None else f"{spread[0]:.0f} … {spread[1]:.0f}",
        cell(speed / plain if speed is not None and plain else None, ".2f"), cell(row.get("requests_per_second")),
        _quantiles(row.get("first_token"), "p50", "p90", "p99"), _quantiles(row.get("gap"), "p50", "p99"),
        _quantiles(row.get("itl"), "p50", "p90", "p99"), _quantiles(row.get("latency"), "p50", "p99"),
        cell(row.get("goodput")), cell(row.get("steps"), ".0f"), cell(row.get("tokens_per_round"), ".2f"),
        cell(row.get("acceptance_rate"), ".2f"),
    ]  # fmt: skip


def compared_tables(rows: Sequence[dict]) -> list[str]:
    """A table for each cell of the experiments that compare methods; times in milliseconds."""
    found, places = [], dict.fromkeys((row["experiment"], _place(row)) for row in rows if row["experiment"] in WHERE)
    for experiment, place in places:
        mine = [row for row in rows if (row["experiment"], _place(row)) == (experiment, place)]
        plain = next((row.get("tokens_per_second") for row in mine if row["method"] == PLAIN), None)
        found += [f"{experiment}, {WHERE[experiment]} {place}; times in ms", "",
                  table(HEADER, [method_line(row, plain) for row in mine]), ""]  # fmt: skip
        found += [f"{row['title']}: {row['error']}" for row in mine if row.get("error")]
        found += [_said_of_texts(row) for row in mine if row.get("texts") and row["method"] != PLAIN] + [""]
    return found


def _place(row: dict) -> str:
    value = row.get(WHERE.get(row["experiment"], ""))
    return "of the trace" if value is None else f"{value:g}"


def _said_of_texts(row: dict) -> str:
    texts = row["texts"]
    return f"{row['title']}: {texts['equal']} of {texts['of']} greedy texts as those of {texts['reference']}"


def roofline_lines(found: dict | None) -> list[str]:
    """What the roofline is made of."""
    if found is None:
        return []
    return [
        f"roofline of the engine without drafts: {found['least_seconds']:.4g} s at least for {found['steps']} steps, "
        f"{found['seconds']:.4g} s taken: {found['share']:.3f} of it",
        f"  {found['row_steps']} tokens decoded, {found['prompt_tokens']} of prompts, keys of "
        f"{found['kv_tokens_read']} tokens read; {found['bandwidth'] / 1e12:.3g} TB/s, "
        f"{found['peak'] / 1e12:.4g} TFLOP/s measured",
        "",
    ]


def special_lines(rows: Sequence[dict]) -> list[str]:
    """Shared prefixes, 8-bit pages, idle time."""
    lines = []
    for row in (row for row in rows if row["experiment"] not in WHERE):
        name = f"{row['experiment']}, {row['title']}" if row.get("title") else row["experiment"]
        if row.get("error"):
            lines.append(f"{name}: {row['error']}")
        elif row["experiment"] == PREFIX:
            lines.append(
                f"{name}: {row['requests']} requests share {row['prefix']} tokens: {row['prompt_tokens_computed']} "
                f"prompt tokens computed, {row['prompt_tokens_least']} at least; at most {row['pages']} pages at once, "
                f"{row['pages_least']} at least; {row['seconds']:.3g} s"
            )
        elif row["experiment"] == INT8:
            once = row["rows_at_once"]
            lines.append(
                f"{name}: {row['pages']:.3f} times as many pages at head dim {row['head_dim']}; {once['int8']} rows "
                f"at once, {once['None']} without"
            )
        elif row["experiment"] == IDLE:
            lines.append(
                f"{name}: {row['rows']} rows, {row['steps']} steps: no kernel ran for {row['idle']:.1%} of "
                f"{row['span_seconds']:.3g} s; of the {row['seconds']:.3g} s without the profiler "
                f"{row['idle_of_unwatched']:.1%}"
            )
    return lines


def report(result: dict, bars: bool) -> str:
    """All that a result shows."""
    rows = result["methods"]
    lines = [*compared_tables(rows), *roofline_lines(result["roofline"]), *special_lines(rows)]
    if result["skipped"]:
        lines.append(f"skipped, the time was up: {', '.join(result['skipped'])}")
    return "\n".join([*lines, *(["", bar_table(result["bars"])] if bars else [])])
