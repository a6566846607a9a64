"""`specdec report`: tables and figures of results, without the machine that measured them."""

import argparse
import sys
from pathlib import Path

from specdec.cli.command import Command, new_parser
from specdec.cli.results import read_result
from specdec.evaluation.methods import OURS
from specdec.evaluation.reporting import (
    agreement,
    as_latex,
    as_markdown,
    definition_tables,
    environment_of,
    reasons,
    runs_of,
    speed_tables,
)
from specdec.report.headless import NOT_DRAWN, headless_pyplot

ABOUT = """Tables (Markdown and LaTeX) and figures of results of specdec evaluate, bench and demo.

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
    found = [(path, read_result(path)) for path in paths]
    folder = options.output or paths[0].parent / "report"
    folder.mkdir(parents=True, exist_ok=True)
    texts, latex, parts = list[str](), list[str](), []
    pyplot = None if options.no_figures else headless_pyplot()
    for number, (path, result) in enumerate(found):
        runs, environment = runs_of(result), environment_of(result)
        parts.append(runs)
        tables = [*speed_tables(runs, options.baseline), *definition_tables(runs)]
        notes = [f"- {line}" for line in [*result.get("notes", ()), *reasons(runs, options.baseline)]]
        texts += [f"## {path}\n\n{environment}", as_markdown(tables), "\n".join(notes)]
        latex += [f"% {path}: {environment}", as_latex(tables)]
        if pyplot is not None:
            from specdec.evaluation.figures import draw_all

            own = folder if len(found) == 1 else folder / str(number + 1)
            texts += ["\n".join(f"![]({file.relative_to(folder)})" for file in draw_all(runs, own, environment))]
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


def _file(path: Path) -> Path:
    return path / "result.json" if path.is_dir() else path


COMMAND = Command(parser, run)
