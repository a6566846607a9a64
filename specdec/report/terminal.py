"""Output for a terminal: text coloured by the model that wrote each token, and tables."""

from collections.abc import Sequence

from specdec.report.stats import RoundStats

GREEN, BLUE, DIM, RESET = "\x1b[32m", "\x1b[34m", "\x1b[2m", "\x1b[0m"


def authors(stats: RoundStats, new_tokens: int) -> list[bool]:
    """For each new token of a row, whether it is an accepted draft token."""
    written = []
    for accepted, emitted in zip(stats.accepted, stats.emitted, strict=True):
        written += [i < accepted for i in range(emitted)]
    return written[:new_tokens]


def coloured(tokenizer, prompt: str, tokens: Sequence[int], drafted: Sequence[bool], colour: bool = True) -> str:
    """The prompt dimmed, then drafted tokens in green and the target's in blue; without `colour`, the plain text.

    Runs of tokens from one model are decoded together, so that characters made of several byte tokens stay whole."""
    if not colour:
        return prompt + tokenizer.decode(tokens)
    pieces, start = [f"{DIM}{prompt}{RESET}"], 0
    for end in range(1, len(tokens) + 1):
        if end == len(tokens) or drafted[end] != drafted[start]:
            pieces.append(f"{GREEN if drafted[start] else BLUE}{tokenizer.decode(tokens[start:end])}{RESET}")
            start = end
    return "".join(pieces)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain-text table with the first column left-aligned and the others right-aligned."""
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    lines = [
        [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))]
        for line in [header, *rows]
    ]
    return "\n".join("  ".join(line).rstrip() for line in [lines[0], ["-" * w for w in widths], *lines[1:]])
