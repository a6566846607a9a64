"""The attention benchmark's results as text: a line a row, drawn from the saved JSON.

Run as `python -m scripts.bench_table scripts/results/attention_h200.json [--bars [--rows]]`.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from scripts.common.entry import add_bars_option, run_script


def microseconds(seconds: float) -> str:
    """Three significant figures."""
    value = seconds * 1e6
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def result_text(result: dict, ours: dict | None = None) -> str:
    """One measurement: time, page, error; a wrong or failed one shows no time. With `ours`, also our time over its."""
    name = result["name"] + (f"@{result['page']}" if "page" in result and not result["name"].startswith("ours") else "")
    if "failed" in result:
        return f"{name} failed ({result['failed'][:60]})"
    error = "nan" if result["error"] is None else f"{result['error']:.0e}"
    if result.get("wrong"):
        return f"{name} WRONG (error {error})"
    text = f"{name} {microseconds(result['seconds'])} µs ±{100 * result['spread'] / result['seconds']:.0f}% err {error}"
    if ours is not None and "seconds" in ours:
        text += f" ours {ours['seconds'] / result['seconds']:.2f}x"
    return text + (f" ({result['note']})" if "note" in result else "")


def bar_text(bar: dict) -> str:
    """What is required, what came out, and whether that is enough."""
    value = "?" if bar["value"] is None else f"{bar['value']:.3g}"
    verdict = {True: "met", False: "NOT MET", None: "unknown"}[bar["met"]]
    return f"{bar['what']} {value} ({'<=' if bar['at_most'] else '>='} {bar['limit']:g}: {verdict})"


def row_line(record: dict, bars: bool = False) -> str:
    """One row of the benchmark on one line, with `bars` what is required of it too."""
    ours = record["ours"]
    parts = [f"{record['case']:8}{record['label']}", result_text(ours)]
    if "seconds" in ours:
        rates = (
            [f"{ours['bytes_per_s'] / 1e12:.2f} TB/s"]
            if record["limited_by"] == "memory"
            else [f"{ours['flops_per_s'] / 1e12:.0f} TFLOP/s"]
        )
        parts[-1] += f" {rates[0]} = {100 * ours['fraction']:.0f}% of limit ({record['limited_by']})"
    parts += [result_text(peer, ours) for peer in record["peers"]]
    return " | ".join([*parts, *(map(bar_text, record["bars"]) if bars else ())])


def summary(records: Iterable[dict]) -> list[str]:
    """A line for each requirement of each case: how many rows meet it, and the worst of them."""
    groups: dict[tuple, list[tuple[dict, str]]] = {}
    for record in records:
        for bar in record["bars"]:
            groups.setdefault((record["case"], bar["what"], bar["limit"], bar["at_most"]), []).append(
                (bar, record["label"])
            )
    lines = []
    for (case, what, limit, at_most), bars in groups.items():
        known = [(bar["value"], label) for bar, label in bars if bar["value"] is not None]
        met = sum(bar["met"] is True for bar, _ in bars)
        line = f"{case:8} {what:62.62} {'<=' if at_most else '>='} {limit:<5g} {met:2}/{len(bars):<2} met"
        if known:
            value, label = max(known) if at_most else min(known)
            line += f", worst {value:.3g} ({label})"
        lines.append(line + (f", {len(bars) - len(known)} unknown" if len(known) < len(bars) else ""))
    return lines


def header(results: dict) -> list[str]:
    """The card, its measured ceilings, versions, and who is absent."""
    limits = results["ceilings"]
    peers = [f"{name} {peer['version']}" for name, peer in results["peers"].items() if peer["absent"] is None]
    notes = {
        "toy": ["toy sizes: this checks the path; no time and no verdict below means anything"],
        "quick": ["quick: some rows, peers at pages of 64 only"],
    }
    notes = notes.get(results["settings"]["size"], [])
    if str(results["git_sha"]).endswith("+"):
        notes += ["files differed from that commit"]
    return [
        f"{results['device']}, torch {results['versions']['torch']}, triton {results['versions']['triton']}, "
        f"git {results['git_sha']}",
        f"ceilings: copy {limits['copy_bytes'] / 1e12:.2f} TB/s, read {limits['read_bytes'] / 1e12:.2f} TB/s, "
        f"bf16 matrix product {limits['matmul_flops'] / 1e12:.0f} TFLOP/s",
        f"peers: {', '.join(peers) or 'none'}",
        *(f"absent: {name}: {peer['absent']}" for name, peer in results["peers"].items() if peer["absent"] is not None),
        *notes,
    ]


def kernel_lines(kernels: dict) -> list[str]:
    """The compiled kernels that spill registers, the number of those that do not, and what could not be read."""
    rows = kernels.get("kernels", [])
    spilling = [row for row in rows if row["spilled"]]
    lines = [f"kernels: {len(rows)} configurations compiled, {len(spilling)} of them spill registers"]
    lines += [
        f"  {row['label']}: {row['kernel']} {row['registers']} registers, {row['spilled']} B spilled, "
        f"{row['shared']} B shared"
        for row in spilling
    ]
    return lines + [f"  {label}: not read: {why}" for label, why in kernels.get("not_read", {}).items()]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a saved result again."""
    parser = argparse.ArgumentParser(description="Print saved results of scripts.bench_attention.")
    parser.add_argument("file", type=Path)
    add_bars_option(parser)
    parser.add_argument("--rows", action="store_true", help="with --bars print every row too, not only their summary")
    options = parser.parse_args(arguments)
    results = json.loads(options.file.read_text())
    rows = [row_line(record, options.bars) for record in results["records"]] if options.rows or not options.bars else []
    judged = summary(results["records"]) if options.bars else []
    print("\n".join([*header(results), *rows, *judged, *kernel_lines(results["kernels"])]))


if __name__ == "__main__":
    run_script(main)
