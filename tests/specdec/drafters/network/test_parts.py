"""Networks of learned drafters on a GPU: which of their operations kernels take over."""

import pytest

from specdec.model.fusion.notes import Note
from specdec.model.fusion.pointwise import fuse_pointwise
from specdec.model.fusion.projections import fuse_projections
from specdec.model.fusion.skinny_linear import skinny_linear
from tests.families import build
from tests.learned import block_model, eagle3_model

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
