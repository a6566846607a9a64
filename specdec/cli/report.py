"""`specdec report`: tables and figures of results, without the machine that measured them."""

import argparse
import sys
from pathlib import Path

from specdec.cli.command import Command, new_parser
from specdec.cli.results import read_result
from specdec.evaluation.doctor_tables import doctor_notes, doctor_tables
from specdec.evaluation.figures.draw import draw_result
from specdec.evaluation.methods import OURS
from specdec.evaluation.reporting import (
    Table,
    agreement,
    as_latex,
    as_markdown,
    audit_tables,
    definition_tables,
    environment_of,
    reasons,
    runs_of,
    speed_tables,
)
from specdec.evaluation.runs import Run
from specdec.evaluation.summary import summarise
from specdec.report.headless import NOT_DRAWN, headless_pyplot

ABOUT = """Tables (Markdown and LaTeX) and figures of results of specdec evaluate, bench, demo, doctor and audit.

Each RESULT is a file, or the folder of an evaluation. Two results of one plan are compared cell by cell, too."""


def parser(prog: str = "specdec report") -> argparse.ArgumentParser:
    """The options and their defaults."""
    options = new_parser(prog, ABOUT)
    add = options.add_argument
    add("results", nargs="+", metavar="RESULT")
    add("--output", type=Path, help="folder of report.md, report.tex and figures (default: report beside the result)")
    add("--baseline", default=OURS, help="the method that speedups are over")
    add("--no-figures", action="store_true")
    return options


def run(options: argparse.Namespace) -> None:
    """Write and print the tables, and draw the figures."""
    paths = [_file(Path(name)) for name in options.results]
    folder = options.output or paths[0].parent / "report"
    folder.mkdir(parents=True, exist_ok=True)
    pyplot = None if options.no_figures else headless_pyplot()
    texts, latex, parts = list[str](), list[str](), list[list[Run]]()
    for number, path in enumerate(paths, 1):
        result = read_result(path)
        own = None if pyplot is None else folder if len(paths) == 1 else folder / str(number)
        tables, notes = _tables(result, options.baseline, parts)
        files = [] if own is None else draw_result(result, own, options.baseline)
        environment = environment_of(result)
        pictures = "\n".join(f"![]({file.relative_to(folder)})" for file in files)
        texts += [f"## {path}\n\n{environment}", as_markdown(tables), "\n".join(notes), pictures]
        latex += [f"% {path}: {environment}", as_latex(tables)]
    if len(parts) == 2:
        compared = [agreement(parts[0], parts[1], options.baseline)]
        texts, latex = [*texts, as_markdown(compared)], [*latex, as_latex(compared)]
    written = "\n\n".join(text for text in texts if text) + "\n"
    (folder / "report.md").write_text(written, encoding="utf-8")
    (folder / "report.tex").write_text("\n\n".join(latex) + "\n", encoding="utf-8")
    print(written)
    print(f"report: {folder}")
    if pyplot is None and not options.no_figures:
        print(NOT_DRAWN, file=sys.stderr)


def _tables(result: dict, baseline: str, parts: list[list[Run]]) -> tuple[list[Table], list[str]]:
    """Tables and notes of a result; the runs of a comparison are added to `parts`."""
    if result["kind"] == "audit":
        return audit_tables(result), []
    if result["kind"] == "doctor":
        return doctor_tables(result), [f"- {line}" for line in doctor_notes(result)]
    runs = runs_of(result)
    parts.append(runs)
    rows = summarise(runs, baseline)
    notes = [f"- {line}" for line in [*result.get("notes", ()), *reasons(rows)]]
    return [*speed_tables(rows, baseline), *definition_tables(runs)], notes


def _file(path: Path) -> Path:
    return path / "result.json" if path.is_dir() else path


COMMAND = Command(parser, run)
