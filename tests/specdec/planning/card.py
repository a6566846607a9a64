"""A simulated card and drafter for policies: times are arithmetic, acceptance is drawn with a seed."""

import random

from specdec.cuda_graph import up_to_power
from specdec.planning.candidates import SIZES, Candidates
from specdec.planning.fit import Fit
from specdec.planning.fitted import FittedPolicy
from specdec.planning.policy import PLAIN, Place, shape_of
from specdec.planning.tree_search import best_paths, greedy_tree
from specdec.trees.tree import TokenTree

HEADS = [[0.5, 0.15, 0.09, 0.05, 0.03, 0.02], [0.45, 0.15, 0.1, 0.05, 0.04, 0.03], [0.4, 0.14, 0.1, 0.07], [0.35, 0.2]]
MODEL = [[0.75, 0.1, 0.04, 0.02]]
RIGHT, WRONG = [[0.9, 0.04]], [[0.0]]


def own_tree(after, size=64, depth=5):
    """The best tree for acceptance `after(path)` by the next rank."""

    def reached(path):
        shares = after(path[:-1]) if path else []
        return 1.0 if not path else reached(path[:-1]) * (shares[path[-1]] if path[-1] < len(shares) else 0.0)

    value = lambda path: reached(path) or None if len(path) <= depth else None
    return TokenTree.from_choices(best_paths(value, size - 1))


def by_path(path):
    """Acceptance by rank after a path, as of Medusa heads: low after the first child, high after the others."""
    if not path:
        return [0.55, 0.16, 0.06, 0.04, 0.03, 0.03, 0.02, 0.02, 0.01]
    return [0.08, 0.05, 0.05, 0.04, 0.03] if path == (0,) else [0.88, 0.04, 0.02]


