"""MTP modules written to files: under the names and with the values of the checkpoints that they came from."""

import pytest
import torch
from safetensors.torch import load_file

import specdec
from specdec.drafters.mtp.drafter import load_modules
from specdec.drafters.mtp.layouts import FINAL_NORM, LAYOUTS, PARTS
from specdec.drafters.mtp.saving import save_mtp, weights_of
from specdec.training.mtp.network import new_mtp
from tests.families import build
from tests.specdec.drafters.test_mtp import LAYERS, write
from tests.specdec.drafters.test_mtp_depths import deep_checkpoint


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe", "mimo", "three modules"])
def test_a_file_has_the_names_and_values_of_the_checkpoint(family, tmp_path):
    """transformers holds experts in another form than checkpoints do; both ways are its own."""
    there, here = tmp_path / "checkpoint", tmp_path / "saved"
    there.mkdir()
    deep_checkpoint(there) if family == "three modules" else write(family, there)
    model = specdec.load_model(there)
    save_mtp(load_modules(model), here)
    saved, whole = load_file(here / "model.safetensors"), load_file(there / "model.safetensors")
    of_modules = {n: w for n, w in whole.items() if "mtp" in n or any(f"layers.{LAYERS + i}." in n for i in range(3))}
    assert saved.keys() == of_modules.keys() and len(saved) > 12
    assert all(weight.equal(of_modules[name]) for name, weight in saved.items())
    again = load_modules(model, here)
    assert len(again) == (3 if family == "three modules" else 1)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.short_name)
def test_names_that_are_written_are_read_as_they_were(layout):
    layers = {"nemotron-h": ["layers.0.mixer.q_proj", "layers.1.mixer.gate"]}
    for part in [*PARTS, *layers.get(layout.short_name, ["layers.0.post_attention_layernorm", "layers.0.mlp.up_proj"])]:
        name = layout.written(0, f"{part}.weight", 5, last=1)
        assert layout.place(name, 5) == (0, f"{part}.weight"), part
    numbered = "module" in layout.pattern
    for part in PARTS if numbered else ():
        assert layout.place(layout.written(2, f"{part}.weight", 5), 5) == (2, f"{part}.weight")
    if not numbered:
        with pytest.raises(ValueError, match=f"the {layout.name} layout has no name .* of MTP module 1"):
            layout.written(1, f"{FINAL_NORM}.weight", 5)
    if layout.short_name == "mimo-7b":
        with pytest.raises(ValueError, match="has no name for the weight head.weight"):
            layout.written(0, "head.weight", 5)


def test_a_second_decoder_layer_has_no_name_in_a_format_with_one():
    with pytest.raises(ValueError, match=r"no name for the weight layers.1.mlp.up_proj.weight"):
        LAYOUTS[0].written(0, "layers.1.mlp.up_proj.weight", 5)


@pytest.mark.parametrize("family", ["qwen3_next", "nemotron_h"])
def test_a_new_module_of_a_hybrid_target_is_read_again(family, tmp_path):
    """Its layers attend, whatever the target's last ones do."""
    model = build(family)
    torch.manual_seed(0)
    network = new_mtp(model, family.replace("_", "-"))
    save_mtp(network.parts, tmp_path)
    drafter = specdec.load_drafter(tmp_path, model, kind="mtp")
    ours, theirs = weights_of(network.parts[0]), weights_of(drafter.module)
    assert ours.keys() == theirs.keys() and all(weight.equal(theirs[name]) for name, weight in ours.items())
