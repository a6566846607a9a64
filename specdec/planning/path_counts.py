"""How often each path of ranks was accepted, from which the tokens of a round on any tree follow."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from specdec.planning.policy import Ranks
from specdec.planning.tree_search import Path
from specdec.trees.tree import TokenTree

FIRST = 0.6  # share of first children that are accepted, before anything is known
LATER = (0.3, 0.18, 0.1, 0.055, 0.04, 0.03, 0.028, 0.025, 0.02)  # of further children, where the first is rejected
DEPTHS = 6  # whose shares are told apart; deeper ones are alike
GUESSED = 8.0  # tries that the guess for a path counts for, and
POOLED = 2.0  # that the guess for a depth and rank does


@dataclass(slots=True)
class PathCounts:
    """How often the last token of a path was offered where those before it were accepted, and how often it was accepted
    itself, with the path's earlier tries faded.

    Trees of one drafter give a path the same tokens, so every round tells of all trees that share its paths. What is
    known of a path stays while other trees run."""

    tried: dict[Path, float] = field(default_factory=dict)
    taken: dict[Path, float] = field(default_factory=dict)

    def observe(self, ranks: Sequence[Ranks], forget: float = 0.995) -> None:
        """Add a round, whose rows share a weight of 1."""
        tried, taken, part = self.tried, self.taken, 1 / max(1, len(ranks))
        kept = 1 - (1 - forget) * part
        for passed in ranks:
            above: Path = ()
            for children, accepted in passed:
                for rank in range(children):
                    path = (*above, rank)
                    tried[path] = kept * tried.get(path, 0.0) + part
                    taken[path] = kept * taken.get(path, 0.0) + (part if rank == accepted else 0.0)
                if accepted is None:
                    break
                above = (*above, accepted)

    def fade_to(self, most: float) -> None:
        """Keep every share with the weight of at most `most` tries, so that new ones soon outweigh them."""
        for path, tried in self.tried.items():
            if tried > most:
                self.tried[path], self.taken[path] = most, self.taken[path] * most / tried

    def reach(self) -> Callable[[Path], float]:
        """A function from a path to the share of rounds in which all of it is accepted; see the constants."""
        return _Reached(self.tried, self.taken, self._shares()).__getitem__

    def _shares(self) -> list[list[float]]:
        """By depth and rank, how often a child is accepted where its parent is; what was not tried, as one depth up."""
        count = len(LATER) + 1
        right, of = ([[0.0] * count for _ in range(DEPTHS)] for _ in range(2))
        for path, tried in self.tried.items():
            depth, rank = min(len(path), DEPTHS) - 1, path[-1]
            if rank < count:
                right[depth][rank] += self.taken[path]
                of[depth][rank] += tried
        rows: list[list[float]] = []
        guess = [FIRST, *((1 - FIRST) * share for share in LATER)]
        for depth in range(DEPTHS):
            row = [(right[depth][rank] + POOLED * guess[rank]) / (of[depth][rank] + POOLED) for rank in range(count)]
            guess = [share / max(1.0, sum(row)) for share in row]
            rows.append(guess)
        return rows


class _Reached(dict[Path, float]):
    """`PathCounts.reach` of the paths that were asked for; a dictionary, since looks ask for hundreds."""

    def __init__(self, tried: dict[Path, float], taken: dict[Path, float], shares: list[list[float]]):
        super().__init__({(): 1.0})
        self._tried, self._taken = tried, taken
        self._guesses = [[GUESSED * share for share in row] for row in shares]

    def __missing__(self, path: Path) -> float:
        row, rank = self._guesses[min(len(path), DEPTHS) - 1], path[-1]
        taken = self._taken.get(path, 0.0) + (row[rank] if rank < len(row) else 0.0)
        self[path] = value = self[path[:-1]] * taken / (self._tried.get(path, 0.0) + GUESSED)
        return value


@lru_cache(maxsize=256)
def paths_of(tree: TokenTree) -> tuple[Path, ...]:
    """`tree.choices`."""
    return tree.choices


def tokens_of(tree: TokenTree, reached: Callable[[Path], float]) -> float:
    """Tokens of a round on `tree`, the target's own among them."""
    return 1.0 + sum(map(reached, paths_of(tree)))
