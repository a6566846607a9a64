import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from specdec.loading import load_model
from tests.families import build

pytestmark = pytest.mark.seam
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ABSENT = "model-00002-of-00002.safetensors"


@pytest.fixture(scope="module")
def model():
    return build("llama")


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def assert_equal_weights(loaded, model):
    ours, theirs = loaded.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("as_text", [False, True])
def test_a_saved_model_comes_back_with_equal_weights_in_eval_mode(model, folder, as_text):
    loaded = load_model(str(folder) if as_text else folder)
    assert not loaded.training and type(loaded) is type(model) and loaded.dtype == torch.float32
    assert_equal_weights(loaded, model)


def test_a_relative_folder_is_found(model, folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert_equal_weights(load_model("saved"), model)
    assert_equal_weights(load_model("./saved"), model)


def test_a_sharded_model_comes_back_whole_and_without_a_shard_names_it(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert_equal_weights(load_model(tmp_path), model)
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match=shards[1].name):
        load_model(tmp_path)


def test_dtype_is_the_saved_one_unless_asked_for(model, folder):
    build("llama").to(torch.bfloat16).save_pretrained(folder)
    assert load_model(folder).dtype == torch.bfloat16
    assert load_model(folder, torch.float32).dtype == torch.float32


def test_what_has_more_slashes_than_a_hub_id_is_a_folder():
    for name in ("nowhere/", "models/mine/best"):
        with pytest.raises(FileNotFoundError, match=f"model directory {name.rstrip('/')}"):
            load_model(name)


def test_an_unknown_dtype_is_named(folder):
    with pytest.raises(ValueError, match="got 'foo'"):
        load_model(folder, "foo")
    assert load_model(folder, "bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize("relative", [False, True])
def test_a_missing_folder_is_named(tmp_path, monkeypatch, relative):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        load_model("./nowhere" if relative else tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
def test_a_missing_file_is_named_with_its_folder(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{folder}.*{name}"):
        load_model(folder)


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.5, 0.9999])
def test_half_written_weights_are_named(folder, share):
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=f"{folder / WEIGHTS}.*{int(share * len(whole))} bytes"):
        load_model(folder)


def test_an_index_that_names_an_absent_shard_is_refused(folder):
    (folder / INDEX).write_text(
        json.dumps({"metadata": {}, "weight_map": {"model.norm.weight": WEIGHTS, "lm_head.weight": ABSENT}})
    )
    with pytest.raises(FileNotFoundError, match=f"{folder}.*{ABSENT}"):
        load_model(folder)


def test_weights_without_a_tensor_of_the_config_name_it(folder):
    weights = load_file(folder / WEIGHTS)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{folder}.*model.layers.1.mlp.up_proj.weight"):
        load_model(folder)
