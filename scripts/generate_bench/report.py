"""Bars and tables of `scripts.bench_generate`, from its rows alone, so that a saved result prints again."""

from collections.abc import Sequence

from scripts.generate_bench.methods import ASSISTED, COSTS, EAGER, LONG_RUN, NODES, ROOFLINE, STATIC
from scripts.generate_bench.models import ceiling
from scripts.generate_bench.rounds import PARTS
from specdec.report.terminal import table

FAST = ("graph", "compile")  # the modes whose rounds run on the device; a bar takes the faster one
# what the bars on speed are asked for
JUDGED = {
    "device": "cuda",
    "shape": "llama-3.1-8b",
    "model": None,
    "dtype": "bfloat16",
    "prompt": 128,
    "new_tokens": 256,
    "length": 5,
    "draft_layers": 2,
    "acceptance": None,
}


def row_of(rows: Sequence[dict], method: str, batch: int | None = 1) -> dict:
    """The row of a method; {} where there is none, or it failed."""
    return next((row for row in rows if (row["method"], row["batch"]) == (method, batch) and not row.get("error")), {})


def fastest(rows: Sequence[dict], kind: str, batch: int = 1) -> dict:
    """The faster row of `FAST`, or {}."""
    found = [row_of(rows, f"{kind}-{mode}", batch) for mode in FAST]
    return max(found, key=lambda row: row.get("tokens_per_second", 0.0))


def ratio(one: float | None, other: float | None) -> float | None:
    """`one / other`; None where either is missing."""
    return one / other if one is not None and other else None


def predicted(rows: Sequence[dict], batch: int, length: int) -> float | None:
    """Tokens a second that the parts promise: tokens per round / (γ c + v) times our own autoregressive speed at that
    batch size.
    """
    costs, chain, plain = (
        row_of(rows, f"{COSTS}-graph", batch),
        fastest(rows, "chain", batch),
        fastest(rows, "autoregressive", batch),
    )
    if not (costs and chain and plain) or costs["draft_seconds"] is None:
        return None
    step = costs["forward_seconds"]["1"]
    c, v = costs["draft_seconds"] / step, costs["forward_seconds"][str(length + 1)] / step
    return chain["tokens_per_round"] / (length * c + v) * plain["tokens_per_second"]


