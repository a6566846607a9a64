"""The kernels of what a round reads, packs and keeps against PyTorch, on a GPU or in Triton's interpreter."""

import pytest
import torch

from attention.dispatch import triton_available
from specdec.acceptance import Acceptance
from specdec.requests.kept import keep_accepted, recent
from specdec.rounds.packing import pack
from specdec.trees.draft import Draft
from specdec.trees.tensors import TreeBatch
from specdec.trees.tree import TokenTree
from tests.attention.devices import DEVICE

pytestmark = pytest.mark.skipif(not triton_available(torch.device(DEVICE)), reason="needs triton")
TREE = TokenTree((None, 0, 0, 1, 1, 2, 4))
PARENTS = torch.tensor([[-1, 0, 0, 1, 1, 2, 4], [-1, 0, 1, -1, 0, 4, 4], [-1] * 7])
VALID = torch.tensor([[1] * 7, [1, 1, 0, 1, 1, 0, 1], [1] + [0] * 6], dtype=torch.bool)
DRAFTS = {
    "a tree": lambda tokens: Draft(TREE, tokens),
    "parts of a tree": lambda tokens: Draft(TREE, tokens, valid=VALID.to(DEVICE)),
    "a tree each": lambda tokens: Draft(TreeBatch(PARENTS.to(DEVICE), 3, 2), tokens),
    "nothing": lambda tokens: Draft(TokenTree.chain(0), tokens[:, :1]),
}


@pytest.mark.parametrize("kind", DRAFTS)
def test_outcomes_are_packed_in_one_launch(kind):
    """With faults of one message in several reports: flags, of rows and of columns, and numbers of several types."""
    draft = DRAFTS[kind](torch.arange(21, device=DEVICE).view(3, 7))
    ends = torch.tensor([6, 5, 0], device=DEVICE)
    verdict = Acceptance.of_nothing(draft, ends + 50) if draft.max_depth == 0 else Acceptance.at(draft, ends, ends + 50)
    numbers = torch.zeros(3, 2, 9, device=DEVICE)
    numbers[1, 0, 4], numbers[2, 1, 8] = torch.nan, -torch.inf
    flags = torch.tensor([[0, 0, 0], [1, 0, 1], [0, 0, 0]], dtype=torch.bool, device=DEVICE)
    faults = [
        (numbers[:, 0, ::4], "numbers"), (flags, "flags"), (numbers[:, 1].half(), "numbers"), (flags[:, 1], "none"),
        (numbers[:, :, 8].double(), "last"), (flags.T[:, 1], "flags"),
    ]  # fmt: skip
    expected, found = (pack(faults, draft, verdict, verdict.emitted(draft), impl) for impl in ("reference", "triton"))
    assert found[0].equal(expected[0]) and found[1:] == expected[1:] and found[0].shape[1] == found[1][-1]
    first, last = found[1][3:5]
    assert found[0][:, first:last].tolist() == [[0, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 1]]


@pytest.mark.parametrize("count", [1, 5])
def test_the_last_tokens_of_rows(count):
    """Of texts that are shorter, too."""
    tokens, lengths = torch.arange(90, device=DEVICE).view(3, 30)[:, :20], torch.tensor([20, 1, 3], device=DEVICE)
    found = [recent(tokens, lengths, count, impl) for impl in ("reference", "triton")]
    assert found[0].equal(found[1]) and found[0][:, -1].tolist() == [19, 30, 62]


@pytest.mark.parametrize(("room", "width"), [(1, 5), (4, 1030), (7, 64)])
@pytest.mark.parametrize("accepted", [(0, 2, 3), (3, 1, 0)])
def test_features_of_accepted_nodes_are_kept(room, width, accepted):
    """In place, whatever stays of the old ones; rows that have ended keep all of them."""
    generator = torch.Generator().manual_seed(width)
    features = torch.randn(3, 7, width, generator=generator).half().to(DEVICE)
    path, counts = torch.tensor([[1, 4, 6], [2, 5, 0], [1, 3, 0]], device=DEVICE), torch.tensor(accepted, device=DEVICE)
    alive, before = torch.tensor([True, True, False], device=DEVICE), torch.randn(3, room, width, generator=generator)
    before = before.half().to(DEVICE)
    found = [before.clone(), before.clone()]
    for kept, impl in zip(found, ("reference", "triton"), strict=True):
        keep_accepted(kept, features, path, counts, alive, impl)
    assert found[0].equal(found[1]) and found[0][2].equal(before[2])
    for row in range(2):
        nodes = [0, *path[row, : accepted[row]].tolist()]
        assert found[0][row].equal(torch.cat([before[row], features[row, nodes]])[-room:])
