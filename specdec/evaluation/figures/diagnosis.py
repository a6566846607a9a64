"""The figures of a diagnosis, what `specdec doctor` found. Needs matplotlib."""

from collections.abc import Iterator, Mapping, Sequence
from textwrap import wrap
from typing import Any

from specdec.evaluation.diagnosis import Diagnosis, ShapeCosts, diagnosis_of
from specdec.planning.budgets import BEST, CHAIN, expected_by_budget
from specdec.planning.theory import reach
from specdec.report.bootstrap import ratio_interval
from specdec.report.comparison_plots import plot_beside_one, plot_speedup_by_batch
from specdec.report.cost_plots import (
    parts_of_round,
    plot_conditional_acceptance,
    plot_round_parts,
    plot_speedups_by_length,
    plot_verification_cost,
)
from specdec.report.intervals import Estimate
from specdec.report.tree_plots import plot_tokens_by_budget
from specdec.trees.tree import TokenTree


def figures_of_diagnosis(result: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Each figure that a result of `specdec doctor` allows, with its name; the first one sums it up."""
    diagnosis = diagnosis_of(result["diagnosis"])
    yield "doctor", overview(diagnosis, f"{result['settings']['drafter']} for {result['settings']['target']}")
    best = _best_tree(diagnosis)
    if best is not None and best.parents is not None:
        tree = TokenTree(best.parents)
        figure = tree.plot(reach(tree, [diagnosis.ranks]) if diagnosis.ranks else None)
        figure.suptitle(f"The tree with the best expected speedup: {best.name}")
        yield "tree", figure
    if diagnosis.ranks:
        yield "tokens_by_budget", _budgets(diagnosis)
    if result.get("check"):
        yield "prediction", _prediction(result["check"])


def overview(diagnosis: Diagnosis, title: str):
    """Acceptance, costs, a round's parts, expected speedups by length and batch size, and the verdict; a figure."""
    from matplotlib import pyplot

    best = {batch: _exact(diagnosis.speedup(diagnosis.best(batch), batch)) for batch in diagnosis.batches}
    own = {batch: _exact(diagnosis.speedup(diagnosis.shapes[0], batch)) for batch in diagnosis.batches}
    figure, grid = pyplot.subplots(2, 3, figsize=(16, 9), layout="constrained")
    plot_conditional_acceptance(grid[0, 0], diagnosis.acceptance)
    plot_verification_cost(grid[0, 1], {f"batch {batch}": found for batch, found in diagnosis.costs.items()})
    plot_round_parts(grid[0, 2], parts_of(diagnosis))
    plot_speedups_by_length(grid[1, 0], lengths_of(diagnosis))
    plot_speedup_by_batch(grid[1, 1], {"best shape": best, "the drafter's own": own}).legend(fontsize=7)
    grid[1, 1].set_title("Expected speedup against batch size")
    grid[1, 2].axis("off")
    grid[1, 2].text(0, 1, "\n".join(_wrapped(diagnosis.verdict())), va="top", fontsize=9)
    figure.suptitle(title)
    return figure


def lengths_of(diagnosis: Diagnosis) -> dict[str, dict[int, Estimate]]:
    """Expected speedups of chains by batch size and length."""
    chains = [shape for shape in diagnosis.shapes if shape.levels == shape.nodes] or [diagnosis.shapes[0]]
    return {
        f"batch {batch}": {round(shape.levels): _exact(diagnosis.speedup(shape, batch)) for shape in chains}
        for batch in diagnosis.batches
    }


def parts_of(diagnosis: Diagnosis) -> dict[str, dict[str, float]]:
    """Seconds of the parts of every shape's rounds, one prompt at a time."""
    return {
        shape.name: parts_of_round(diagnosis.costs[1], shape.levels, shape.nodes, shape.seconds[1])
        for shape in (diagnosis.plain, *diagnosis.shapes)
    }


def _best_tree(diagnosis: Diagnosis) -> ShapeCosts | None:
    trees = [shape for shape in diagnosis.shapes if shape.name.startswith("tree")]
    batch = diagnosis.batches[0]
    return max(trees, key=lambda shape: diagnosis.speedup(shape, batch), default=None)


def _budgets(diagnosis: Diagnosis):
    """Measured chains and trees beside what acceptance by rank promises if it is the same at every depth."""
    from matplotlib import pyplot

    measured: dict[str, dict[float, Estimate | None]] = {CHAIN: {}, BEST: {}}
    for shape in diagnosis.shapes:
        family = CHAIN if shape.levels == shape.nodes else BEST if shape.name.startswith("tree") else "own"
        measured.setdefault(family, {})[round(shape.nodes) + 1] = _tokens(shape)
    largest = int(max(size for of in measured.values() for size in of))
    budgets = [2**power for power in range(1, max(5, largest.bit_length()) + 1)]
    shares = ", ".join(f"{share:.2f}" for share in diagnosis.ranks)
    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    plot_tokens_by_budget(axes, expected_by_budget(diagnosis.ranks, budgets), measured).legend(fontsize=8)
    figure.suptitle(f"Tokens per round against nodes; acceptance by rank {shares}")
    return figure


def _tokens(shape: ShapeCosts) -> Estimate:
    """Tokens per round over texts of equal length, with an interval where there are enough of them."""
    found = ratio_interval([[1.0] * len(shape.tokens)], [[1 / tokens for tokens in shape.tokens]])
    return found or _exact(shape.mean_tokens)


def _prediction(check: Sequence[Mapping[str, Any]]):
    """Predicted beside measured speedups of whole calls."""
    from matplotlib import pyplot

    names = [f"{row['name']}\nbatch {row['batch']}" for row in check]
    measured = {}
    for name, row in zip(names, check, strict=True):
        low, high = row["speedup_interval"] or (row["speedup"],) * 2
        measured[name] = Estimate(row["speedup"], low, high)
    predicted = {name: _exact(row["predicted"]) for name, row in zip(names, check, strict=True)}
    figure, axes = pyplot.subplots(figsize=(3 + 1.3 * len(names), 4.5), layout="constrained")
    plot_beside_one(axes, {"predicted": predicted, "measured afterwards": measured}, "speedup over plain decoding")
    axes.legend(fontsize=8)
    figure.suptitle("The doctor's prediction beside whole calls on other prompts")
    return figure


def _exact(value: float) -> Estimate:
    return Estimate(value, value, value)


def _wrapped(sentences: Sequence[str]) -> list[str]:
    return [line for sentence in sentences for line in [*wrap(sentence, 60), ""]]