def bars(rows: Sequence[dict], compared: Sequence[dict], settings: dict) -> list[dict]:
    """What is asked, and what was measured; `met` is None where nothing was, or where (`judged` False) the run is not
    the one it is asked of.
    """
    speed = lambda row: row.get("tokens_per_second")
    over = lambda row, method: ratio(speed(row), speed(row_of(rows, method)))
    plain, chain, medusa = (fastest(rows, kind) for kind in ("autoregressive", "chain", "medusa"))
    forwards = row_of(rows, f"{COSTS}-graph").get("forward_seconds", {})
    planted, of_shape = settings["acceptance"], settings["model"] is None
    draft = f"planted acceptance {planted:g}" if planted is not None else "exact draft" if of_shape else "given draft"
    length, on_device = (
        settings["length"],
        [row for row in rows if row["method"].endswith(FAST) and not row.get("error")],
    )
    shares = [
        ratio(row.get("parts", {}).get("host"), row.get("round_seconds")) for row in on_device if row["batch"] == 1
    ]
    captures = [row["capture_seconds"] for row in on_device if row.get("capture_seconds") is not None]
    pools = {}
    for row in on_device:
        if row.get("graph_bytes") is not None:
            pools[row["method"]] = pools.get(row["method"], 0) + row["graph_bytes"]
    found = [
        {"what": "autoregressive, batch 1, tok/s", "value": speed(plain), "at_least": 225.0},
        {"what": "autoregressive over transformers eager, batch 1", "value": over(plain, EAGER), "at_least": 5.0},
        {
            "what": "autoregressive over transformers static cache + compile, batch 1",
            "value": over(plain, STATIC),
            "at_least": 1.5,
        },
        {"what": f"chain, {draft}, γ {length}, batch 1, tok/s", "value": speed(chain), "at_least": 750.0},
        {"what": "chain over transformers assisted, batch 1", "value": over(chain, ASSISTED), "at_least": 6.0},
        {
            "what": "host share of a round, batch 1, worst method",
            "value": max((x for x in shares if x is not None), default=None),
            "at_most": 0.05,
        },
        {
            "what": f"verify {length + 1} tokens over 1, batch 1",
            "value": ratio(forwards.get(str(length + 1)), forwards.get("1")),
            "at_most": 1.08,
        },
        {
            "what": f"verify a tree of {NODES} over 1 token, batch 1",
            "value": ratio(forwards.get(f"tree {NODES}"), forwards.get("1")),
            "at_most": 1.2,
        },
        {
            "what": "Medusa round over an autoregressive step, batch 1",
            "value": ratio(medusa.get("round_seconds"), plain.get("round_seconds")),
            "at_most": 1.25,
        },
        *(
            {
                "what": f"chain over what its parts predict, batch {batch}",
                "at_least": 0.75,
                "value": ratio(speed(fastest(rows, "chain", batch)), predicted(rows, batch, length)),
            }
            for batch in (8, 32)
        ),
        {"what": "capture of one more round, worst method, s", "value": max(captures, default=None), "at_most": 1.0},
        {
            "what": "graphs of all batch sizes, worst method, GB",
            "value": ratio(max(pools.values(), default=None), 1e9),
            "at_most": 1.0,
        },
    ]
    fits = all(settings[name] == value for name, value in JUDGED.items())
    found = [bar | {"judged": fits} for bar in found]
    at_shape = all(settings[name] == JUDGED[name] for name in ("device", "shape", "model"))
    found.append(
        equality_bar(compared, settings["dtype"]) | {"judged": at_shape and settings["weights"] == "random"}
    )  # texts that count would not tell
    found.append(growth_bar(rows) | {"judged": at_shape})
    return [
        bar | {"met": bar["judged"] and met(bar) if bar["value"] is not None and bar["judged"] else None}
        for bar in found
    ]


def met(bar: dict) -> bool:
    """Whether a bar's value is within it."""
    return bar.get("at_least", float("-inf")) <= bar["value"] <= bar.get("at_most", float("inf"))


def equality_bar(compared: Sequence[dict], dtype: str) -> dict:
    """Share of greedy texts of our rounds on the device that equal the reference's; in 16 bits, or part from it at a
    near-tie.
    """
    ours = [entry for entry in compared if entry["method"].endswith(FAST)]
    near = (
        0 if dtype == "float32" else sum(one.get("near_tie", False) for entry in ours for one in entry["differences"])
    )
    what = "greedy texts of graph and compile equal to eager's" + (
        "" if dtype == "float32" else ", or parting at a near-tie"
    )
    texts = sum(entry["texts"] for entry in ours)
    return {"what": what, "value": ratio(sum(entry["identical"] for entry in ours) + near, texts), "at_least": 1.0}


def growth_bar(rows: Sequence[dict]) -> dict:
    """How much more memory of the card is allocated after a long run than before it."""
    row = next((row for row in rows if row["method"].startswith(LONG_RUN) and not row.get("error")), None)
    grown = (
        None
        if row is None or row["after"]["allocated"] is None
        else (row["after"]["allocated"] - row["before"]["allocated"]) / 2**20
    )
    return {
        "what": f"memory that {row['rounds'] if row else 'many'} rounds leave behind, MiB",
        "value": grown,
        "at_most": 1.0,
    }


def cell(value: float | None, form: str = ".2f", scale: float = 1.0) -> str:
    """A number, or a dash for None."""
    return "-" if value is None else format(value * scale, form)


def main_table(rows: Sequence[dict]) -> str:
    """Speeds of all methods; the parts of a round are milliseconds on the device, `host` what of a round's wall time
    they leave.
    """
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


def report(result: dict) -> str:
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
                      *audit_lines(result["audit"]), "", bar_table(result["bars"])])  # fmt: skip