class Card:
    """Rounds cost as on a card that verifies `free` nodes of all rows for nothing, then takes `node` steps for each.

    acceptance: by depth and rank, or a function from a path to acceptance by the next rank.
    ease: factors of acceptance of row 0, 1 … in turn.
    slot: steps that a row's slot adds to any round.
    """

    def __init__(self, acceptance, rows=1, level=0.03, free=64, node=0.004, noise=0.0, seed=0, fit=None, ease=(1.0,),
                 slot=0.0, **candidates):  # fmt: skip
        self.acceptance, self.rows, self.level, self.free, self.node, self.noise, self.ease, self.slot = (
            acceptance, rows, level, free, node, noise, ease, slot,
        )  # fmt: skip
        self.draws, self.fit = random.Random(seed), fit or Fit(has_model=level > 0.05)
        self.candidates = Candidates(**{"shapes": "tree", "vocab_size": 16384} | candidates)
        self.captured, self.measures, self.rounds = {}, [], []

    def seconds(self, shape):
        slots = 0.001 * self.slot * self.rows
        if shape == PLAIN:
            return 0.001 + slots
        levels, nodes = (3, 16) if shape.tree is None else (shape.tree.max_depth, shape.tree.size)
        return slots + 0.001 * (1.15 + self.level * levels + self.node * max(0, nodes * self.rows - self.free))

    @property
    def measured(self):
        return len(self.measures)

    def capture(self, shape):
        self.captured.setdefault(self.rows, set()).add(shape)
        self.measures.append((self.rows, shape))
        return self.seconds(shape)

    def after(self, path):
        """Acceptance of the next token by rank."""
        if callable(self.acceptance):
            return self.acceptance(path)
        return self.acceptance[min(len(path), len(self.acceptance) - 1)]

    def walk(self, tree, row=0):
        """What one row accepts: (children, rank) of each node passed."""
        passed, node, path = [], 0, ()
        while tree.children[node]:
            shares = self.after(path)
            u, rank = self.draws.random() / self.ease[row % len(self.ease)], None
            for r in range(len(tree.children[node])):
                u -= shares[r] if r < len(shares) else 0.0
                if u < 0:
                    rank = r
                    break
            passed.append((len(tree.children[node]), rank))
            if rank is None:
                break
            path, node = (*path, rank), tree.children[node][rank]
        return tuple(passed)

    def next(self, policy, place):
        """The shape that `policy` wants, captured after a pause if need be."""
        shape = policy.next()
        if not place.captured(shape):
            policy.enter(place)
            shape = policy.next()
            self.captured.setdefault(self.rows, set()).add(shape)
        self.rounds.append(shape)
        return shape

    def place(self, left):
        return Place(self.rows, left, lambda shape: shape in self.captured.get(self.rows, ()), self.capture)

    def call(self, tokens=200):
        """One call of so many tokens a row, whose rows all go at their mean speed."""
        policy = FittedPolicy(self.fit, self.candidates, self.rows, 5)
        done = 1.0
        place = self.place(lambda: int(tokens - done))
        policy.enter(place)
        while done < tokens:
            shape = self.next(policy, place)
            tree = shape.tree or (TokenTree.chain(0) if shape == PLAIN else TokenTree.chain(3))
            ranks = [self.walk(tree) for _ in range(self.rows)]
            gained = 1 + sum(sum(rank is not None for _, rank in row) for row in ranks) / self.rows
            took = self.seconds(shape) * (1 + self.noise * self.draws.random())
            policy.observe(shape, took, ranks, gained)
            done += gained

    def batch(self, tokens=128):
        """One call whose rows end one by one, in slots that are halved when half of the rows have ended -> the policy,
        the seconds of all rounds, and each round's (rows, shape)."""
        start, done, rounds = self.rows, [1] * self.rows, [0] * self.rows
        policy, took, ran = FittedPolicy(self.fit, self.candidates, start, 5), 0.0, []
        while active := [row for row in range(start) if done[row] < tokens]:
            self.rows = up_to_power(len(active))
            place = self.place(lambda: tokens - min(done))
            policy.enter(place)
            while 2 * len(active) > self.rows:
                shape = self.next(policy, place)
                ran.append((self.rows, shape))
                ranks = [self.walk(shape.tree or TokenTree.chain(0), row) for row in active]
                for row, passed in zip(active, ranks, strict=True):
                    gained = 1 + sum(rank is not None for _, rank in passed)
                    done[row], rounds[row] = min(tokens, done[row] + gained), rounds[row] + 1
                policy.observe(shape, self.seconds(shape), ranks, 1.0)
                took += self.seconds(shape)
                active = [row for row in active if done[row] < tokens]
        self.rows = start
        policy.finish(rounds, [tokens - 1] * start)
        return policy, took, ran

    def speed(self, calls):
        """Tokens per step of so many calls, expected on the shapes that they chose."""
        before = len(self.rounds)
        for _ in range(calls):
            self.call()
        chosen = self.rounds[before:]
        return sum(map(self.tokens, chosen)) / sum(map(self.seconds, chosen)) * 0.001

    def reached(self, path):
        """The probability that all of `path` is accepted."""
        if not path:
            return 1.0
        shares = self.after(path[:-1])
        return self.reached(path[:-1]) * (shares[path[-1]] if path[-1] < len(shares) else 0.0)

    def tokens(self, shape):
        """Expected tokens of a round."""
        tree = shape.tree or TokenTree.chain(0 if shape == PLAIN else 3)
        return 1.0 + sum(map(self.reached, tree.choices))

    def best(self):
        """Tokens per step of the best tree or chain there is."""
        shapes = [shape_of(TokenTree.chain(n)) for n in (1, 2, 3, 4, 5, 6, 8, 10, 12)]
        for depth in (1, 2, 3, 4, 6, 8) if self.candidates.shapes == "tree" else ():
            deepest = min(depth, self.candidates.deepest or depth)
            value = lambda path, deepest=deepest: self.reached(path) or None if len(path) <= deepest else None
            grown = best_paths(value, SIZES[-1] - 1)
            shapes += [shape_of(TokenTree.from_choices(grown[: size - 1])) for size in SIZES if size - 1 <= len(grown)]
        return max([1.0, *(self.tokens(shape) * 0.001 / self.seconds(shape) for shape in shapes)])


CASES = {
    "heads": dict(acceptance=HEADS, deepest=5, own=greedy_tree(HEADS, 64)),
    "model": dict(acceptance=MODEL, level=0.12, own=TokenTree.chain(5)),
    "easy": dict(acceptance=RIGHT, level=0.12, own=TokenTree.chain(5)),
    "chains": dict(acceptance=MODEL, level=0.12, shapes="chain"),
}
