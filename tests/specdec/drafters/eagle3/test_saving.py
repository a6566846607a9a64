"""Files that we write are read back bit for bit; the layout of SGLang is the same weights by other names."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from specdec.drafters.eagle3.loading import load_eagle3
from specdec.drafters.eagle3.module import Eagle3Model
from specdec.drafters.eagle3.saving import save_drafter
from tests.specdec.drafters.eagle3.test_golden import CHAINS, GOLDEN, PARALLEL, outputs_of


def same(model, other):
    """Whether two drafters have the same config, weights and vocabulary."""
    ours, theirs = model.state_dict(), other.state_dict()
    equal = ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    return equal and model.config == other.config


@pytest.mark.parametrize("name", CHAINS + PARALLEL)
def test_the_speculators_layout_is_read_back(runner, name, tmp_path):
    model, _ = load_eagle3(runner, GOLDEN / name)
    save_drafter(model, tmp_path, num_tokens=4, target="somewhere")
    again, reading = load_eagle3(runner, tmp_path)
    assert same(model, again) and reading.num_tokens == 4
    written, theirs = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, GOLDEN / name))
    assert theirs.keys() - {"auto_map", "transformers_version"} <= written.keys()
    held = load_file(tmp_path / "model.safetensors")
    original = load_file(GOLDEN / name / "model.safetensors")
    assert held.keys() == original.keys()
    assert all(torch.equal(held[key], value.to(held[key].dtype)) for key, value in original.items())


@pytest.mark.parametrize("name", ["plain", "each_norm"])
def test_the_sglang_layout_is_read_back(runner, name, tmp_path):
    model, _ = load_eagle3(runner, GOLDEN / name)
    save_drafter(model, tmp_path, layout="sglang")
    again, _ = load_eagle3(runner, tmp_path)
    assert same(model, again)


def test_a_second_layer_is_read_alike_by_both_engines(runner, tmp_path):
    model, _ = load_eagle3(runner, GOLDEN / "two_layers", read=dict(norm_before_residual=False))
    save_drafter(model, tmp_path, layout="sglang")
    held = load_file(tmp_path / "model.safetensors")
    assert torch.equal(held["layers.1.hidden_norm.weight"], held["layers.1.input_layernorm.weight"])
    again, _ = load_eagle3(runner, tmp_path)
    assert again.config == replace(model.config, deeper_norm="hidden_norm")
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])


@pytest.mark.parametrize("name", ["plain", "each_norm"])
@torch.no_grad()
def test_the_original_layout_is_the_same_weights_renamed(runner, name, tmp_path):
    """Written by hand as SpecForge does: `midlayer`, a flat config, ids of layers' outputs."""
    given = json.loads((GOLDEN / name / "config.json").read_text())
    inner = given["transformer_layer_config"]
    rope = inner.pop("rope_parameters")
    flat = inner | dict(
        architectures=["LlamaForCausalLMEagle3"], draft_vocab_size=given["draft_vocab_size"], num_hidden_layers=40,
        rope_theta=rope.pop("rope_theta"), rope_scaling=None if rope["rope_type"] == "default" else rope,
        fc_norm=given["fc_norm"], norm_output=given["norm_output"],
        eagle_config=dict(eagle_aux_hidden_state_layer_ids=[1, 3, 4], use_aux_hidden_state=True),
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(flat))
    weights = load_file(GOLDEN / name / "model.safetensors")
    renamed = {key.replace("layers.0.", "midlayer."): weight for key, weight in weights.items()}
    save_file(renamed, tmp_path / "model.safetensors")
    model, reading = load_eagle3(runner, tmp_path)
    assert model.config.target_layers == (2, 4, 5) and "outputs of layers" in model.about
    expected = load_file(GOLDEN / name / "expected.safetensors")
    output = outputs_of(model, expected)
    torch.testing.assert_close(model.logits(output), expected["logits"], atol=2e-4, rtol=0)
    assert torch.equal(model.target_logits(output).argmax(-1), expected["drafted"])


def test_what_a_layout_cannot_say_is_refused_by_name(runner, tmp_path):
    model, _ = load_eagle3(runner, GOLDEN / "whole_norm")
    with pytest.raises(ValueError, match="sglang layout has no qk_norm other than False, got True"):
        save_drafter(model, tmp_path, layout="sglang")
    with pytest.raises(ValueError, match="layout must be one of speculators, sglang, got 'gguf'"):
        save_drafter(model, tmp_path, layout="gguf")
    biased = Eagle3Model(replace(model.config, fusion_bias=True), model.draft_tokens)
    with pytest.raises(ValueError, match="speculators layout has no fusion_bias"):
        save_drafter(biased, tmp_path)
    assert not any(tmp_path.iterdir())
