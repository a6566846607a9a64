"""Results as text: tables in Markdown and LaTeX, every definition of acceptance, and why a method is slower."""

from collections.abc import Mapping, Sequence
from typing import Any

from specdec.evaluation.methods import OURS
from specdec.evaluation.runs import ALL, Run, rounds_of, run_of, said_of
from specdec.evaluation.summary import EQUAL, speedup, summarise
from specdec.report.definitions import definitions
from specdec.report.markup import latex_table, markdown_table

Table = tuple[str, list[str], list[list[str]]]  # caption, header, lines
PLACE = ("model", "task", "batch", "temperature")


def runs_of(result: Mapping[str, Any]) -> list[Run]:
    """The runs of a result. Raises ValueError for one of a kind without."""
    if not result["records"] or "of_rounds" not in result["records"][0]:
        raise ValueError(f"a result of kind {result['kind']!r} has no records of an evaluation")
    return [run_of(record) for record in result["records"]]


def environment_of(result: Mapping[str, Any]) -> str:
    """Where and when a result was measured, for captions."""
    about, settings = result["environment"], result["settings"]
    models = [f"{name} in {model['dtype']}" for name, model in result.get("models", {}).items()]
    parts = [
        *models, f"{about['device']}, {about['threads']} threads", f"torch {about['torch']}",
        f"transformers {about['transformers']}", f"commit {(result['commit'] or 'unknown')[:9]}",
        result["created"][:10], f"{settings.get('max_new_tokens')} new tokens",
    ]  # fmt: skip
    if "repeats" in settings:
        parts += [f"{settings['repeats']} repeats", "95% bootstrap intervals over prompts"]
    return "; ".join(parts)


def speed_tables(rows: Sequence[Mapping[str, Any]], baseline: str = OURS) -> list[Table]:
    """A table for each model, task, batch size and temperature: methods by kinds of prompts; `rows` of `summarise`."""
    tables: dict[tuple, Table] = {}
    for row in rows:
        place = tuple(row[name] for name in PLACE)
        if place not in tables:
            header = ["method", "prompts", "tok/s", "tokens per round", "acceptance rate", "overhead",
                      f"speedup over {baseline}", "reused", "greedy text equal"]  # fmt: skip
            tables[place] = (_title(place), header, [])
        tables[place][2].append([
            row["name"], f"{row['kind']} ({row['prompts']})", f"{row['tokens_per_second']:.1f}",
            _with_bounds(row["tokens_per_round"], row["tokens_per_round_interval"]), _number(row["acceptance_rate"]),
            _number(row["overhead"]), _with_bounds(row["speedup"], row["speedup_interval"]), str(row["reused"]),
            EQUAL[row["identical"]],
        ])  # fmt: skip
    return list(tables.values())


def definition_tables(runs: Sequence[Run]) -> list[Table]:
    """All definitions of acceptance, each under its project's name, with a column for each method."""
    tables = []
    for place in dict.fromkeys((r.model, r.task, r.batch, r.temperature) for r in runs):
        here = [r for r in runs if (r.model, r.task, r.batch, r.temperature) == place]
        names = [name for name in dict.fromkeys(r.method for r in here if r.rounds) if name != OURS]
        found = {name: definitions(rounds_of([r for r in here if r.method == name])) for name in names}
        if found:
            lines = [
                [f"{one[0].project}: {one[0].name}", *(_written(each.value) for each in one)]
                for one in zip(*found.values(), strict=True)
            ]
            tables.append((f"Definitions: {_title(place)}", ["number", *names], lines))
    return tables


