"""What to expect of a drafter, from the costs of its rounds and its acceptance on calibration prompts."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from specdec.planning.costs import Costs
from specdec.report.comparison_plots import crossover

ENOUGH = 1.0  # speedup above which drafting pays


@dataclass(frozen=True, slots=True)
class ShapeCosts:
    """Rounds of one shape.

    name: "own", "chain 4", "tree 16 x 5".
    levels, nodes: of a draft; a mean where drafts differ.
    tokens: per round, of each calibration prompt.
    seconds: of a round, by batch size; without the first round of a text.
    prefill: seconds until the end of the first round, by batch size.
    parents: of the tree (None: the drafter's own).
    """

    name: str
    levels: float
    nodes: float
    tokens: tuple[float, ...]
    seconds: Mapping[int, float]
    prefill: Mapping[int, float]
    parents: tuple[int | None, ...] | None = None

    @property
    def mean_tokens(self) -> float:
        """Tokens per round of texts of equal length, pooled: the harmonic mean."""
        return statistics.harmonic_mean(self.tokens)


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All that was measured, and the predictions that follow.

    plain: rounds without a draft.
    shapes: of drafts; the drafter's own first.
    costs: of forwards alone, by batch size: a draft model's step, and verification by size.
    acceptance: given that the token before was accepted, by kind of prompts and position, of the deepest chain or tree.
    new_tokens: of a text, a mean.
    ranks: how often the child of each rank is the accepted one, falling; empty for drafters of chains alone.
    """

    plain: ShapeCosts
    shapes: tuple[ShapeCosts, ...]
    costs: Mapping[int, Costs]
    acceptance: Mapping[str, Sequence[float | None]]
    new_tokens: float
    ranks: tuple[float, ...] = ()

    @property
    def batches(self) -> list[int]:
        """The batch sizes that were measured."""
        return sorted(self.plain.seconds)

    def speedup(self, shape: ShapeCosts, batch: int) -> float:
        """Expected ratio of whole calls' tokens a second: prompts, first rounds, and rounds until the last row ends."""
        rest = lambda rounds, seconds: max(0.0, rounds - 1) * seconds
        plain = self.plain.prefill[batch] + rest(self.new_tokens, self.plain.seconds[batch])
        rounds = expected_largest([self.new_tokens / tokens for tokens in shape.tokens], batch)
        return plain / (shape.prefill[batch] + rest(rounds, shape.seconds[batch]))

    def best(self, batch: int) -> ShapeCosts:
        """The shape with the largest expected speedup."""
        return max(self.shapes, key=lambda shape: self.speedup(shape, batch))

    def stops_at(self) -> float | None:
        """The batch size at which the best shape's speedup falls to 1; None: at none that was measured."""
        return crossover({batch: self.speedup(self.best(batch), batch) for batch in self.batches})

    def verdict(self) -> list[str]:
        """Sentences: what to expect at each batch size, with which shape, and where speculation stops paying."""
        said = []
        for batch in self.batches:
            shape = self.best(batch)
            speedup, overhead = self.speedup(shape, batch), shape.seconds[batch] / self.plain.seconds[batch]
            advice = f"expect {speedup:.2f}x with {shape.name}" if speedup > ENOUGH else "do not draft"
            why = f"{shape.mean_tokens:.2f} tokens a round for {overhead:.2f} plain steps"
            said.append(f"batch {batch}: {advice} ({shape.name}: {speedup:.2f}x, {why})")
        ends, first = self.stops_at(), self.speedup(self.best(self.batches[0]), self.batches[0])
        if ends is not None:
            said.append(f"speculation stops paying at about {ends:.0f} prompts at a time")
        elif first > ENOUGH:
            said.append(f"speculation pays up to {self.batches[-1]} prompts at a time, the most that were measured")
        else:
            said.append("speculation does not pay at any batch size that was measured")
        return said

    def lines(self) -> list[dict[str, Any]]:
        """A table line for each shape and batch size, for results."""
        return [
            {
                "name": shape.name, "kind": "all", "batch": batch, "levels": shape.levels, "nodes": shape.nodes,
                "tokens_per_round": shape.mean_tokens, "round_seconds": shape.seconds[batch],
                "overhead": shape.seconds[batch] / self.plain.seconds[batch],
                "predicted_speedup": self.speedup(shape, batch),
            }
            for batch in self.batches
            for shape in self.shapes
        ]  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        """All numbers, ready for JSON; see `diagnosis_of`."""
        return asdict(self)


def diagnosis_of(found: Mapping[str, Any]) -> Diagnosis:
    """The inverse of `Diagnosis.as_dict`, also after JSON."""
    of_batches = lambda given: {int(batch): value for batch, value in given.items()}
    shape = lambda given: ShapeCosts(
        given["name"], given["levels"], given["nodes"], tuple(given["tokens"]), of_batches(given["seconds"]),
        of_batches(given["prefill"]), None if given["parents"] is None else tuple(given["parents"]),
    )  # fmt: skip
    costs = {
        batch: Costs(one["step_seconds"], one["draft"], tuple(one["sizes"]), tuple(one["verify"]))
        for batch, one in of_batches(found["costs"]).items()
    }
    shapes = tuple(map(shape, found["shapes"]))
    ranks = tuple(found.get("ranks", ()))  # older files have none
    return Diagnosis(shape(found["plain"]), shapes, costs, found["acceptance"], found["new_tokens"], ranks)


def expected_largest(values: Sequence[float], count: int) -> float:
    """The mean of the largest of `count` values, each drawn from `values`.

    >>> expected_largest([1.0, 3.0], 1), expected_largest([1.0, 3.0], 2)
    (2.0, 2.5)
    """
    rising, total = sorted(values), len(values)
    weight = lambda place: (place / total) ** count
    return sum(value * (weight(place) - weight(place - 1)) for place, value in enumerate(rising, 1))
