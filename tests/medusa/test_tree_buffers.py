"""The tree that Medusa published for Vicuna-7B, and what its decoder builds from it: mask, positions, candidate
indices, paths to the leaves.
"""

import torch

from medusa.drafter import _choices
from specdec.trees.tree import TokenTree

# Cai et al. 2024, the 63 choices found for Vicuna-7B
PUBLISHED = [
    [0],
    [0, 0],
    [1],
    [0, 1],
    [2],
    [0, 0, 0],
    [1, 0],
    [0, 2],
    [3],
    [0, 3],
    [4],
    [0, 4],
    [2, 0],
    [0, 5],
    [0, 0, 1],
    [5],
    [0, 6],
    [6],
    [0, 7],
    [0, 1, 0],
    [1, 1],
    [7],
    [0, 8],
    [0, 0, 2],
    [3, 0],
    [0, 9],
    [8],
    [9],
    [1, 0, 0],
    [0, 2, 0],
    [1, 2],
    [0, 0, 3],
    [4, 0],
    [2, 1],
    [0, 0, 4],
    [0, 0, 5],
    [0, 0, 0, 0],
    [0, 1, 1],
    [0, 0, 6],
    [0, 3, 0],
    [5, 0],
    [1, 3],
    [0, 0, 7],
    [0, 0, 8],
    [0, 0, 9],
    [6, 0],
    [0, 4, 0],
    [1, 4],
    [7, 0],
    [0, 1, 2],
    [2, 0, 0],
    [3, 1],
    [2, 2],
    [8, 0],
    [0, 5, 0],
    [1, 5],
    [1, 0, 1],
    [0, 2, 1],
    [9, 0],
    [0, 6, 0],
    [0, 0, 0, 1],
    [1, 6],
    [0, 7, 0],
]
TOP_K = 10


def published_buffers(choices):
    """As the paper describes them: nodes sorted by depth, then by path; candidate c of head d has index d * TOP_K + c +
    1, the root 0.
    """
    order = [(), *sorted((tuple(choice) for choice in choices), key=lambda path: (len(path), path))]
    mask = [[row[: len(column)] == column for column in order] for row in order]
    candidates = [0] + [(len(path) - 1) * TOP_K + path[-1] + 1 for path in order[1:]]
    leaves = [path for path in order if not any(other[:-1] == path for other in order if other)]
    retrieve = {tuple(order.index(leaf[:depth]) for depth in range(len(leaf) + 1)) for leaf in leaves}
    return mask, [len(path) for path in order], candidates, retrieve


def test_the_buffers_are_those_of_the_published_construction():
    mask, positions, candidates, retrieve = published_buffers(PUBLISHED)
    tree = TokenTree.from_choices(PUBLISHED)
    head, choice = _choices(tree, torch.device("cpu"))
    assert tree.size == 64 and len(PUBLISHED) == 63
    assert [[bool(words[other // 64] >> other % 64 & 1) for other in range(tree.size)] for words in tree.bits] == mask
    assert list(tree.depths) == positions and [0, *(head * TOP_K + choice + 1).tolist()] == candidates
    assert {(0, *tree.path(node)) for node in range(tree.size) if not tree.children[node]} == retrieve