def reasons(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for every method of this library that is slower than the baseline over all prompts of a place; `rows`
    of `summarise`."""
    said = []
    for row in rows:
        if row["kind"] != ALL or row["speedup"] >= 1 or row["tokens_per_round"] is None or row["name"] == OURS:
            continue
        place = _title(tuple(row[name] for name in PLACE))
        tokens, overhead = row["tokens_per_round"], row["overhead"]
        if overhead is None:
            why = f"a round brings {tokens:.2f} tokens; its rounds were not timed"
        elif tokens < overhead:
            why = f"a round brings {tokens:.2f} tokens and takes {overhead:.2f} plain steps"
        else:
            why = (
                f"rounds alone would give {tokens / overhead:.2f}x ({tokens:.2f} tokens for {overhead:.2f} steps); the "
                "prompt, the first round, the cut last draft and rows that end before others take the rest"
            )
        said.append(f"{row['name']} ({place}): {row['speedup']:.2f}x, since {why}.")
    return said


def agreement(first: Sequence[Run], second: Sequence[Run], baseline: str = OURS) -> Table:
    """Whether two runs of one plan agree: each cell's speedup in the other's 95% interval, and how many are.

    The cells of all prompts together are judged by intervals that hold at once too (Bonferroni)."""
    cells = [{_cell(row): row for row in summarise(runs, baseline)} for runs in (first, second)]
    known = [
        cell
        for cell in cells[0]
        if cell in cells[1] and cell[-1] != baseline and all(of[cell]["speedup_interval"] for of in cells)
    ]
    lines, inside, wide = [], 0, 0
    whole = [cell for cell in known if cell[-2] == ALL]
    for cell in known:
        values, bounds = zip(*((of[cell]["speedup"], of[cell]["speedup_interval"]) for of in cells), strict=True)
        both = _both_within(values, bounds)
        inside += both
        lines.append([" / ".join(map(str, cell)), *map(_with_bounds, values, bounds), "yes" if both else "NO"])
        if cell in whole:
            level = 1 - 0.05 / len(whole)
            bands = [_band(runs, cell, baseline, level) for runs in (first, second)]
            wide += _both_within(values, bands)
    title = f"Two runs: {inside} of {len(known)} cells lie within each other's interval"
    title += f", {wide} of the {len(whole)} of all prompts within simultaneous ones"
    return title, ["cell", "first run", "second run", "agree"], lines


def _band(runs: Sequence[Run], cell: tuple, baseline: str, level: float) -> list[float]:
    """The interval at `level` of the speedup over all prompts of a place."""
    here = [r for r in runs if (r.model, r.task, r.batch, r.temperature) == cell[:4]]
    found = speedup(
        [r for r in here if r.method == cell[-1]], [r for r in here if r.method == baseline], level
    )  # fmt: skip
    assert found is not None
    return [found.low, found.high]


def _both_within(values: Sequence[float], bounds: Sequence[Sequence[float]]) -> bool:
    """Whether each of two values lies within the other's bounds."""
    return all(low <= value <= high for value, (low, high) in zip(values, reversed(bounds), strict=True))


def audit_tables(result: Mapping[str, Any]) -> list[Table]:
    """What an audit found: its parts, and every test of samples and of the negative control."""
    parts = [[one["name"], one["verdict"], str(one["drafted"])] for one in result["methods"]]
    tables: list[Table] = [(f"Audit: {result['verdict']}", ["part", "verdict", "drafted tokens"], parts)]
    tests = [one for one in result["records"] if "p_value" in one]
    if tests:
        header = ["of", "prefix", "token", "rows", "p", "variation", "detectable", "verdict"]
        lines = [
            [one["part"], *(str(one[name]) for name in ("prefix", "token", "rows")), f"{one['p_value']:.2g}",
             *(_number(one[name]) for name in ("variation", "detectable")), one["verdict"]]
            for one in tests
        ]  # fmt: skip
        tables.append(("Tests of samples, and of a rule that is wrong on purpose", header, lines))
    return tables


def as_markdown(tables: Sequence[Table]) -> str:
    """Tables with their captions as headings."""
    return "\n\n".join(f"### {title}\n\n{markdown_table(header, lines)}" for title, header, lines in tables)


def as_latex(tables: Sequence[Table]) -> str:
    """Tables with their captions, for the package booktabs."""
    return "\n\n".join(latex_table(header, lines, title) for title, header, lines in tables)


def _cell(row: Mapping[str, Any]) -> tuple:
    return tuple(row[name] for name in (*PLACE, "kind", "name"))


def _title(place: tuple) -> str:
    model, task, batch, temperature = place
    named = [part for part in (model, task) if part]
    return ", ".join([*named, f"batch {batch}", said_of(temperature)])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _with_bounds(value: float | None, bounds: Sequence[float] | None) -> str:
    return _number(value) + ("" if bounds is None else f" [{bounds[0]:.2f}, {bounds[1]:.2f}]")


def _written(value: Any) -> str:
    if isinstance(value, Sequence):
        return " ".join(map(_written, value)) or "-"
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.2f}"
