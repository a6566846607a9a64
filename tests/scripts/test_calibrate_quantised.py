"""Calibrated checkpoints: what stays in 16 bits, what is calibrated on, and, with llm-compressor, what comes out."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import specdec
from scripts import calibrate_quantised
from scripts.common.quantise import KINDS, misfits, quantise
from tests.families import VOCAB


def llama(vocab=VOCAB):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=128, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=160,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_layers_that_do_not_divide_into_groups_stay_and_are_listed():
    pytest.importorskip("torchao", reason="torchao is not installed")
    down = [f"model.layers.{layer}.mlp.down_proj" for layer in range(2)]
    assert misfits(llama()) == down and misfits(llama(), group=64) == []
    for kind in KINDS:
        model, plain = llama(), llama()
        assert quantise(model, kind) == (down if kind == "int4" else [])
        untouched = {name for name, layer in model.named_modules() if type(getattr(layer, "weight", None)) is type(
            plain.lm_head.weight)}  # fmt: skip
        assert "lm_head" in untouched and (set(down) <= untouched) == (kind == "int4")
        assert "model.layers.0.mlp.up_proj" not in untouched
        tokens = torch.arange(9)[None]
        error = (model(tokens).logits - plain(tokens).logits).norm() / plain(tokens).logits.norm()
        assert 0 < error < (0.3 if kind == "int4" else 0.06)


@pytest.mark.parametrize("kind", KINDS)
def test_an_output_without_weights_stays_zero(kind):
    pytest.importorskip("torchao", reason="torchao is not installed")
    model = llama()
    layer = model.model.layers[1].mlp.gate_proj
    with torch.no_grad():
        layer.weight[[0, 5]] = 0
        quantise(model, kind)
        out = layer(torch.randn(3, 128))
    assert (out == 0).all(0).nonzero().flatten().tolist() == [0, 5] and out.isfinite().all()


def test_an_unknown_kind_and_a_missing_package_are_errors(monkeypatch):
    with pytest.raises(ValueError, match="one of int8, int8-dynamic, fp8, int4, got 'int3'"):
        quantise(llama(), "int3")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"specdec-lab\[quant\]"):
        quantise(llama(), "int8")


def test_rows_to_calibrate_on_are_spread_over_the_texts(tmp_path):
    tokenizer = specdec.load_tiny_pair().tokenizer
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"value_{i} = compute({i})"}) for i in range(20)))
    rows = [row["input_ids"] for row in calibrate_quantised.calibration_rows(path, tokenizer, 4, 16)]
    assert [tuple(row.shape) for row in rows] == [(1, 16)] * 4
    whole = [token for i in range(20) for token in tokenizer(f"value_{i} = compute({i})")["input_ids"]]
    assert rows[0][0].tolist() == whole[:16] and rows[-1][0].tolist() == whole[-16:]
    with pytest.raises(ValueError, match="too few for a row of 1000"):
        calibrate_quantised.calibration_rows(path, tokenizer, 4, 1000)


@pytest.mark.parametrize("method", calibrate_quantised.METHODS)
def test_what_llm_compressor_makes_decodes_as_its_own_text(method, tmp_path):
    pytest.importorskip("llmcompressor", reason="llm-compressor is not installed (an environment of its own)")
    source, out = tmp_path / "model", tmp_path / "quantised"
    tokenizer = specdec.load_tiny_pair().tokenizer
    llama(len(tokenizer)).save_pretrained(source)
    tokenizer.save_pretrained(source)
    data = tmp_path / "texts.txt"
    data.write_text("\n".join(f"value_{i} = compute({i})" for i in range(20)))
    small = ["--samples", "4", "--length", "8", "--data", str(data)]
    calibrate_quantised.main(["--model", str(source), "--method", method, "--output", str(out), *small])
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert ("model.layers.0.mlp.down_proj" in config["ignore"]) == (method != "smoothquant")  # 192 inner positions
    target, ids = specdec.load_model(out), torch.arange(5, 25)[None]
    own = target.generate(ids, max_new_tokens=12, do_sample=False)
    generator = specdec.SpeculativeGenerator(target, specdec.PromptLookupDrafter(4, 1))
    assert generator.generate(ids, max_new_tokens=12).sequences.equal(own)
