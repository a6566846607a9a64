"""Whole models with quantised weights: fused by packed weights, and explained; tests/test_quantised.py decodes."""

import pytest
import torch
import transformers as tf

import specdec
from attention.hf.twin import make_twin
from specdec.model.fusion import deferred_linear
from specdec.model.fusion.pointwise import fuse_pointwise
from specdec.model.fusion.projections import FusedProjections, OwnProduct, fuse_projections
from specdec.model.fusion.quantised.packed import EightBitWeight
from specdec.model.fusion.quantised.readers import PackedWeights
from specdec.model.fusion.skinny_linear import skinny_linear, skinny_linear_and_norm
from tests.attention.devices import DEVICE

pytest.importorskip("torchao", reason="torchao is not installed")
IDS = torch.randint(0, 256, (1, 12), generator=torch.Generator().manual_seed(1))


def llama(kind: str | None, dtype=torch.float32, seed: int = 0):
    """A small model, with all linear layers but the last in 8 bits by torchao."""
    from torchao import quantization as ao

    torch.manual_seed(seed)
    config = tf.LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3,
    )  # fmt: skip
    model = tf.LlamaForCausalLM(config).eval().to(DEVICE, dtype)
    configs = {
        "int8": ao.Int8WeightOnlyConfig,
        "fp8": ao.Float8WeightOnlyConfig,
        "int8 dynamic": ao.Int8DynamicActivationInt8WeightConfig,
    }
    if kind is not None:
        ao.quantize_(model.model, configs[kind]())
    return model


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_packed_weights_are_fused_as_16_bit_ones_are(kind, monkeypatch):
    """All products of a forward go over packed weights, sums join them, and the logits are the model's own."""
    model, notes, made, seen = llama(kind, torch.float16), [], PackedWeights(), []
    expected = model(IDS.to(DEVICE), use_cache=False).logits
    twin = fuse_projections(make_twin(model).model, skinny_linear, notes, packed=made)
    normed = skinny_linear_and_norm
    monkeypatch.setattr(
        deferred_linear, "skinny_linear_and_norm", lambda *given: seen.append(given[3]) or normed(*given)
    )
    with torch.inference_mode():
        out = fuse_pointwise(twin, "reference", notes)(IDS.to(DEVICE), use_cache=False).logits
        again = fuse_projections(make_twin(model).model, skinny_linear, packed=PackedWeights())
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2 * float(expected.detach().abs().max()))
    layers = [m for m in twin.modules() if isinstance(m, FusedProjections)]
    assert [type(layer.fused) for layer in layers] == [EightBitWeight] * 4 and made.current()
    assert sum(isinstance(m, OwnProduct) and m.copy is not None for m in twin.modules()) == 4
    assert len(seen) == 4 and all(added is not None for added in seen)
    found = {(note.operation, note.layer) for note in notes if note.why is None}
    assert {
        ("product", f"Linear ({kind})"),
        ("product q_proj+k_proj+v_proj", "LlamaAttention"),
        ("gate", "LlamaMLP"),
    } <= found
    first = next(m for m in again.modules() if isinstance(m, FusedProjections))
    assert first.fused.values.data_ptr() == layers[0].fused.values.data_ptr()  # moved once, not stored twice
    after = model(IDS.to(DEVICE), use_cache=False).logits
    assert after.equal(expected)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.scale.mul_(2)
    assert not made.current()


def test_explain_says_what_becomes_of_quantised_layers():
    text = specdec.AutoregressiveGenerator(llama("int8", torch.bfloat16), mode="graph").explain()
    dynamic = specdec.AutoregressiveGenerator(llama("int8 dynamic", torch.bfloat16), mode="graph").explain()
    if DEVICE == "cpu":
        assert "Linear (int8)" in text and "kernels are for 16-bit models on a GPU; its own module runs it" in text
    assert "it quantises activations too, which is another function; its own module runs it" in dynamic


def test_activation_scales_per_tensor_are_refused_by_the_runner():
    from torchao.quantization import PerTensor

    model = llama("int8 dynamic")
    model.model.layers[1].mlp.up_proj.weight.data.act_quant_kwargs.granularity = PerTensor()
    with pytest.raises(ValueError, match="of LlamaForCausalLM .Int8Tensor. scales its 8-bit activations per tensor"):
        specdec.ModelRunner(model)
