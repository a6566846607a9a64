"""What `specdec doctor` found, as tables and sentences."""

from collections.abc import Mapping, Sequence
from typing import Any

from specdec.evaluation.diagnosis import Diagnosis, diagnosis_of
from specdec.evaluation.reporting import Table


def doctor_tables(result: Mapping[str, Any]) -> list[Table]:
    """Costs, acceptance, what to expect of each shape and, where it was checked, what whole calls took."""
    diagnosis = diagnosis_of(result["diagnosis"])
    expected = [
        [row["name"], str(row["batch"]), f"{row['tokens_per_round']:.2f}", f"{1000 * row['round_seconds']:.2f}",
         f"{row['overhead']:.2f}", f"{row['predicted_speedup']:.2f}"]
        for row in result["methods"]
    ]  # fmt: skip
    header = ["shape", "batch", "tokens per round", "round ms", "overhead", "expected speedup"]
    shapes = "Rounds, and what to expect of whole calls", header, expected
    tables = [_costs(diagnosis), _acceptance(diagnosis), shapes]
    return [*tables, _check(result["check"])] if result["check"] else tables


def doctor_notes(result: Mapping[str, Any]) -> list[str]:
    """The verdict, and what is to be known of the models."""
    return [*diagnosis_of(result["diagnosis"]).verdict(), *result["notes"]]


def _costs(diagnosis: Diagnosis) -> Table:
    header = ["rows", "plain forward ms", "draft step", *(f"verify {n}" for n in diagnosis.costs[1].sizes[1:])]
    lines = [
        [str(batch), f"{1000 * costs.step_seconds:.2f}", f"{costs.draft:.2f}"]
        + [f"{costs.verify[i]:.2f}" if i < len(costs.verify) else "-" for i in range(1, len(header) - 2)]
        for batch, costs in diagnosis.costs.items()
    ]
    return "Costs of forwards, in plain ones of as many rows", header, lines


def _acceptance(diagnosis: Diagnosis) -> Table:
    deepest = max(map(len, diagnosis.acceptance.values()), default=0)
    shown = lambda shares: [f"{s:.2f}" if s is not None else "-" for s in [*shares, *[None] * (deepest - len(shares))]]
    lines = [[kind, *shown(shares)] for kind, shares in diagnosis.acceptance.items()]
    header = ["prompts", *map(str, range(1, deepest + 1))]
    return "Acceptance by position, given that the token before was accepted", header, lines


def _check(check: Sequence[Mapping[str, Any]]) -> Table:
    lines = [
        [row["name"], str(row["batch"]), f"{row['predicted']:.2f}", f"{row['speedup']:.2f}",
         "{:.2f} … {:.2f}".format(*row["speedup_interval"]) if row["speedup_interval"] else "-", f"{row['off']:+.1%}"]
        for row in check
    ]  # fmt: skip
    header = ["shape", "batch", "predicted", "measured", "its interval", "off by"]
    return "The prediction beside whole calls on other prompts", header, lines
