"""Which choices of which heads are right on text, and the sparse tree that follows (after Cai et al. 2024, section
2.3.3).
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from medusa.heads import MedusaHeads
from specdec.loading import local_folder
from specdec.planning.costs import Costs
from specdec.planning.tree_search import best_paths
from specdec.sampling.draws import top
from specdec.training.backbone import Backbone
from specdec.training.checkpoint import write_json
from specdec.training.data import Rows
from specdec.training.labels import IGNORED, shifted_labels
from specdec.training.linear_loss import positions_at_once
from specdec.trees.tree import TokenTree

TREE = "tree.json"
TOPS = (1, 5, 10)
MOST_TREES = 8  # that a calibration looks at


@dataclass(frozen=True, eq=False)
class HeadRanks:
    """Where the right tokens stood among the heads' choices at M positions of texts, one after the other.

    `ranks [M, K]` int64: the right token's place in head k's order, or `choices` where it came later than that; `known
    [M, K]` bool: whether the text went on as far as head k looks; `first [M]` bool: whether the position does not
    follow the one before. Raises ValueError where no position is known to all heads."""

    ranks: Tensor
    known: Tensor
    first: Tensor
    choices: int

    def __post_init__(self):
        if (
            self.ranks.shape != self.known.shape
            or self.ranks.ndim != 2
            or self.first.shape != self.ranks.shape[:1]
            or self.choices < 1
        ):
            shapes = ", ".join(str(list(tensor.shape)) for tensor in (self.ranks, self.known, self.first))
            raise ValueError(
                f"ranks and known must both be [M, K], first [M] and choices at least 1, got {shapes} and "
                f"{self.choices}"
            )
        count = self.ranks.shape[1]
        if not bool(self.known.all(1).any()):
            raise ValueError(f"no text is longer than the {count + 1} tokens that {count} heads need")

    def accuracies(self) -> list[list[float]]:
        """`a[k][r]`: the share of positions at which the choice of rank r of head k was right."""
        columns = [ranks[known] for ranks, known in zip(self.ranks.T, self.known.T, strict=True)]
        return [
            (torch.bincount(ranks, minlength=self.choices + 1)[: self.choices].double() / len(ranks)).tolist()
            for ranks in columns
        ]

    def path_shares(self, tree: TokenTree | None = None) -> dict[tuple[int, ...], float]:
        """By path of ranks the share of positions at which all its tokens were right, without those that never were.

        Of the positions where all heads are known; with `tree`, of those at which a round begins when the texts are
        decoded with it: a round ends where the heads go wrong, and the next one begins at words that are harder to
        guess than most."""
        counted, choices = self.known.all(1), self.choices
        if tree is not None:
            begins = torch.zeros_like(counted)
            begins[self.rounds(tree)] = True
            counted = (
                counted & begins if bool((counted & begins).any()) else counted
            )  # short texts may be passed in one round that is not known
        ranks, shares = self.ranks[counted], dict[tuple[int, ...], float]()
        positions, code = len(ranks), torch.zeros(1, dtype=torch.int64)
        for depth in range(1, ranks.shape[1] + 1):
            right = ranks[:, depth - 1] < choices
            ranks, code = (
                ranks[right],
                code.expand(len(right))[right] * choices + ranks[right, depth - 1],
            )  # one number for each path
            codes, counts = code.unique(return_counts=True)
            places = [codes // choices**place % choices for place in reversed(range(depth))]
            shares |= {
                tuple(path): count / positions
                for path, count in zip(torch.stack(places, 1).tolist(), counts.tolist(), strict=True)
            }
        return shares

    def rounds(self, tree: TokenTree) -> list[int]:
        """The positions at which rounds begin when the texts are decoded with `tree`."""
        paths, starts, skipped = set(tree.choices), [], 0
        for position, (ranks, known, first) in enumerate(
            zip(*(x.tolist() for x in (self.ranks, self.known, self.first)), strict=True)
        ):
            if skipped and not first:
                skipped -= 1
                continue
            starts.append(position)
            path = tuple(rank if one and rank < self.choices else None for rank, one in zip(ranks, known, strict=True))
            skipped = next((depth for depth in range(len(path)) if path[: depth + 1] not in paths), len(path))
        return starts


@torch.no_grad()
def head_ranks(
    heads: MedusaHeads, model, texts: Rows | Iterable[Tensor], choices: int = 10, at_once: int = 4
) -> HeadRanks:
    """Let the heads guess at every position of `texts`, and see where the tokens that really came stand among their
    first `choices`.

    `texts` are token ids `[S]`, or `Rows`, of which only labels count, `at_once` of them a forward: text of the kind
    that is to be generated, best generated by the model itself, and none that the heads were trained on. Raises
    ValueError when no text is long enough for all heads."""
    backbone, count, found = Backbone(model), heads.config.num_heads, []
    for batch in _batches(texts, at_once):
        follows = torch.zeros(batch.tokens.shape, dtype=torch.bool)
        follows[:, 1:] = batch.documents[:, 1:] == batch.documents[:, :-1]
        hidden = backbone(batch.tokens.to(model.device), batch.documents).flatten(0, 1)
        following = torch.stack(
            [shifted_labels(batch.labels, shift, batch.documents).flatten() for shift in range(1, count + 2)], 1
        ).cpu()
        labels = following[:, 1:]
        # the token after a position must be the model's own, as it is where a round begins
        learned = (following[:, 0] != IGNORED) & (labels != IGNORED).any(1)
        first = ~(follows.flatten() & learned.roll(1))
        for some in learned.nonzero()[:, 0].split(positions_at_once(heads.config.vocab_size)):
            best = torch.stack(
                [
                    top(heads.logits(head, hidden[some.to(hidden.device)], backbone.lm_head), choices)[1]
                    for head in range(count)
                ],
                1,
            )
            right = best.cpu() == labels[some, :, None]
            found.append(
                (torch.where(right.any(-1), right.int().argmax(-1), choices), labels[some] != IGNORED, first[some])
            )
    nothing = (
        torch.zeros(0, count, dtype=torch.int64),
        torch.zeros(0, count, dtype=torch.bool),
        torch.zeros(0, dtype=torch.bool),
    )
    return HeadRanks(*(torch.cat(tensors) for tensors in zip(nothing, *found, strict=True)), choices)


def _batches(texts: Rows | Iterable[Tensor], at_once: int) -> Iterable[Rows]:
    if isinstance(texts, Rows):
        return (texts.take(slice(start, start + at_once)) for start in range(0, len(texts), at_once))
    alone = (text[None].cpu() for text in texts)
    return (Rows(text, text, torch.zeros_like(text)) for text in alone)


def top_accuracies(accuracies: Sequence[Sequence[float]], tops: Sequence[int] = TOPS) -> list[dict[int, float]]:
    """Per head, how often the right token is among its first 1, 5, 10 choices, from `HeadRanks.accuracies`.

    >>> top_accuracies([[0.5, 0.25, 0.125]], (1, 2))
    [{1: 0.5, 2: 0.75}]
    """
    return [{top: sum(ranks[:top]) for top in tops} for ranks in accuracies]


def calibrated_tree(found: HeadRanks, size: int, costs: Costs | None = None) -> TokenTree:
    """A tree of `size` nodes, the root included, with the most tokens a round; with `costs` one of up to so many with
    the most tokens a second.

    Heads err together, so whole paths are counted: the product of accuracies along a path, by which Medusa's trees were
    grown, puts too much on the sides of the tree. They are counted at all positions first, then where rounds begin with
    the tree that follows, until that no longer changes it or MOST_TREES have been looked at, of which the best is
    taken. There may be fewer nodes than asked for where heads and choices allow no more. Raises ValueError for a size
    below 2."""
    if size < 2:
        raise ValueError(f"size must be at least 2, got {size}")
    seen: dict[TokenTree, float] = {}
    shares = found.path_shares()
    while len(seen) < MOST_TREES:
        tree = _grown(shares, found, size, costs)
        if tree in seen:
            break
        shares = found.path_shares(tree)
        seen[tree] = sum(_reached(tree, shares)) / (1.0 if costs is None else costs.of_round(tree.size, tree.max_depth))
    return max(seen, key=seen.__getitem__)


def _grown(shares: dict[tuple[int, ...], float], found: HeadRanks, size: int, costs: Costs | None) -> TokenTree:
    """The best tree for these shares of paths. Where they fall from rank to rank, no tree of that size has a larger
    sum.
    """
    heads = found.ranks.shape[1]

    def grown(depth: int) -> list[tuple[int, ...]]:
        share = lambda path: shares.get(path, 0.0) if len(path) <= depth and path[-1] < found.choices else None
        return best_paths(share, size - 1)

    if costs is None:
        return TokenTree.from_choices(grown(heads))
    fastest, kept = 0.0, []
    for depth in range(1, heads + 1):
        tokens, deepest, paths = 1.0, 0, grown(depth)
        for count, path in enumerate(paths, 1):
            tokens, deepest = tokens + shares.get(path, 0.0), max(deepest, len(path))
            speed = tokens / costs.of_round(count + 1, deepest)
            if speed > fastest:
                fastest, kept = speed, paths[:count]
    return TokenTree.from_choices(kept)


def reached(tree: TokenTree, found: HeadRanks) -> list[float]:
    """Per node the share of rounds, decoding with `tree`, in which its whole path was right; the root has 1. Their sum
    is a round's tokens.
    """
    return _reached(tree, found.path_shares(tree))


def _reached(tree: TokenTree, shares: dict[tuple[int, ...], float]) -> list[float]:
    return [1.0, *(shares.get(path, 0.0) for path in tree.choices)]


def save_tree(
    folder: str | Path, tree: TokenTree, accuracies: list[list[float]], costs: Costs | None = None, **more
) -> None:
    """Write tree.json into the heads' `folder`: the tree's choices, the accuracies and costs that it follows from, and
    `more`.
    """
    found = {
        "choices": [list(path) for path in tree.choices],
        "nodes": tree.size,
        "accuracies": accuracies,
        "costs": costs and asdict(costs),
        **more,
    }
    write_json(found, Path(folder) / TREE)


def load_tree(name: str | Path) -> TokenTree:
    """The calibrated tree in a folder of heads, or in a hub repository. FileNotFoundError says how one is made."""
    folder = local_folder(name)
    if folder is None:
        from huggingface_hub import hf_hub_download

        folder = Path(hf_hub_download(str(name), TREE)).parent
    if not (folder / TREE).is_file():
        raise FileNotFoundError(f"{folder} has no {TREE}; python -m scripts.calibrate_medusa writes one")
    return TokenTree.from_choices([tuple(path) for path in json.loads((folder / TREE).read_text())["choices"]])
