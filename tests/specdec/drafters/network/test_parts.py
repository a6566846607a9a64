"""Networks of learned drafters on a GPU: which of their operations kernels take over."""

import pytest
import torch

from attention.dispatch import triton_available
from specdec.drafters.eagle3.dense import DenseAttention
from specdec.drafters.network.rotation import Rotation, angles, rotate
from specdec.model.fusion import replacements
from specdec.model.fusion.notes import Note
from specdec.model.fusion.pointwise import fuse_pointwise
from specdec.model.fusion.projections import fuse_projections
from specdec.model.fusion.skinny_linear import skinny_linear
from tests.attention.devices import DEVICE
from tests.families import build
from tests.learned import block_model, eagle3_model

needs_triton = pytest.mark.skipif(not triton_available(torch.device(DEVICE)), reason="needs triton")
BETWEEN = ("norm", "rotation", "gate", "sum")


@pytest.mark.parametrize(("make", "norms"), [(eagle3_model, 4), (block_model, 6)])
def test_operations_between_products_are_fused(make, norms):
    """All of a layer's: a rotation, a gate, and the sums after attention and MLP."""
    network = make(build("llama"))
    notes: list[Note] = []
    fuse_pointwise(fuse_projections(network, skinny_linear, notes, move=False), "reference", notes)
    layers = network.config.num_layers
    fused = {name: sum(note.operation == name and note.why is None for note in notes) for name in BETWEEN}
    assert fused == {"norm": norms, "rotation": layers, "gate": layers, "sum": 2 * layers}
    assert not any(note.lost for note in notes)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize(("count", "kind"), [(0, "default"), (1, "default"), (61, "yarn")])
@torch.no_grad()
def test_angles_of_positions_in_one_launch(count, kind, dtype):
    """Of far positions too, with a factor that is not 1."""
    parameters = {"rope_type": kind, "rope_theta": 1e4} | ({"factor": 4.0} if kind == "yarn" else {})
    frequencies, factor = Rotation(20, parameters, 2048).frequencies()
    positions, wide = torch.arange(count, device=DEVICE) * 1009, torch.cat([frequencies, frequencies]).to(DEVICE)
    assert (factor == 1) == (kind == "default")
    found, expected = (angles(positions, wide, factor, dtype, impl) for impl in ("triton", "reference"))
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine, theirs, atol=2e-3 if dtype == torch.float16 else 1e-6, rtol=0)


@needs_triton
@pytest.mark.parametrize("plain", [True, False], ids=["", "norm before residual"])
@torch.no_grad()
def test_a_layer_norms_what_it_reads_in_one_launch(plain, monkeypatch):
    """Side by side, of embeddings and states that have other widths; not where the residual is normed too."""
    calls, joined = [], replacements.FusedNorm.joined
    monkeypatch.setattr(replacements.FusedNorm, "joined", lambda *given: calls.append(joined(*given)) or calls[-1])
    network = eagle3_model(build("llama"), norm_before_residual=not plain).to(DEVICE)
    fused, config = fuse_pointwise(network, "triton"), network.config
    embedded, hidden = (
        torch.randn(3, 2 * size, device=DEVICE)[:, ::2] for size in (config.embedded_size, config.hidden_size)
    )
    places, found = torch.arange(3, device=DEVICE), []
    for one in (network, fused):
        attend = DenseAttention(config)
        attend.place(places, places * 0)
        found.append(one(embedded, hidden, places, attend))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    assert [x.shape for x in calls] == ([(3, config.embedded_size + config.hidden_size)] if plain else [])


@needs_triton
@pytest.mark.parametrize(("count", "heads", "dim"), [(0, 2, 8), (3, 1, 10), (5, 9, 64)])
@torch.no_grad()
def test_heads_are_rotated_in_one_launch(count, heads, dim):
    """As PyTorch does, to the last bit, also where heads lie inside wider rows; not a part of a head."""
    wide, turns = torch.randn(count, heads, 2 * dim, device=DEVICE), torch.randn(2, count, dim, device=DEVICE)
    x = wide[..., dim:]
    assert torch.equal(rotate(x, *turns, "triton"), rotate(x, *turns, "reference"))
    with pytest.raises(ValueError, match="whole heads"):
        rotate(wide, *turns, "triton")
