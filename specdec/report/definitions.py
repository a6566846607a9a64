"""One set of rounds under every definition of acceptance that projects print, so that numbers meet their equals.

They part in five ways: pooled over all rounds or a mean of requests; with or without the bonus token, the target's own
at the end of a round; with or without what was accepted after an end-of-text token or past a limit; over all rounds or
those with a draft; and for trees, what a rate is divided by."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from specdec.report.stats import RoundStats, pool
from specdec.report.terminal import table

Value = float | int | Sequence[float] | None


@dataclass(frozen=True, slots=True)
class Definition:
    """A number under a project's name; `meaning` in a line; None where there is nothing to divide by."""

    project: str
    name: str
    meaning: str
    value: Value


def definitions(rows: Sequence[RoundStats]) -> tuple[Definition, ...]:
    """All definitions over the rounds of `rows`, one request each (`out.stats.rows`).

    >>> one = RoundStats(proposed=(4, 2), accepted=(2, 2), emitted=(3, 2), seconds=(), uncut=((4, 4, 2), (4, 4, 4)))
    >>> {d.name: d.value for d in definitions([one]) if d.project in ("specdec", "vLLM")}["mean acceptance length"]
    4.0
    """
    rounds = pool(rows)
    more = (*_of_projects(rows, rounds), *_of_trees(rounds))
    return (*_counted(rows, rounds), *(Definition(*one) for one in more))


def _counted(rows: Sequence[RoundStats], rounds: RoundStats) -> list[Definition]:
    """Tokens a round in eight ways: pooled or a mean of requests, with a bonus or without, cut or not."""
    numbers: dict[tuple[str, str], Callable[[RoundStats], list[int]]] = {
        ("bonus included", "cut at an end"): lambda s: list(s.emitted),
        ("no bonus", "cut at an end"): lambda s: list(s.accepted),
        ("bonus included", "past an end too"): lambda s: [accepted + 1 for *_, accepted in s.uncut],
        ("no bonus", "past an end too"): lambda s: [accepted for *_, accepted in s.uncut],
    }
    found = list[Definition]()
    for (bonus, cut), count in numbers.items():
        means = [statistics.fmean(count(row)) for row in rows if row.rounds]
        own = "tokens_per_round: " if not found else ""
        name = f"tokens a round, {bonus}, {cut}"
        found += [
            Definition("specdec", name, f"{own}pooled over all rounds", _share(sum(count(rounds)), rounds.rounds)),
            Definition("specdec", f"{name}, by request", "mean of the requests' own",
                       statistics.fmean(means) if means else None),
        ]  # fmt: skip
    return found


def _of_projects(rows: Sequence[RoundStats], rounds: RoundStats) -> list[tuple[str, str, str, Value]]:
    """Under the names of projects that print them; rounds with a draft alone are their rounds."""
    whole = [accepted for nodes, _, accepted in rounds.uncut if nodes]
    nodes = sum(nodes for nodes, *_ in rounds.uncut)
    cut, emitted = (
        [n for n, (size, *_) in zip(numbers, rounds.uncut, strict=True) if size]
        for numbers in (rounds.accepted, rounds.emitted)
    )
    drafts = len(whole)
    of_requests = [sum(row.emitted) / verified for row in rows if (verified := sum(size > 0 for size, *_ in row.uncut))]
    mean = statistics.fmean(of_requests) if of_requests else None
    deepest = max((depth for _, depth, _ in rounds.uncut), default=0)
    at_least = lambda counts: tuple(sum(n >= place for n in counts) / drafts for place in range(1, deepest + 1))
    mean_of = lambda counts: _share(sum(counts), drafts)
    length = None if not drafts else 1 + sum(whole) / drafts
    accepted_so = tuple(cut.count(n) for n in range(max(cut, default=-1) + 1))
    return [
        ("vLLM", "mean acceptance length", "1 + accepted / drafts, past an end too", length),
        ("vLLM", "draft acceptance rate", "accepted / drafted tokens, past an end too", _share(sum(whole), nodes)),
        ("vLLM", "acceptance by position", "share of all drafts, past an end too", at_least(whole) if drafts else None),
        ("SGLang", "accept len of the log", "new tokens of verified rounds / these rounds", mean_of(emitted)),
        ("SGLang", "spec_accept_length", "all new tokens / verified rounds, mean of requests", mean),
        ("SGLang", "spec_num_correct_drafts", "accepted tokens, no bonus", sum(cut)),
        ("SGLang", "spec_correct_drafts_histogram", "verified rounds that accepted 0, 1, … tokens", accepted_so),
        ("SpecForge", "accept length of a benchmark", "mean over requests of SGLang's spec_accept_length", mean),
        ("DeepSpec", "acceptance length", "cut at an end, then no bonus; pooled", rounds.tokens_per_round),
        ("TensorRT-LLM", "acceptance by position", "share of all drafts, no bonus", at_least(cut) if drafts else None),
        ("transformers", "n_matches, a mean", "accepted tokens / drafts, no bonus", mean_of(cut)),
    ]


def _of_trees(rounds: RoundStats) -> list[tuple[str, str, str, Value]]:
    """Acceptance rates of trees, by what they are divided by; the same but for paths where drafts are chains."""
    accepted, drafts = sum(rounds.accepted), sum(size > 0 for size, *_ in rounds.uncut)
    paths = zip(rounds.depths, rounds.accepted, rounds.ranks or ((),) * rounds.rounds, strict=True)
    tried = sum(min(depth, len(passed) if passed else taken + 1) for depth, taken, passed in paths)
    short = sum(taken < depth for _, depth, taken in rounds.uncut)
    return [
        ("specdec", "acceptance by nodes", "accepted / all drafted nodes", _share(accepted, sum(rounds.proposed))),
        ("specdec", "acceptance by depth", "accepted / levels of the drafts", _share(accepted, sum(rounds.depths))),
        ("specdec", "acceptance by path", "accepted / tokens tried on the way down", _share(accepted, tried)),
        ("specdec", "draft length", "levels of a draft", _share(sum(depth for _, depth, _ in rounds.uncut), drafts)),
        ("specdec", "ended before the draft", "drafts of which not all levels were accepted", _share(short, drafts)),
    ]


def _share(count: float, of: int) -> float | None:
    return count / of if of else None


def table_of_definitions(found: Sequence[Definition]) -> str:
    """The definitions as text, a line each."""
    shown = [[d.project, d.name, d.meaning, _written(d.value)] for d in found]
    return table(["project", "number", "meaning", "value"], shown)


def _written(value: Value) -> str:
    if isinstance(value, Sequence):  # a list, where it was read from a file
        return " ".join(map(_written, value)) or "-"
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.3f}"
