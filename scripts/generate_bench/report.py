"""Tables of `scripts.bench_generate`, from its rows alone, so that a saved result prints again."""

from collections.abc import Sequence

from scripts.generate_bench.bars import FAST, fastest, ratio, row_of
from scripts.generate_bench.methods import COSTS, LONG_RUN, ROOFLINE
from scripts.generate_bench.models import ceiling
from scripts.generate_bench.peers import EAGER
from scripts.generate_bench.rounds import PARTS
from specdec.report.terminal import table


def cell(value: float | None, form: str = ".2f", scale: float = 1.0) -> str:
    """A number, or a dash for None."""
    return "-" if value is None else format(value * scale, form)


def main_table(rows: Sequence[dict]) -> str:
    """Speeds of all methods; a round's parts are milliseconds on the device, `host` is the rest of its wall time."""
    header = [
        "method",
        "batch",
        "tok/s (range)",
        "first token ms",
        "tokens per round",
        "overhead",
        f"round = {' + '.join(PARTS)} + host, ms",
        "peak GiB",
        "over transformers",
        "over ours",
    ]
    lines = []
    for row in rows:
        if row["method"] == ROOFLINE or row["method"].startswith((COSTS, LONG_RUN)):
            continue
        name = row["method"] + (f" ({row['note']})" if row.get("note") else "")
        if row.get("error"):
            lines.append([name, str(row["batch"] or "-"), "failed", *["-"] * (len(header) - 3)])
            continue
        mode, batch = row["method"].rsplit("-", 1)[1], row["batch"]
        plain = {} if row["method"].startswith("transformers") else row_of(rows, f"autoregressive-{mode}", batch)
        speed, parts = row["tokens_per_second"], row.get("parts")
        shown = (
            f"{cell(row.get('round_seconds'), scale=1e3)} = "
            + " + ".join(cell(parts[part], scale=1e3) for part in (*PARTS, "host"))
            if parts
            else "-"
        )
        lines.append(
            [
                name,
                str(batch),
                "{:.1f} ({:.1f} … {:.1f})".format(speed, *row["range"]),
                cell(row["first_token_seconds"], ".1f", 1e3),
                cell(row.get("tokens_per_round")),
                cell(row.get("overhead")),
                shown,
                cell(row["peak_bytes"], scale=2**-30),
                cell(ratio(speed, row_of(rows, EAGER, batch).get("tokens_per_second"))),
                cell(ratio(speed, plain.get("tokens_per_second"))),
            ]
        )
    return table(header, lines)


def cost_table(rows: Sequence[dict]) -> str:
    """Forwards over one token's forward, and a draft step."""
    rows = [row for row in rows if row["method"].startswith(COSTS) and not row.get("error")]
    names = list(rows[0]["forward_seconds"]) if rows else ["1"]
    lines = [[row["method"], str(row["batch"]), cell(row["forward_seconds"]["1"], ".3f", 1e3),
              *(cell(row["forward_seconds"][name] / row["forward_seconds"]["1"], ".3f") for name in names[1:]),
              cell(ratio(row["draft_seconds"], row["forward_seconds"]["1"]), ".3f")] for row in rows]  # fmt: skip
    return table(
        [
            "forward",
            "batch",
            "1 token ms",
            *(f"{name}{'' if 'tree' in name else ' tokens'} over 1" for name in names[1:]),
            "draft step over 1",
        ],
        lines,
    )


