"""How often each choice of each head is right on text, and the sparse tree that follows (Cai et al. 2024, 2.3.3)."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from medusa.base_model import check_base
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
MOST_TREES = 8  # that a calibration tries


@dataclass(frozen=True, eq=False)
class HeadRanks:
    """The ranks of the right tokens among the heads' choices, at M positions of texts in order.

    ranks      `[M, K]` int64: the right token's rank in head k's order, or `choices` where it is beyond that
    known      `[M, K]` bool: whether the text reaches the token that head k guesses
    first      `[M]` bool: whether the position does not follow the one before
    choices    how many choices of each head were ranked

    Raises ValueError for other shapes, or where no position is known to all heads."""

    ranks: Tensor
    known: Tensor
    first: Tensor
    choices: int

    def __post_init__(self):
        ranks, known, first = self.ranks.shape, self.known.shape, self.first.shape
        if ranks != known or len(ranks) != 2 or first != ranks[:1] or self.choices < 1:
            raise ValueError(
                f"ranks and known must both be [M, K], first [M] and choices at least 1, got {list(ranks)}, "
                f"{list(known)}, {list(first)} and {self.choices}"
            )
        count = self.ranks.shape[1]
        if not bool(self.known.all(1).any()):
            raise ValueError(f"no text is longer than the {count + 1} tokens that {count} heads need")

    def accuracies(self) -> list[list[float]]:
        """`a[k][r]`: the share of positions at which the choice of rank r of head k was right."""
        columns = [ranks[known] for ranks, known in zip(self.ranks.T, self.known.T, strict=True)]
        counts = [torch.bincount(ranks, minlength=self.choices + 1)[: self.choices] for ranks in columns]
        return [(right.double() / len(ranks)).tolist() for right, ranks in zip(counts, columns, strict=True)]

    def path_shares(self, tree: TokenTree | None = None) -> dict[tuple[int, ...], float]:
        """The share of positions at which all tokens of a path were right, by path of ranks; absent where it is zero.

        Positions count where all heads are known; with `tree`, only those where a round begins when the texts are
        decoded with it. A round ends where the heads are wrong, so the next begins at words that are harder than most.
        """
        counted, choices = self.known.all(1), self.choices
        if tree is not None:
            begins = torch.zeros_like(counted)
            begins[self.rounds(tree)] = True
            # a short text may be one round, whose position is not known to all heads
            counted = counted & begins if bool((counted & begins).any()) else counted
        ranks, shares = self.ranks[counted], dict[tuple[int, ...], float]()
        positions, code = len(ranks), torch.zeros(1, dtype=torch.int64)
        for depth in range(1, ranks.shape[1] + 1):
            right = ranks[:, depth - 1] < choices
            code = code.expand(len(right))[right] * choices + ranks[right, depth - 1]  # one number for each path
            ranks = ranks[right]
            codes, counts = code.unique(return_counts=True)
            places = [codes // choices**place % choices for place in reversed(range(depth))]
            paths = map(tuple, torch.stack(places, 1).tolist())
            shares |= {path: count / positions for path, count in zip(paths, counts.tolist(), strict=True)}
        return shares

    def rounds(self, tree: TokenTree) -> list[int]:
        """The positions at which rounds begin when the texts are decoded with `tree`."""
        paths, starts, skipped = set(tree.choices), [], 0
        columns = (tensor.tolist() for tensor in (self.ranks, self.known, self.first))
        for position, (ranks, known, first) in enumerate(zip(*columns, strict=True)):
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
    """The ranks of the tokens of `texts` among the first `choices` of each head, at every position.

    `texts` are token ids `[S]`, or `Rows`, of which only labels count, `at_once` of them a forward: text of the kind
    that is to be generated, best generated by the model itself, and none that the heads were trained on. Warns
    of a model that the heads were not made for. Raises ValueError for one of other sizes, and where no text is long
    enough for all heads."""
    check_base(heads.config, model)
    backbone, count = Backbone(model), heads.config.num_heads
    nothing = torch.zeros(0, count, dtype=torch.int64)
    found = [(nothing, nothing.bool(), torch.zeros(0, dtype=torch.bool))]
    for batch in _batches(texts, at_once):
        follows = torch.zeros(batch.tokens.shape, dtype=torch.bool)
        follows[:, 1:] = batch.documents[:, 1:] == batch.documents[:, :-1]
        hidden = backbone(batch.tokens.to(model.device), batch.documents).flatten(0, 1)
        shifts = range(1, count + 2)
        each = [shifted_labels(batch.labels, shift, batch.documents).flatten() for shift in shifts]
        following = torch.stack(each, 1).cpu()
        labels = following[:, 1:]
        # the token after a position must be the model's own, as it is where a round begins
        learned = (following[:, 0] != IGNORED) & (labels != IGNORED).any(1)
        first = ~(follows.flatten() & learned.roll(1))
        for some in learned.nonzero()[:, 0].split(positions_at_once(heads.config.vocab_size)):
            states = hidden[some.to(hidden.device)]
            best = [top(heads.logits(head, states, backbone.lm_head), choices)[1] for head in range(count)]
            right = torch.stack(best, 1).cpu() == labels[some, :, None]
            ranks = torch.where(right.any(-1), right.int().argmax(-1), choices)
            found.append((ranks, labels[some] != IGNORED, first[some]))
    ranks, known, first = (torch.cat(tensors) for tensors in zip(*found, strict=True))
    return HeadRanks(ranks, known, first, choices)


def _batches(texts: Rows | Iterable[Tensor], at_once: int) -> Iterable[Rows]:
    if isinstance(texts, Rows):
        return (texts.take(slice(start, start + at_once)) for start in range(0, len(texts), at_once))
    alone = (text[None].cpu() for text in texts)
    return (Rows(text, text, torch.zeros_like(text)) for text in alone)


def top_accuracies(accuracies: Sequence[Sequence[float]], tops: Sequence[int] = TOPS) -> list[dict[int, float]]:
    """How often the right token is among each head's first 1, 5, 10 choices, from `HeadRanks.accuracies`.

    >>> top_accuracies([[0.5, 0.25, 0.125]], (1, 2))
    [{1: 0.5, 2: 0.75}]
    """
    return [{top: sum(ranks[:top]) for top in tops} for ranks in accuracies]


def calibrated_tree(found: HeadRanks, size: int, costs: Costs | None = None) -> TokenTree:
    """The tree of `size` nodes, root included, with the most tokens a round; with `costs`, the most tokens a second.

    Heads err together, so whole paths are counted: the product of accuracies along a path, which Medusa's own trees
    use, puts too many nodes on the sides. Paths are counted at all positions first, then where rounds begin with the
    tree that follows, until the tree no longer changes or MOST_TREES were tried; the best of them is returned. With
    `costs` `size` is an upper bound; there are fewer nodes too where heads and choices allow no more. Raises ValueError
    for a size below 2."""
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
    """The best tree for these shares of paths: if they fall from rank to rank, no tree of its size has a larger sum."""
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
    """The share of rounds with `tree` in which a node's whole path was right, by node; their sum is tokens a round."""
    return _reached(tree, found.path_shares(tree))


def _reached(tree: TokenTree, shares: dict[tuple[int, ...], float]) -> list[float]:
    return [1.0, *(shares.get(path, 0.0) for path in tree.choices)]


def save_tree(
    folder: str | Path, tree: TokenTree, accuracies: list[list[float]], costs: Costs | None = None, **more
) -> None:
    """Write tree.json into the heads' `folder`: the tree's choices, accuracies and costs, and `more`."""
    shape = {"choices": [list(path) for path in tree.choices], "nodes": tree.size}
    write_json({**shape, "accuracies": accuracies, "costs": costs and asdict(costs), **more}, Path(folder) / TREE)


def load_tree(name: str | Path) -> TokenTree:
    """The calibrated tree in a folder of heads or a hub repository; raises FileNotFoundError where there is none."""
    folder = local_folder(name)
    if folder is None:
        from huggingface_hub import hf_hub_download

        folder = Path(hf_hub_download(str(name), TREE)).parent
    if not (folder / TREE).is_file():
        raise FileNotFoundError(f"{folder} has no {TREE}; python -m scripts.calibrate_medusa writes one")
    return TokenTree.from_choices([tuple(path) for path in json.loads((folder / TREE).read_text())["choices"]])
