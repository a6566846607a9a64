"""Measures what `Diagnosis` needs: costs of forwards and of rounds, and acceptance, on calibration prompts."""

import statistics
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from torch import Tensor

from specdec.drafters import Drafter
from specdec.drafters.base import runners_of
from specdec.evaluation.diagnosis import Diagnosis, ShapeCosts
from specdec.evaluation.questions import Question
from specdec.evaluation.texts import Texts, pad_left
from specdec.generation.generators import SpeculativeGenerator
from specdec.model.runner import ModelRunner
from specdec.planning.candidates import LENGTHS, SIZES
from specdec.planning.costs import Costs, measure_costs
from specdec.planning.policy import PLAIN, Shape, shape_of
from specdec.planning.tree_search import optimal_tree
from specdec.report.stats import GenerationStats, RoundStats, pool
from specdec.trees.tree import TokenTree

OWN = "own"
CALLS = 3
MOST_TOKENS = 512  # of a forward whose cost is measured, over all rows
FORWARDS = (1, 2, 4, 8, 16, 32, 64)  # tokens of each row


@dataclass(frozen=True, slots=True)
class Patient:
    """A target with a drafter, and how texts are decoded.

    sampling: arguments of `settings_for`.
    count: new tokens of calibration texts.
    """

    target: ModelRunner
    drafter: Drafter
    texts: Texts
    sampling: Mapping
    count: int = 64
    seed: int = 0


def examine(patient: Patient, questions: Sequence[Question], batches: Sequence[int], trees: bool = True,
            progress: bool = True) -> Diagnosis:  # fmt: skip
    """Measure on calibration prompts, shape by shape, in turn for every prompt.

    Batches of several prompts tell times alone; acceptance is that of prompts one at a time. With `trees` the best
    trees for the measured acceptance and costs are tried too, where the drafter can draft them."""
    drafter, batches = patient.drafter, sorted({1, *batches})
    costs = {batch: _costs(patient, batch) for batch in batches}
    shapes = {shape.name: shape for shape in (PLAIN, *chains_for(drafter))}
    generators = {name: _generator(patient, shape) for name, shape in shapes.items()}
    alone = _decode(patient, generators, questions, 1, progress)
    deepest = max((name for name in alone if name != PLAIN.name), key=lambda name: _levels(alone[name]))
    ranks: tuple[float, ...] = ()
    if trees and drafter.traits.shapes == "tree":
        widest = _generator(patient, widest_for(drafter))
        ranks = falling(pool([s.pooled for s in _decode(patient, {"": widest}, questions, 1, progress)[""]]))
        trees_there = {shape.name: shape for shape in trees_for(ranks, costs[1], drafter)}
        grown = {name: _generator(patient, shape) for name, shape in trees_there.items()}
        shapes, generators = shapes | trees_there, generators | grown
        alone |= _decode(patient, grown, questions, 1, progress)
    found = {1: alone}
    for batch in batches[1:]:
        found[batch] = _decode(patient, generators, questions, batch, progress)
    plain, *drafts = [
        _costs_of(shape, {batch: of[name] for batch, of in found.items()}) for name, shape in shapes.items()
    ]
    rows = [row for stats in alone[PLAIN.name] for row in stats.rows]
    length = statistics.fmean(sum(row.emitted) for row in rows)
    return Diagnosis(plain, tuple(drafts), costs, _acceptance(questions, alone[deepest]), length, ranks)


def chains_for(drafter: Drafter) -> list[Shape]:
    """The drafter's own shape, and the chains that it can draft."""
    traits, own = drafter.traits, Shape(OWN)
    if traits.shapes in ("own", "grown"):
        return [own]
    chains = [TokenTree.chain(n) for n in LENGTHS if traits.max_depth is None or n <= traits.max_depth]
    return [own, *(shape_of(tree) for tree in chains if tree != traits.tree)]


def widest_for(drafter: Drafter) -> Shape:
    """A tree with many children, which tells how often each rank is accepted."""
    return shape_of(TokenTree.from_widths((4, 2, 1)[: drafter.traits.max_depth]))


def falling(rounds: RoundStats) -> tuple[float, ...]:
    """Acceptance by rank, of each rank at most that of the one before; empty where nothing was accepted."""
    found = tuple(accumulate(rounds.rank_acceptance, min))
    return found if found and found[0] > 0 else ()


