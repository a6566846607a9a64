import json

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import specdec
from attention import UnsupportedArchitecture
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


# pytorch_model.bin

BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


@pytest.fixture
def bin_folder(model, folder):
    (folder / WEIGHTS).unlink()
    torch.save(model.state_dict(), folder / BIN)
    return folder


def split_in_two(model, folder):
    """The weights as two .bin files with an index, as older releases wrote them."""
    weights = list(model.state_dict().items())
    halves = {f"pytorch_model-0000{i + 1}-of-00002.bin": dict(weights[i::2]) for i in range(2)}
    for name, half in halves.items():
        torch.save(half, folder / name)
    (folder / BIN_INDEX).write_text(
        json.dumps({"metadata": {}, "weight_map": {k: name for name, half in halves.items() for k in half}})
    )
    return sorted(halves)


@pytest.mark.parametrize("zipped", [True, False])
def test_weights_in_a_bin_come_back(model, bin_folder, zipped):
    torch.save(model.state_dict(), bin_folder / BIN, _use_new_zipfile_serialization=zipped)
    assert_equal_weights(load_model(bin_folder), model)


def test_bins_in_shards_come_back_and_a_missing_one_is_named(model, bin_folder):
    (bin_folder / BIN).unlink()
    shards = split_in_two(model, bin_folder)
    assert_equal_weights(load_model(bin_folder), model)
    (bin_folder / shards[1]).unlink()
    with pytest.raises(FileNotFoundError, match=f"{bin_folder}.*{shards[1]}"):
        load_model(bin_folder)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9999])
def test_a_half_written_bin_is_named(model, bin_folder, share, zipped):
    torch.save(model.state_dict(), bin_folder / BIN, _use_new_zipfile_serialization=zipped)
    whole = (bin_folder / BIN).read_bytes()
    (bin_folder / BIN).write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=rf"{bin_folder / BIN}.*{int(share * len(whole))} bytes"):
        load_model(bin_folder)


