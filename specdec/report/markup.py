"""Tables as Markdown and LaTeX."""

from collections.abc import Sequence

SPECIAL = {"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{",
           "}": r"\}",
           "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "…": r"\ldots{}"}  # fmt: skip


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is left-aligned and the others right-aligned.

    >>> print(markdown_table(["a", "b"], [["x|y", "1"]]))
    | a | b |
    |:--|--:|
    | x\\|y | 1 |
    """
    lines = [header, *rows]
    shown = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    return "\n".join([shown[0], "|:--|" + "--:|" * (len(header) - 1), *shown[1:]])


def latex_table(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    """A table environment with `caption`, for the package booktabs."""
    lines = [" & ".join(map(latex, line)) + r" \\" for line in (header, *rows)]
    columns = "l" + "r" * (len(header) - 1)
    return "\n".join([
        r"\begin{table}", r"\centering", rf"\caption{{{latex(caption)}}}", rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule", r"\end{tabular}", r"\end{table}",
    ])  # fmt: skip


def latex(text: str) -> str:
    """Text with LaTeX's special characters escaped.

    >>> latex("50% of_x")
    '50\\\\% of\\\\_x'
    """
    return "".join(SPECIAL.get(letter, letter) for letter in text)
