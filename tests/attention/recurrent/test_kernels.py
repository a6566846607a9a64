"""The Triton kernels of recurrent layers against their references, on a GPU or in Triton's interpreter."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from attention.dispatch import triton_available
from attention.recurrent.nodes import replay_nodes, run_nodes
from attention.recurrent.rules import RULES
from tests.attention.devices import DEVICE
from tests.attention.recurrent.problems import PARENTS, by_tokens, sees

pytestmark = pytest.mark.skipif(not triton_available(torch.device(DEVICE)), reason="needs triton")
ROOM = 3  # tokens of room beyond the nodes


def case(kind: str, rows: int, nodes: int, groups: int = 1, repeats: int = 2, dk: int = 5, dv: int = 7, taps: int = 4,
         bias: bool = True, cells: int | None = None, seed: int = 0) -> dict:  # fmt: skip
    """Random states of more cells than rows, cells in a random order, and what `run_nodes` takes of the nodes."""
    generator = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=generator).to(DEVICE)
    heads, count = groups * repeats, cells or rows + 2
    of_rows = torch.randperm(count, generator=generator)[:rows].to(DEVICE)
    constants: tuple[Tensor, ...] = ()
    if kind == "convolution":
        state, inputs, reads = rand(count, dv, taps - 1), (rand(rows, nodes, dv),), ()
        constants = (rand(dv, taps), *([rand(dv)] if bias else []))
    else:
        key = torch.nn.functional.normalize(rand(rows, nodes, groups, dk), dim=-1)
        gates = -rand(rows, nodes, heads, dk if kind.endswith("by channel") else 1).exp() / 4
        state, reads = rand(count, heads, dk, dv), (rand(rows, nodes, groups, dk),)
        inputs = (key, rand(rows, nodes, heads, dv), gates)
        if kind != "state space":
            inputs = (*inputs, rand(rows, nodes, heads).sigmoid())
    kept = tuple(rand(count, nodes + ROOM, *x.shape[2:]) for x in inputs)
    name = kind.removesuffix(" by channel")
    return dict(kind=name, states=state, cells=of_rows, inputs=inputs, reads=reads, constants=constants, kept=kept)


KINDS = ("convolution", "delta rule", "delta rule by channel", "state space")
every_kind = pytest.mark.parametrize("kind", KINDS)


def check(given: dict, mask: Tensor | None, tolerance: float = 1e-4) -> None:
    """Outputs and what is kept equal the reference's; no state changes."""
    kept, before = tuple(x.clone() for x in given["kept"]), given["states"].clone()
    expected = run_nodes(sees=mask, impl="reference", **given | {"kept": kept})
    ours = run_nodes(sees=mask, impl="triton", **given)
    scale = 1 + expected.abs().max()
    assert (ours - expected).abs().max() <= tolerance * scale
    assert all(mine.equal(its) for mine, its in zip(given["kept"], kept, strict=True)), "what is kept"
    assert given["states"].equal(before), "a state has changed"


@every_kind
def test_nodes_of_a_tree_equal_their_tokens_one_after_the_other(kind):
    """The loop over single tokens is the formula; rows lie in permuted cells."""
    given = case(kind, 2, len(PARENTS))
    expected, _ = by_tokens(given["kind"], given["states"][given["cells"]].cpu(), *_on_host(given), PARENTS)
    ours = run_nodes(sees=sees().expand(2, -1, -1).to(DEVICE), impl="triton", **given)
    assert torch.allclose(ours.cpu(), expected, rtol=1e-4, atol=1e-5)


def _on_host(given: dict) -> tuple[tuple, tuple, tuple]:
    inputs, reads, constants = (tuple(x.cpu() for x in given[name]) for name in ("inputs", "reads", "constants"))
    return inputs, reads, constants


@st.composite
def parents(draw, most: int = 18) -> tuple[int | None, ...]:
    """A tree or, with several roots, a forest, in which a parent comes before its children."""
    nodes = draw(st.integers(1, most))
    return (None, *(draw(st.one_of(st.none(), st.integers(0, node - 1))) for node in range(1, nodes)))