def card_lines(rows: Sequence[dict], settings: dict) -> list[str]:
    """The roofline card: bytes, bandwidth, and the speeds that they allow at the mean context of a run."""
    card = row_of(rows, ROOFLINE, None)
    if not card:
        return ["roofline: not measured"]
    context, length, bandwidth = settings["prompt"] + settings["new_tokens"] / 2, settings["length"], card["bandwidth"]
    lines = [
        f"roofline: {card['weight_bytes'] / 1e9:.4g} GB of weights a token, {card['kv_bytes'] / 1e3:.4g} kB "
        "of keys and values a token of context "
        f"({context * card['kv_bytes'] / 1e6:.3g} MB at {context:.0f}), memory {bandwidth / 1e12:.3g} TB/s"
    ]
    for batch in settings["batch"]:
        line = f"  batch {batch}: at most {ceiling(card, bandwidth, batch, context):.0f} tok/s"
        chain = fastest(rows, "chain", batch) or row_of(rows, "chain-eager", batch)
        tokens = chain.get("tokens_per_round") or length + 1.0
        drafted = ceiling(card, bandwidth, batch, context, length, tokens)
        if drafted is not None:
            line += (
                f", {drafted:.0f} with {length} drafted a round at {tokens:.2f} tokens per round "
                f"({'measured' if chain else 'all accepted'})"
            )
        lines.append(line)
    return lines


def audit_lines(compared: Sequence[dict], shown: int = 3) -> list[str]:
    """Which methods wrote the reference's texts, and of the others how many did, with their first differences."""
    at = lambda entry: f"{entry['method']}, batch {entry['batch']}"
    same = [entry for entry in compared if not entry["differences"]]
    lines = [f"all greedy texts as {same[0]['reference']}: " + "; ".join(map(at, same))] if same else []
    for entry in (entry for entry in compared if entry["differences"]):
        lines.append(f"{at(entry)}: {entry['identical']} of {entry['texts']} greedy texts as {entry['reference']}")
        for one in entry["differences"][:shown]:
            line = (
                f"  text {one['row']} parts at new token {one['position']}: {one['tokens'][0]} here, "
                f"{one['tokens'][1]} there"
            )
            if "margins" in one:
                line += (
                    f"; top-2 margin {one['margins'][0]:.4f} run at once, {one['margins'][1]:.4f} step by "
                    f"step, which differ by up to {one['noise']:.4f}: "
                    f"{'a near-tie' if one['near_tie'] else 'NO near-tie'}"
                )
            lines.append(line)
        if rest := entry["differences"][shown:]:
            lines.append(f"  and {len(rest)} more, {sum(one.get('near_tie', False) for one in rest)} of them near-ties")
    return lines


def bar_table(judged: Sequence[dict]) -> str:
    """Asked, measured, and the verdict."""
    said = lambda bar: (
        "not measured"
        if bar["value"] is None
        else "not judged"
        if not bar["judged"]
        else "met"
        if bar["met"]
        else "NOT MET"
    )
    asked = lambda bar: f">= {bar['at_least']:g}" if "at_least" in bar else f"<= {bar['at_most']:g}"
    return table(
        ["figure", "asked", "measured", ""],
        [[bar["what"], asked(bar), cell(bar["value"], ".3g"), said(bar)] for bar in judged],
    )


def report(result: dict, bars: bool = False) -> str:
    """All that a result shows."""
    rows, settings = result["rows"], result["settings"]
    at = lambda row: row["method"] + ("" if row["batch"] is None else f", batch {row['batch']}")
    failed = [f"not measured: {at(row)}: {row['error']}" for row in rows if row.get("error")]
    failed += [
        f"parts of a round not measured: {at(row)}: {row['parts_error']}" for row in rows if row.get("parts_error")
    ]
    failed += [
        f"rounds through the host: {at(row)}: {row['host_rounds']}"
        for row in rows
        if row["method"].endswith(FAST) and row.get("host_rounds")
    ]
    if result["skipped"]:
        failed.append(f"skipped, the time was up: {', '.join(result['skipped'])}")
    long = [
        f"{row['method']}: {row['rounds']} rounds; bytes before {row['before']}, after {row['after']}"
        for row in rows
        if "rounds" in row
    ]
    costs = ["", cost_table(rows)] if any(row["method"].startswith(COSTS) for row in rows) else []
    return "\n".join([result["note"], "", *card_lines(rows, settings), "", main_table(rows), *costs, "", *failed, *long,
                      *audit_lines(result["audit"]), *(["", bar_table(result["bars"])] if bars else [])])  # fmt: skip
