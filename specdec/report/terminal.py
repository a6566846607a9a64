"""Text for a terminal: who wrote which token, and plain tables."""

from collections.abc import Sequence

from specdec.report.stats import RoundStats

GREEN, BLUE, DIM, RESET = "\x1b[32m", "\x1b[34m", "\x1b[2m", "\x1b[0m"


def authors(stats: RoundStats, new_tokens: int) -> list[bool]:
    """For each new token of a row, whether the draft wrote it (and the target accepted it)."""
    written = []
    for accepted, emitted in zip(stats.accepted, stats.emitted, strict=True):
        written += [i < accepted for i in range(emitted)]
    return written[:new_tokens]


def coloured(tokenizer, prompt: str, tokens: Sequence[int], drafted: Sequence[bool], colour: bool = True) -> str:
    """The prompt dimmed, then each token green where the draft wrote it and blue where the target did. Without
    `colour`, the text alone.

    Tokens are decoded in runs of one author, so that characters of several byte tokens stay whole where one author
    wrote them."""
    if not colour:
        return prompt + tokenizer.decode(tokens)
    pieces, start = [f"{DIM}{prompt}{RESET}"], 0
    for end in range(1, len(tokens) + 1):
        if end == len(tokens) or drafted[end] != drafted[start]:
            pieces.append(f"{GREEN if drafted[start] else BLUE}{tokenizer.decode(tokens[start:end])}{RESET}")
            start = end
    return "".join(pieces)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in plain text, first column left-aligned, the others right-aligned."""
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    lines = [
        [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))]
        for line in [header, *rows]
    ]
    return "\n".join("  ".join(line).rstrip() for line in [lines[0], ["-" * w for w in widths], *lines[1:]])
