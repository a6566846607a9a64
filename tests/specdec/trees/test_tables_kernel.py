"""The kernel of the index tables against PyTorch, on a GPU or in Triton's interpreter."""

from dataclasses import fields

import pytest
import torch

from attention.dispatch import triton_available
from specdec.trees.tensors import TreeTensors, broken, tables_of
from tests.attention.devices import DEVICE

pytestmark = pytest.mark.skipif(not triton_available(torch.device(DEVICE)), reason="needs triton")


def parents_of(rows: int, size: int, bad: bool) -> torch.Tensor:
    """Random trees that lack some nodes, of which each has another shape; `bad`: any numbers at all."""
    generator = torch.Generator().manual_seed(size)
    if bad:
        return torch.randint(-2, size + 2, (rows, size), generator=generator)
    parents = torch.full((rows, size), -1)
    for row in range(rows):
        there = [0]
        for node in range(1, size):
            if int(torch.randint(0, 5, (), generator=generator)):
                near = there[-4:] if row % 2 else there
                parents[row, node] = near[int(torch.randint(0, len(near), (), generator=generator))]
                there.append(node)
    return parents


@pytest.mark.covering
@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize(
    ("rows", "size", "depth", "children"),
    [(1, 1, 0, 0), (2, 2, 1, 1), (3, 7, 2, 3), (2, 61, 6, 10), (3, 64, 64, 64), (2, 70, 9, 3), (1, 131, 4, 200)],
)
def test_one_launch_makes_the_tables_of_the_reference(rows, size, depth, children, bad):
    """Also where a tree is deeper, or a node has more children, than the tables have room for, and for no trees."""
    from specdec.trees.tables_kernel import launch_tables

    parents = parents_of(rows, size, bad).to(DEVICE)
    wide = torch.stack([parents, parents], 2)[:, :, 0]  # rows that do not lie in one piece
    *tables, wrong = launch_tables(wide, depth, children)
    expected = tables_of(parents, depth, children)
    assert wrong.equal(broken(parents, depth))
    for field, mine in zip(fields(TreeTensors), tables, strict=True):
        assert mine.equal(getattr(expected, field.name)), field.name
