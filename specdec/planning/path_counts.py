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
GUESSED = 4.0  # rounds that a path's guess counts for, and
POOLED = 2.0  # that the guess of a depth and rank does


@dataclass(slots=True)
class PathCounts:
    """Rounds in which a path was offered, and in which it was accepted, with the path's earlier rounds faded.

    Trees of one drafter give a path the same tokens, so every round tells of all trees that share its paths. What is
    known of a path stays while other trees run."""

    offered: dict[Path, float] = field(default_factory=dict)
    taken: dict[Path, float] = field(default_factory=dict)

    def observe(self, tree: TokenTree, ranks: Sequence[Ranks], forget: float = 0.99) -> None:
        """Add a round on `tree`, whose rows share a weight of 1; rows without a draft are left out."""
        rows = [passed for passed in ranks if passed]
        if not rows:
            return
        offered, taken, part = self.offered, self.taken, 1 / len(rows)
        path: Path
        for path in paths_of(tree):
            offered[path] = forget * offered.get(path, 0.0) + 1
            taken[path] = forget * taken.get(path, 0.0)
        for passed in rows:
            path = ()
            for _, rank in passed:
                if rank is None:
                    break
                path = (*path, rank)
                taken[path] += part

    def fade_to(self, most: float) -> None:
        """Keep every share with the weight of at most `most` rounds, so that new ones soon outweigh them."""
        for path, offered in self.offered.items():
            if offered > most:
                self.offered[path], self.taken[path] = most, self.taken[path] * most / offered

    def reach(self) -> Callable[[Path], float]:
        """A function from a path to the share of rounds in which all of it is accepted; see the constants."""
        shares = self._shares()
        known: dict[Path, float] = {(): 1.0}

        def reached(path: Path) -> float:
            if path not in known:
                above = reached(path[:-1])
                row = shares[min(len(path), DEPTHS) - 1]
                guess = above * row[path[-1]] if path[-1] < len(row) else 0.0
                offered, taken = self.offered.get(path, 0.0), self.taken.get(path, 0.0)
                known[path] = min(above, (taken + GUESSED * guess) / (offered + GUESSED))
            return known[path]

        return reached

    def _shares(self) -> list[list[float]]:
        """By depth and rank, how often a child is accepted where its parent is; what was not seen, as one depth up."""
        count = len(LATER) + 1
        right, of = ([[0.0] * count for _ in range(DEPTHS)] for _ in range(2))
        for path, offered in self.offered.items():
            depth, rank = min(len(path), DEPTHS) - 1, path[-1]
            if rank < count:
                above = self.taken[path[:-1]] / self.offered[path[:-1]] if len(path) > 1 else 1.0
                right[depth][rank] += self.taken[path]
                of[depth][rank] += offered * above
        rows: list[list[float]] = []
        guess = [FIRST, *((1 - FIRST) * share for share in LATER)]
        for depth in range(DEPTHS):
            row = [(right[depth][rank] + POOLED * guess[rank]) / (of[depth][rank] + POOLED) for rank in range(count)]
            guess = [share / max(1.0, sum(row)) for share in row]
            rows.append(guess)
        return rows


@lru_cache(maxsize=256)
def paths_of(tree: TokenTree) -> tuple[Path, ...]:
    """`tree.choices`."""
    return tree.choices


def tokens_of(tree: TokenTree, reached: Callable[[Path], float]) -> float:
    """Tokens of a round on `tree`, the target's own among them."""
    return 1.0 + sum(map(reached, paths_of(tree)))
