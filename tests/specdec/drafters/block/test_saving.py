"""Files of block drafters that we write are read back bit for bit."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from specdec.drafters.block.loading import load_block
from specdec.drafters.block.module import BlockModel
from specdec.drafters.block.saving import save_drafter
from tests.specdec.drafters.block.test_golden import GOLDEN, NAMES


def same(model, other):
    """Whether two drafters have the same config, weights and vocabulary."""
    ours, theirs = model.state_dict(), other.state_dict()
    equal = ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    return equal and model.config == other.config


@pytest.mark.parametrize("name", NAMES)
def test_the_speculators_layout_is_read_back(runner, name, tmp_path):
    model, _ = load_block(runner, GOLDEN / name)
    save_drafter(model, tmp_path, num_tokens=2, target="somewhere")
    again, reading = load_block(runner, tmp_path)
    assert same(model, again) and reading.num_tokens == 2
    written, theirs = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, GOLDEN / name))
    assert theirs.keys() - {"auto_map", "transformers_version"} <= written.keys()
    held, original = (load_file(folder / "model.safetensors") for folder in (tmp_path, GOLDEN / name))
    assert held.keys() == original.keys()
    assert all(torch.equal(held[key], value.to(held[key].dtype)) for key, value in original.items())


@pytest.mark.parametrize("name", ["dflash_whole", "dspark_rnn_anchor", "dflash2"])
def test_the_z_lab_layout_is_read_back(runner, name, tmp_path):
    source, _ = load_block(runner, GOLDEN / name)
    full = dict(draft_vocab_size=48, output="target")
    model = BlockModel(replace(source.config, **full)).eval()
    save_drafter(model, tmp_path, layout="z-lab", num_target_layers=8)
    again, _ = load_block(runner, tmp_path)
    assert same(model, again)
    kind = dict(dflash_whole="DFlashDraftModel", dflash2="DFlash2DraftModel").get(name, "Qwen3DSparkModel")
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["architectures"] == [kind] and "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert (written.get("dflash_config") or written)["target_layer_ids"] == [1, 3, 4]


def test_what_a_layout_cannot_say_is_refused_by_name(runner, tmp_path):
    model, _ = load_block(runner, GOLDEN / "dspark")
    with pytest.raises(ValueError, match="z-lab layout has no draft_vocab_size other than 48, got 20"):
        save_drafter(model, tmp_path, layout="z-lab", num_target_layers=8)
    with pytest.raises(ValueError, match="num_target_layers is None"):
        save_drafter(model, tmp_path, layout="z-lab")
    with pytest.raises(ValueError, match="layout must be one of speculators, z-lab, got 'gguf'"):
        save_drafter(model, tmp_path, layout="gguf")
    capped = BlockModel(replace(model.config, softcap=3.0), model.draft_tokens)
    with pytest.raises(ValueError, match="speculators layout has no softcap"):
        save_drafter(capped, tmp_path)
    odd = BlockModel(replace(model.config, causal=(True, False)), model.draft_tokens)
    with pytest.raises(ValueError, match=r"got \(True, False\)"):
        save_drafter(odd, tmp_path)
    assert not any(tmp_path.iterdir())