@every_kind
@settings(max_examples=10, deadline=None, derandomize=True, phases=[Phase.generate])
@given(tree=parents(), other=parents(), data=st.data())
def test_shapes_trees_and_chains(kind, tree, other, data):
    """Odd shapes, grouped heads, rows with trees of their own or one for all, ragged rows, chains."""
    ints = lambda low, high: data.draw(st.integers(low, high))
    nodes, rows = len(tree), ints(1, 3)
    given = case(kind, rows, nodes, ints(1, 2), ints(1, 3), ints(1, 18), ints(1, 19), ints(2, 5), ints(0, 1) == 1)
    mask: Tensor | None = None
    if (shape := data.draw(st.sampled_from(["chain", "one", "own"]))) != "chain":
        mask = sees(tree)[None].to(DEVICE)
        if shape == "own":
            size, theirs = min(nodes, len(other)), torch.eye(nodes, dtype=torch.bool)
            theirs[:size, :size] = sees(other)[:size, :size]
            mask = torch.cat([mask.expand(rows - 1, -1, -1), theirs[None].to(DEVICE)])
    for x in given["inputs"]:  # ragged: a row's last tokens are zeros
        x[-1, ints(1, nodes) :] = 0
    check(given, mask)


@every_kind
def test_sixty_four_nodes_and_no_more(kind):
    given = case(kind, 1, 64, dk=16, dv=16, cells=1)
    check(given, None)
    tree = tuple(None if node == 0 else (node - 1) // 2 for node in range(64))
    check(given, sees(tree)[None].to(DEVICE))
    large = case(kind, 1, 65)
    with pytest.raises(ValueError, match="takes up to 64 nodes of a row, got 65"):
        run_nodes(sees=None, impl="triton", **large)
    with pytest.raises(ValueError, match="none for layers of the kind 'selective scan'"):
        run_nodes(sees=None, impl="triton", **large | {"kind": "selective scan"})


@pytest.mark.parametrize("kind", ["delta rule", "delta rule by channel"])
def test_strong_decays_and_equal_keys(kind):
    """Nothing overflows where decays are strong, nothing cancels where every key is the same."""
    given = case(kind, 1, 64, dk=16, dv=16)
    keys, values, gates, betas = given["inputs"]
    strong = given | {"inputs": (keys, values, gates * 400, betas)}
    check(strong, None)
    same = given | {"inputs": (keys[:, :1].expand_as(keys).clone(), values, gates * 0, torch.ones_like(betas))}
    check(same, None)


def replayed(given: dict, places: Tensor, counts: Tensor, impl: str, layers: int = 2) -> Tensor:
    states = torch.stack([given["states"] + layer for layer in range(layers)])
    kept = tuple(torch.stack([x * (1 + layer) for layer in range(layers)]) for x in given["kept"])
    constants = tuple(torch.stack([x] * layers) for x in given["constants"])
    replay_nodes(given["kind"], states, kept, given["cells"], places, counts, constants, impl)
    return states


@every_kind
def test_the_replay_of_a_path(kind):
    """Of rows of different counts, one of none, in several layers at once; other cells stay as they are."""
    given = case(kind, 3, 9, 2, 2, dk=17, dv=18)
    given["kept"][2 if kind != "convolution" else 0].neg_().abs_().neg_()  # gates decay
    places = torch.tensor([[0, 2, 5, 8], [3, 7, 7, 7], [1, 1, 1, 1]], device=DEVICE)
    counts = torch.tensor([4, 2, 0], device=DEVICE)
    ours, expected = (replayed(given, places, counts, impl) for impl in ("triton", "reference"))
    assert torch.allclose(ours, expected, rtol=1e-4, atol=1e-4)
    before = torch.stack([given["states"], given["states"] + 1])
    moved = [int(cell) for cell in given["cells"][:2]]
    others = [cell for cell in range(before.shape[1]) if cell not in moved]
    assert ours[:, others].equal(before[:, others]) and not ours[:, moved].equal(before[:, moved])


@every_kind
def test_a_path_that_is_replayed_gives_what_its_nodes_read(kind):
    """After the replay of the path to a node, its child reads what it read in the tree."""
    given, path, child = case(kind, 2, len(PARENTS)), [0, 2, 5], 5
    mask = sees().expand(2, -1, -1).to(DEVICE)
    in_tree = run_nodes(sees=mask, impl="triton", **given)[:, child]
    states = given["states"][None].clone()
    places = torch.tensor([path[:-1]] * 2, device=DEVICE)
    counts = torch.tensor([2, 2], device=DEVICE)
    kept, constants = tuple(x[None] for x in given["kept"]), tuple(x[None] for x in given["constants"])
    replay_nodes(given["kind"], states, kept, given["cells"], places, counts, constants, "triton")
    alone = given | {"states": states[0], "kept": None}
    alone |= {name: tuple(x[:, child : child + 1] for x in given[name]) for name in ("inputs", "reads")}
    out = run_nodes(sees=None, impl="triton", **alone)[:, 0]
    assert torch.allclose(out, in_tree, rtol=1e-4, atol=1e-4)
    assert RULES[given["kind"]].block > 0
