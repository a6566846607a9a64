"""Models that unpack themselves by a hook before their first forward, as compressed-tensors' do."""

import pytest
import torch

import specdec
from tests.families import build

pytestmark = pytest.mark.seam


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_a_model_unpacks_itself_and_not_a_twin(mode):
    model, ids, unpacked = build("llama"), torch.tensor([[3, 4, 5]]), []

    def unpack(module, args):
        unpacked.append(module)
        module.ct_decompress_hook.remove()
        del module.ct_decompress_hook
        weight = module.lm_head._parameters.pop("packed")
        module.lm_head.weight = torch.nn.Parameter(weight / 2, requires_grad=False)

    expected = model.generate(ids, max_new_tokens=8, do_sample=False)
    model.lm_head.packed = torch.nn.Parameter(model.lm_head._parameters.pop("weight").detach() * 2, requires_grad=False)
    model.ct_decompress_hook = model.register_forward_pre_hook(unpack)
    out = specdec.AutoregressiveGenerator(model, mode=mode).generate(ids, max_new_tokens=8, do_sample=False)
    assert unpacked == [model] and not model._forward_pre_hooks and out.sequences.equal(expected)
