"""What is fused is said, what is not and why too, and a known kind of module that is no longer recognised warns."""

import functools
import warnings

import pytest
import torch
import transformers as tf
from torch import nn

import specdec
from attention.hf.functions import uses, with_global
from attention.hf.twin import make_twin
from specdec.model.fusion.notes import Note, warn_of_lost
from specdec.model.fusion.pointwise import fuse_pointwise
from specdec.model.fusion.projections import fuse_projections
from specdec.model.fusion.skinny_linear import skinny_linear
from tests.families import CONFIGS, build, ragged_prompts

pytestmark = pytest.mark.seam
llama = tf.models.llama.modeling_llama
# (norms, rotations, gates, rotary tables, sums) that are recognised in three layers
RECOGNISED = {
    "llama": (7, 3, 3, 1, 6),
    "qwen3": (13, 3, 3, 1, 6),
    "mistral": (7, 3, 3, 1, 6),
    "mixtral": (7, 3, 0, 1, 3),
    "gemma2": (13, 3, 3, 1, 6),
    "gemma3": (19, 3, 3, 1, 6),
    "phi3": (7, 3, 0, 1, 6),
    "gpt_neox": (0, 3, 0, 1, 0),
    "gpt2": (0, 0, 0, 0, 0),
    "opt": (0, 0, 0, 0, 6),
    "gpt_oss": (7, 0, 0, 1, 3),
}


def rehearsed(model) -> tuple[nn.Module, list[Note]]:
    notes: list[Note] = []
    fused = fuse_projections(make_twin(model).model, skinny_linear, notes, move=False)
    return fuse_pointwise(fused, "reference", notes), notes


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_is_recognised_without_a_gpu(family):
    """By plain PyTorch in place of the kernels, on whichever transformers is installed; a rehearsal moves no weight and
    gives the model's logits.
    """
    model = build(family)
    ids, _ = ragged_prompts(1)
    places = [parameter.data_ptr() for parameter in model.parameters()]
    with torch.inference_mode():
        expected = model(ids, use_cache=False).logits
        twin, notes = rehearsed(model)
        torch.testing.assert_close(twin(ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
    found = tuple(
        sum(note.operation == kind and note.why is None for note in notes)
        for kind in ("norm", "rotation", "gate", "rotary table", "sum")
    )
    assert found == RECOGNISED[family] and not [note for note in notes if note.lost]
    assert [parameter.data_ptr() for parameter in model.parameters()] == places


def test_explain_counts_by_kind_of_layer_and_says_why_not():
    model = build("llama")
    model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    model.model.layers[1].self_attn.q_proj.register_forward_hook(lambda *_: None)
    model.model.rotary_emb.register_forward_hook(lambda *_: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # whoever hooks a layer knows
        text = specdec.SpeculativeGenerator(model, specdec.ModelDrafter(build("llama", seed=1)), mode="graph").explain()
    target, draft = text.split("\n\n")
    assert target.startswith("LlamaForCausalLM on cpu, mode 'graph'\n")
    lines = [" ".join(line.split()) for line in target.splitlines()]
    assert (
        "norm LlamaRMSNorm 7 yes" in lines
        and "rotation LlamaAttention 3 yes" in lines
        and "gate LlamaMLP 2 yes" in lines
    )
    assert "gate LlamaMLP 1 no: it has hooks, or a forward of its own" in lines
    assert "rotary table LlamaRotaryEmbedding 1 no: it has hooks, or a forward of its own" in lines
    assert "product q_proj+k_proj+v_proj LlamaAttention 1 no: it has hooks, or a forward of its own" in lines
    assert " no: " not in draft


class OtherAttention(llama.LlamaAttention):
    """As if a release rotated by another name."""

    def forward(self, hidden_states, position_embeddings=None, **kwargs):
        return super().forward(hidden_states, position_embeddings=position_embeddings, **kwargs)


OtherAttention.__module__ = llama.__name__


class OtherNorm(nn.Module):
    """As if a release called its epsilon otherwise."""

    def __init__(self, size):
        super().__init__()
        self.weight, self.tiny = nn.Parameter(torch.ones(size)), 1e-6

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.tiny) * self.weight


OtherNorm.__name__ = "OtherRMSNorm"


@pytest.mark.parametrize("what", ["rotation", "norm"])
def test_a_known_kind_that_is_no_longer_recognised_warns_once(what):
    model = build("llama")
    for layer in model.model.layers:
        if what == "rotation":
            layer.self_attn.__class__ = OtherAttention
        else:
            layer.input_layernorm = OtherNorm(32)
    _, notes = rehearsed(model)
    with pytest.warns(UserWarning, match=f"Other.*: its {what} is no longer recognised and runs unfused") as caught:
        warn_of_lost(notes)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_lost(rehearsed(build("llama"))[1])


def added(x):
    return x + OFFSET


OFFSET = 1


def decorated(function):
    @functools.wraps(function)
    def wrapper(*args):
        return 10 * function(*args)

    return wrapper


def test_a_global_is_exchanged_below_decorators_that_stay():
    twice = decorated(decorated(added))
    changed = with_global(twice, "OFFSET", 5)
    assert twice(1) == 200 and changed(1) == 600 and twice(1) == 200
    assert uses(twice, "OFFSET") and not uses(twice, "decorated") and changed.__name__ == "added"

    def opaque(*args):
        return added(*args)

    opaque.__wrapped__ = decorated(added)  # says that it wraps what it does not hold
    assert with_global(opaque, "OFFSET", 5) is None
