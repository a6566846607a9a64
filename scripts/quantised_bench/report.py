"""Tables of a result of `scripts.bench_quantised`."""

import re
from collections import Counter
from collections.abc import Sequence

from specdec.report.terminal import table

HEADER = ["quantisation", "layers", "kept", "loss", "added", "agreement"]


def model_table(rows: Sequence[dict]) -> str:
    """The lines of one model; "rate (tokens a round)" for each drafter, "-" where it cannot be."""
    drafters = list(dict.fromkeys(name for row in rows for name in row["drafters"]))
    lines = [
        [
            row["title"], str(row["layers"]["quantised"]), str(len(row["layers"]["kept"])), f"{row['loss']:.4f}",
            f"{row['loss_added']:+.4f}", f"{row['agreement']:.2%}",
            *(_accepted(row["drafters"].get(name, {})) for name in drafters),
        ]
        for row in rows
    ]  # fmt: skip
    return table([*HEADER, *drafters], lines)


def _accepted(found: dict) -> str:
    rate = found.get("acceptance_rate")
    return "-" if rate is None else f"{rate:.3f} ({found['tokens_per_round']:.2f})"


def kept_lines(rows: Sequence[dict]) -> list[str]:
    """Which layers stay as they are, a line for each quantisation that leaves any; numbers in names are shown as *."""
    found = []
    for row in rows:
        kinds = Counter(re.sub(r"\d+", "*", name) for name in row["layers"]["kept"])
        names = ", ".join(f"{name} ({count})" for name, count in kinds.items())
        found += [f"  {row['title']}: {names}"] * bool(names)
    return found


def _absent(rows: Sequence[dict]) -> list[str]:
    """Which drafters cannot be, and why, a line for each reason."""
    why: dict[str, list[str]] = {}
    for row in rows:
        for name, one in row["drafters"].items():
            if "error" in one:
                why.setdefault(f"no {name}: {one['error']}", []).append(row["title"])
    return [f"{reason} ({'; '.join(titles)})" for reason, titles in why.items()]


def _parted(rows: Sequence[dict]) -> list[str]:
    """Where greedy texts are not all those of plain decoding, as near-ties in 16 or 8 bits make them."""
    found = []
    for row in rows:
        for name, one in row["drafters"].items():
            if one.get("equal_texts", 0) < one.get("texts", 0):
                same = f"{one['equal_texts']} of {one['texts']}"
                found.append(f"{row['title']}, {name}: {same} texts are plain decoding's to the last token")
    return found


def report(result: dict) -> str:
    """All tables, and what is missing."""
    found = []
    for model in dict.fromkeys(row["model"] for row in result["methods"]):
        rows = [row for row in result["methods"] if row["model"] == model]
        found += [f"{model}: {rows[0]['positions']} positions in windows of {rows[0]['window']} tokens",
                  model_table(rows), "left as they are:", *kept_lines(rows)]  # fmt: skip
        found += [*_absent(rows), *_parted(rows), ""]
    found += [f"missing: {row['model']}, {row['title']}: {row['why']}" for row in result["missing"]]
    return "\n".join(found + [f"not measured for want of time: {name}" for name in result["skipped"]])