class Planted:
    """What runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_bin_that_would_run_code_is_refused_and_does_not_run(bin_folder):
    torch.save({"model.norm.weight": Planted(bin_folder / "ran")}, bin_folder / BIN)
    with pytest.raises(ValueError, match=f"{bin_folder / BIN}.*more than tensors"):
        load_model(bin_folder)
    assert not (bin_folder / "ran").exists()


@pytest.mark.parametrize("nested", [lambda state: {"model": state}, lambda state: list(state.values())])
def test_a_bin_that_is_no_state_dict_is_named(model, bin_folder, nested):
    torch.save(nested(model.state_dict()), bin_folder / BIN)
    with pytest.raises(ValueError, match=f"{bin_folder / BIN}.*must map names to tensors"):
        load_model(bin_folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '"a"'])
def test_a_damaged_config_is_named(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=f"{folder / 'config.json'} is damaged"):
        load_model(folder)


@pytest.mark.parametrize("content", ["{}", '{"metadata": {}, "weight_map": {}}', '{"weight_map": {"a": "b"}}'])
def test_an_index_without_files_is_named(folder, content):
    (folder / INDEX).write_text(content)
    with pytest.raises(ValueError, match=f"{folder / INDEX} is damaged"):
        load_model(folder)


# adapters


@pytest.fixture
def adapter(model, tmp_path):
    """A LoRA adapter in a folder of its own, whose base lies beside it, and the model that has both."""
    peft = pytest.importorskip("peft")
    model.save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    both = peft.get_peft_model(build("llama"), lora).eval()
    both.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    both.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", both


def change(folder, **settings):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_an_adapter_is_merged_into_its_base_and_both_give_the_same_text(model, adapter):
    folder, both = adapter
    merged, ids = load_model(folder), torch.tensor([[5, 6, 7]])
    assert type(merged) is type(model) and not merged.training
    assert merged.state_dict().keys() == model.state_dict().keys()
    assert torch.allclose(merged(ids).logits, both(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(merged(ids).logits, model(ids).logits, rtol=1e-2, atol=1e-2)
    expected = both.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16)
    for target in (merged, both):
        generator = specdec.SpeculativeGenerator(target, specdec.PromptLookupDrafter())
        assert generator.generate(ids, max_new_tokens=16).sequences.equal(expected)


def test_a_merged_adapter_has_the_dtype_of_its_base_or_the_one_asked_for(model, adapter):
    folder, _ = adapter
    assert {p.dtype for p in load_model(folder, torch.float16).parameters()} == {torch.float16}
    build("llama").to(torch.bfloat16).save_pretrained(folder.parent / "base")
    assert {p.dtype for p in load_model(folder).parameters()} == {torch.bfloat16}


def test_an_adapter_beside_a_whole_model_belongs_to_that_one(model, adapter):
    folder, both = adapter
    change(folder, base_model_name_or_path="/nowhere/to/be/found")
    model.save_pretrained(folder)
    ids = torch.tensor([[5, 6, 7]])
    expected = both.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16)
    generator = specdec.AutoregressiveGenerator(load_model(folder))
    assert generator.generate(ids, max_new_tokens=16).sequences.equal(expected)


@pytest.mark.parametrize(("settings", "error", "said"), [
    ({"base_model_name_or_path": None}, ValueError, "names no base model.*is None"),
    ({"base_model_name_or_path": "/nowhere/at/all"}, FileNotFoundError, "base model of the adapter.*/nowhere/at/all"),
    ({"target_modules": ["nothing_of_that_name"]}, ValueError, "does not fit its base model.*nothing_of_that_name"),
    ({"target_modules": ["k_proj", "q_proj", "up_proj"]}, ValueError, "does not fit its base model.*k_proj"),
    ({"r": 3}, ValueError, "does not fit its base model.*size mismatch"),
    ({"task_type": "SEQ_CLS"}, UnsupportedArchitecture, "adapter for the task SEQ_CLS"),
    ({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4}, UnsupportedArchitecture, "a PREFIX_TUNING adapter"),
    ({"peft_type": "ADAPTION_PROMPT"}, UnsupportedArchitecture, "virtual tokens"),
])  # fmt: skip
def test_an_adapter_that_cannot_be_merged_is_named(adapter, settings, error, said):
    folder, _ = adapter
    change(folder, **settings)
    with pytest.raises(error, match=f"{folder}.*{said}" if "base model of" not in said else said):
        load_model(folder)


def test_an_adapter_without_its_weights_or_with_half_of_them_is_named(adapter):
    folder, _ = adapter
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{path} is damaged"):
        load_model(folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"{folder} lacks its weights {path.name} or adapter_model.bin"):
        load_model(folder)


def test_an_adapter_without_peft_names_the_extra(adapter, monkeypatch):
    folder, _ = adapter
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=rf"{folder} is a PEFT adapter.*specdec-lab\[train\]"):
        load_model(folder)


def test_a_prompt_tuned_adapter_is_refused_by_name(model, tmp_path):
    peft = pytest.importorskip("peft")
    tuned = peft.get_peft_model(
        build("llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    ).eval()
    tuned.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedArchitecture, match=f"{tmp_path} is a PROMPT_TUNING adapter.*virtual tokens"):
        load_model(tmp_path)


# models for other tasks

T5 = dict(d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4, vocab_size=97, decoder_start_token_id=0)
BERT = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=97)
OTHERS = {
    "LlamaForSequenceClassification": ("scores or labels", lambda c: tf.LlamaForSequenceClassification(c)),
    "LlamaForTokenClassification": ("scores or labels", lambda c: tf.LlamaForTokenClassification(c)),
    "LlamaModel": ("no output layer", lambda c: tf.LlamaModel(c)),
    "BertModel": ("no output layer", lambda _: tf.BertModel(tf.BertConfig(**BERT))),
    "BertForMaskedLM": ("fills gaps", lambda _: tf.BertForMaskedLM(tf.BertConfig(**BERT))),
    "T5ForConditionalGeneration": ("encoder and a decoder", lambda _: tf.T5ForConditionalGeneration(tf.T5Config(**T5))),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_a_model_for_another_task_is_refused_by_name(model, tmp_path, name):
    why, make = OTHERS[name]
    other = make(model.config).eval()
    other.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedArchitecture, match=f"{tmp_path} holds a {name}, which is no causal .*{why}"):
        load_model(tmp_path)
    with pytest.raises(UnsupportedArchitecture, match=f"{name} is no causal language model: .*{why}"):
        specdec.SpeculativeGenerator(other, None)


def test_a_reward_model_of_a_class_that_transformers_lacks_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForRewardModel"]}))
    with pytest.raises(UnsupportedArchitecture, match=f"{folder} holds a LlamaForRewardModel"):
        load_model(folder)


def test_a_class_of_ones_own_loads_whatever_its_name(model, folder):
    config = json.loads((folder / "config.json").read_text())
    for architectures in (["MyOwnModel"], None, []):
        (folder / "config.json").write_text(json.dumps(config | {"architectures": architectures}))
        assert_equal_weights(load_model(folder), model)


def test_a_configuration_without_a_causal_model_is_named_in_one_line(tmp_path):
    small = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    tf.ViTForMaskedImageModeling(tf.ViTConfig(**small)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path} holds no causal language model: .*ViTConfig") as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("base", "kind", "settings"), [
    (tf.LlamaForSequenceClassification, "LoraConfig", {"task_type": "SEQ_CLS", "target_modules": ["q_proj"]}),
    (tf.LlamaForCausalLM, "PrefixTuningConfig", {"num_virtual_tokens": 3}),
    (tf.LlamaForCausalLM, "PromptEncoderConfig", {"num_virtual_tokens": 3}),
    (tf.LlamaForCausalLM, "AdaptionPromptConfig", {"adapter_len": 3, "adapter_layers": 1}),
])  # fmt: skip
def test_a_peft_model_that_is_no_plain_one_is_refused_with_its_base(model, base, kind, settings):
    peft = pytest.importorskip("peft")
    config = getattr(peft, kind)(**{"task_type": "CAUSAL_LM"} | settings)
    wrapped = peft.get_peft_model(base(model.config), config).eval()
    with pytest.raises(UnsupportedArchitecture, match=f"{type(wrapped).__name__} around {base.__name__}"):
        specdec.SpeculativeGenerator(wrapped, None)