def trees_for(ranks: Sequence[float], costs: Costs, drafter: Drafter) -> list[Shape]:
    """The best trees of several sizes for these ranks, and within the costs of forwards the best of any size."""
    if not ranks:
        return []
    depth = drafter.traits.max_depth or 8
    trees = [optimal_tree(ranks, size, depth) for size in SIZES[:3]]
    trees.append(optimal_tree(ranks, SIZES[2], depth, costs))
    shapes = {shape_of(tree).name: shape_of(tree) for tree in trees if not tree.is_chain}
    return list(shapes.values())


def _generator(patient: Patient, shape: Shape) -> SpeculativeGenerator:
    return SpeculativeGenerator(patient.target, None if shape == PLAIN else patient.drafter, tree=shape.tree)


def _costs(patient: Patient, batch: int) -> Costs:
    most = max(1, MOST_TOKENS // batch)
    return measure_costs(
        patient.target, next(runners_of(patient.drafter), None), [size for size in FORWARDS if size <= most],
        repeats=7, rows=batch,
    )  # fmt: skip


def _decode(patient: Patient, generators: Mapping[str, SpeculativeGenerator], questions: Sequence[Question], batch: int,
            progress: bool) -> dict[str, list[GenerationStats]]:  # fmt: skip
    """The statistics of every generator's calls, one after the other for each batch of prompts.

    The first call of each captures and is repeated. Of several prompts at a time there are `CALLS`."""
    from tqdm import tqdm

    starts = range(len(questions)) if batch == 1 else [part * len(questions) // CALLS for part in range(CALLS)]
    calls = [_prompts(patient, questions, start, batch) for start in starts]
    found: dict[str, list[GenerationStats]] = {name: [] for name in generators}
    with warnings.catch_warnings():  # of shapes that do not pay: that is what is measured
        warnings.simplefilter("ignore")
        bar = tqdm([calls[0], *calls], f"batch {batch}", disable=not progress, file=sys.stderr)
        for number, (ids, mask) in enumerate(bar):
            for name, generator in generators.items():
                generator.forget_texts()
                out = generator.generate(
                    ids, mask, max_new_tokens=patient.count, seed=patient.seed + number, **patient.sampling
                )
                if number:
                    found[name].append(out.stats)
    return found


def _prompts(patient: Patient, questions: Sequence[Question], start: int, batch: int) -> tuple[Tensor, Tensor]:
    members = [questions[(start + n) % len(questions)] for n in range(batch)]
    return pad_left([patient.texts.ids(question, 0) for question in members], 0)


def _costs_of(shape: Shape, calls: Mapping[int, Sequence[GenerationStats]]) -> ShapeCosts:
    rows = [row for stats in calls[1] for row in stats.rows]
    rounds = pool(rows)
    drafted = [(nodes, levels) for nodes, levels, _ in rounds.uncut if nodes] or [(0, 0)]
    seconds = {batch: statistics.median(map(_round_seconds, of)) for batch, of in calls.items()}
    prefill = {batch: statistics.median(stats.prefill_seconds for stats in of) for batch, of in calls.items()}
    tokens = tuple(row.tokens_per_round or 1.0 for row in rows)
    nodes, levels = (statistics.fmean(part) for part in zip(*drafted, strict=True))
    parents = None if shape.tree is None else shape.tree.parents
    return ShapeCosts(shape.name, levels, nodes, tokens, seconds, prefill, parents)


def _round_seconds(stats: GenerationStats) -> float:
    """Of a call, until its last row ended, so with the quicker rounds of fewer rows at its end."""
    return stats.decode_seconds / max(1, max(row.rounds for row in stats.rows) - 1)


def _levels(calls: Sequence[GenerationStats]) -> int:
    return max((levels for stats in calls for _, levels, _ in stats.pooled.uncut), default=0)


def _acceptance(questions: Sequence[Question], calls: Sequence[GenerationStats]) -> dict[str, list[float | None]]:
    by_kind: dict[str, list[RoundStats]] = {}
    for question, stats in zip(questions, calls, strict=True):
        by_kind.setdefault(question.kind, []).append(stats.pooled)
    return {kind: list(pool(rows).conditional_acceptance) for kind, rows in by_kind.items()}
