"""Heads in the layouts that are published give the logits that their weights stand for; what is not known is named."""

import json
import re
from pathlib import Path

import huggingface_hub
import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

from medusa import MedusaConfig, MedusaHeads
from medusa.files import INDEX, LEGACY, WEIGHTS, WHOLE
from medusa.layouts import LAYOUTS, find_layout

HEADS, LAYERS, HIDDEN, VOCAB = 3, 2, 8, 20
MEDUSA = {"medusa_num_heads": HEADS, "medusa_num_layers": LAYERS, "base_model_name_or_path": "lmsys/vicuna-7b-v1.3"}
MODELOPT = {"medusa": {"num_medusa_heads": HEADS, "num_medusa_layers": LAYERS}, "model_type": "llama"}
VLLM = {
    "model_type": "medusa",
    "hidden_size": HIDDEN,
    "vocab_size": VOCAB,
    "num_heads": HEADS,
    "num_hidden_layers": LAYERS,
}
MODEL = {"model.embed_tokens.weight": torch.ones(VOCAB, HIDDEN), "lm_head.weight": torch.ones(VOCAB, HIDDEN)}
STATES = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(1))


def plain(bias: bool = False) -> dict[str, torch.Tensor]:
    """Random heads under Medusa's own names."""
    generator, found = torch.Generator().manual_seed(0), {}
    draw = lambda *shape: torch.randn(shape, generator=generator)
    for head in range(HEADS):
        for block in range(LAYERS):
            found[f"{head}.{block}.linear.weight"] = draw(HIDDEN, HIDDEN)
            found[f"{head}.{block}.linear.bias"] = draw(HIDDEN)
        found[f"{head}.{LAYERS}.weight"] = draw(VOCAB, HIDDEN)
        if bias:
            found[f"{head}.{LAYERS}.bias"] = draw(VOCAB)
    return found


def logits(weights: dict[str, torch.Tensor], heads: int = HEADS) -> torch.Tensor:
    """What these weights stand for, `[K, 5, V]`."""
    found = []
    for head in range(heads):
        state = STATES
        for block in range(LAYERS):
            z = state @ weights[f"{head}.{block}.linear.weight"].T + weights[f"{head}.{block}.linear.bias"]
            state = state + z * torch.sigmoid(z)
        found.append(state @ weights[f"{head}.{LAYERS}.weight"].T + weights.get(f"{head}.{LAYERS}.bias", 0))
    return torch.stack(found)


def vllm(weights: dict[str, torch.Tensor], prefix: str = "") -> dict[str, torch.Tensor]:
    """The same under vLLM's names."""
    found = {}
    for name, weight in weights.items():
        head, layer, *rest = name.split(".")
        ours = f"blocks.{head}.layers.{layer}.{rest[-1]}" if len(rest) > 1 else f"lm_heads.{head}.{rest[0]}"
        found[prefix + ours] = weight.clone()
    return found


def prefixed(prefix: str, bias: bool = False) -> dict[str, torch.Tensor]:
    return {prefix + name: weight for name, weight in plain(bias).items()}


def write(folder: Path, weights: dict[str, torch.Tensor], config: dict, file: str = WEIGHTS) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / file)
    return folder


@pytest.mark.parametrize(("weights", "config", "file"), [
    (plain(), MEDUSA, WEIGHTS),
    (prefixed("medusa_head."), MEDUSA, WEIGHTS),
    (prefixed("medusa_heads."), MEDUSA, WEIGHTS),
    (prefixed("medusa_heads."), MODELOPT, WEIGHTS),
    (prefixed("medusa_heads.") | MODEL, MODELOPT, WHOLE),
    (prefixed("medusa_head.") | MODEL, MEDUSA | {"num_hidden_layers": 7, "vocab_size": 99}, WHOLE),
    (vllm(plain()), VLLM, WHOLE),
    (vllm(plain(), "medusa_heads."), VLLM, WHOLE),
    (vllm(plain()), MEDUSA, WEIGHTS),  # vLLM takes Medusa's words for its numbers too
], ids=["plain", "prefix", "plural", "ModelOpt", "ModelOpt model", "model", "vLLM", "vLLM's", "words"])  # fmt: skip
def test_every_layout_gives_the_logits_of_its_weights(weights, config, file, tmp_path):
    heads = MedusaHeads.from_pretrained(write(tmp_path, weights, config, file))
    torch.testing.assert_close(heads(STATES), logits(plain()), rtol=1e-4, atol=1e-4)
    assert heads.config.logit_scale == 1.0 and not heads.config.bias


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("legacy", [False, True])
def test_medusas_own_checkpoints_are_read_with_an_output_bias_too(legacy, bias, tmp_path):
    weights = prefixed("medusa_head.", bias) if legacy else plain(bias)
    write(tmp_path, weights, MEDUSA)
    if legacy:
        (tmp_path / WEIGHTS).unlink()
        torch.save(weights, tmp_path / LEGACY)
    heads = MedusaHeads.from_pretrained(tmp_path)
    assert heads.config == MedusaConfig(HEADS, LAYERS, HIDDEN, VOCAB, base_model="lmsys/vicuna-7b-v1.3", bias=bias)
    torch.testing.assert_close(heads(STATES), logits(plain(bias)), rtol=1e-4, atol=1e-4)


def test_a_config_that_promises_fewer_heads_than_there_are_gives_all_of_them(tmp_path):
    write(tmp_path, plain(), MEDUSA | {"medusa_num_heads": 2})
    assert MedusaHeads.from_pretrained(tmp_path).config.num_heads == HEADS
    write(tmp_path, vllm(plain()), VLLM | {"num_heads": 2})  # as vLLM does
    assert MedusaHeads.from_pretrained(tmp_path / ".").config.num_heads == 2


@pytest.mark.parametrize("where", ["folder", "hub"])
def test_of_a_sharded_model_only_the_heads_are_read(where, tmp_path, monkeypatch):
    """The shard without heads is not even there."""
    names = prefixed("medusa_head.")
    own = {name: weight for name, weight in names.items() if name.startswith("medusa_head.1")}
    write(tmp_path, own | {"model.norm.weight": torch.ones(HIDDEN)}, MEDUSA, "two.safetensors")
    rest = {name: weight for name, weight in names.items() if name not in own}
    write(tmp_path, rest | {"lm_head.weight": torch.ones(VOCAB, HIDDEN)}, MEDUSA, "three.safetensors")
    shards = dict.fromkeys(MODEL, "one.safetensors") | dict.fromkeys(rest, "three.safetensors")
    shards |= dict.fromkeys([*own, "model.norm.weight"], "two.safetensors") | {"lm_head.weight": "three.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    fetched, read = [], []
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, allow_patterns: fetched.append(allow_patterns) or str(tmp_path),
    )
    kept = safetensors.safe_open

    class Watching:
        def __init__(self, *arguments):
            self.file = kept(*arguments)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def keys(self):
            return self.file.keys()

        def get_tensor(self, name):
            read.append(name)
            return self.file.get_tensor(name)

    monkeypatch.setattr("specdec.loading.safe_open", Watching)
    heads = MedusaHeads.from_pretrained(tmp_path if where == "folder" else "org/medusa-model")
    torch.testing.assert_close(heads(STATES), logits(plain()), rtol=1e-4, atol=1e-4)
    assert sorted(read) == sorted(names)
    files = ["config.json", WEIGHTS, LEGACY, INDEX]
    assert fetched == ([] if where == "folder" else [files, [*files, "three.safetensors", "two.safetensors"]])


def test_heads_of_their_own_come_before_those_of_a_model(tmp_path):
    other = {name: weight + 1 for name, weight in prefixed("medusa_head.").items()}
    write(tmp_path, other | MODEL, MEDUSA, WHOLE)
    write(tmp_path, plain(), MEDUSA)
    assert MedusaHeads.from_pretrained(tmp_path)(STATES).allclose(logits(plain()), atol=1e-4)


def test_heads_in_a_model_whose_config_names_no_other_belong_to_it(tmp_path):
    config = {name: value for name, value in MEDUSA.items() if name != "base_model_name_or_path"}
    folder = write(tmp_path / "tuned", prefixed("medusa_head.") | MODEL, config, WHOLE)
    assert MedusaHeads.from_pretrained(folder).config.base_model == str(folder)


def test_vllms_blocks_may_have_no_bias_and_its_logits_a_scale(tmp_path):
    weights = {name: weight for name, weight in plain().items() if not name.endswith("bias")}
    zeros = {name: torch.zeros_like(weight) for name, weight in plain().items() if name.endswith("bias")}
    write(tmp_path, vllm(weights), VLLM | {"logit_scale": 0.125}, WHOLE)
    heads = MedusaHeads.from_pretrained(tmp_path)
    torch.testing.assert_close(heads(STATES), 0.125 * logits(weights | zeros), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["lm_head.weight", "lm_heads.0.weight"])
def test_one_output_layer_of_vllm_serves_all_heads(name, tmp_path):
    """With original_lm_head its file holds one matrix."""
    weights = plain() | {f"{head}.{LAYERS}.weight": plain()[f"0.{LAYERS}.weight"] for head in range(HEADS)}
    stored = {key: weight for key, weight in vllm(weights).items() if not key.startswith("lm_heads")}
    stored[name] = weights[f"0.{LAYERS}.weight"]
    write(tmp_path, stored, VLLM | {"original_lm_head": True}, WHOLE)
    torch.testing.assert_close(MedusaHeads.from_pretrained(tmp_path)(STATES), logits(weights), rtol=1e-4, atol=1e-4)


TOKEN_MAP = torch.tensor([3, 19, 0, 7, 11])


@pytest.mark.parametrize("whole_rows", [False, True])
def test_a_truncated_vocabulary_is_mapped_back_to_the_tokens(whole_rows, tmp_path):
    """vLLM takes the map's rows of an output layer that has all."""
    weights, outputs = plain(), [f"{head}.{LAYERS}.weight" for head in range(HEADS)]
    stored = weights | {} if whole_rows else weights | {name: weights[name][TOKEN_MAP] for name in outputs}
    config = VLLM | {"truncated_vocab_size": 5}
    heads = MedusaHeads.from_pretrained(write(tmp_path, vllm(stored) | {"token_map": TOKEN_MAP}, config, WHOLE))
    found, expected = heads(STATES), logits(weights)
    assert found.shape == (HEADS, 5, VOCAB)
    torch.testing.assert_close(found[..., TOKEN_MAP], expected[..., TOKEN_MAP], rtol=1e-4, atol=1e-4)
    absent = sorted(set(range(VOCAB)) - set(TOKEN_MAP.tolist()))
    assert (found.softmax(-1)[..., absent] == 0).all() and len(absent) == VOCAB - 5
    order = expected[..., TOKEN_MAP].argsort(-1, descending=True)
    assert found.topk(5).indices.equal(TOKEN_MAP[order])
    heads.save_pretrained(tmp_path / "ours")
    assert MedusaHeads.from_pretrained(tmp_path / "ours")(STATES).equal(found)


@pytest.mark.parametrize(("change", "said"), [
    (lambda w: w.pop("token_map"), "truncated_vocab_size is 5 of 20, and the weights have no token_map"),
    (lambda w: w.update(token_map=torch.tensor([3, 19, 0, 7, 20])), "5 different tokens below 20"),
    (lambda w: w.update(token_map=torch.tensor([3, 19, 0, 7, 7])), "with 4 different ones"),
    (lambda w: w.update(token_map=TOKEN_MAP.float()), r"got torch\.float32"),
    (lambda w: w.update({"lm_heads.1.weight": torch.zeros(6, HIDDEN)}), "1.2.weight has 6 rows"),
    (lambda w: w.pop("lm_heads.2.weight"), "lack weights: 2.2.bias, 2.2.weight"),
    (lambda w: w.pop("blocks.1.layers.0.weight"), "lack weights: 1.0.linear.weight"),
    (lambda w: w.update({"lm_head.bias": torch.zeros(5)}), r"unknown weights: lm_head.bias; their layout is vLLM"),
])  # fmt: skip
def test_vllms_files_that_do_not_fit_their_config_are_named(change, said, tmp_path):
    outputs = [f"{head}.{LAYERS}.weight" for head in range(HEADS)]
    weights = vllm(plain() | {name: plain()[name][TOKEN_MAP] for name in outputs}) | {"token_map": TOKEN_MAP}
    change(weights)
    with pytest.raises(ValueError, match=said):
        MedusaHeads.from_pretrained(write(tmp_path, weights, VLLM | {"truncated_vocab_size": 5}, WHOLE))


@pytest.mark.parametrize(("config", "said"), [
    ({"vocab_size": 21}, r"0.2.weight .* is \[20, 8\], its config asks for \[21, 8\]"),
    ({"hidden_size": 9}, r"0.0.linear.bias .* is \[8\], its config asks for \[9\]"),
    ({"num_heads": 4}, "lack weights: 3.0.linear.bias"),
    ({"num_hidden_layers": 1}, r"have unknown weights: 0.1.linear"),
])  # fmt: skip
def test_vllms_config_is_honoured(config, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        MedusaHeads.from_pretrained(write(tmp_path, vllm(plain()), VLLM | config, WHOLE))


@pytest.mark.parametrize(("weights", "said"), [
    ({"hydra_head.0.mlp.weight": torch.zeros(2, 2), "fc.weight": torch.zeros(2, 2)},
     "no heads in a layout that is known here: its weights are fc.weight, hydra_head.0.mlp.weight; known are Medusa"),
    (plain() | prefixed("medusa_heads."), "heads in 2 layouts, .* 0.0.linear.bias, medusa_heads.0.0.linear.bias"),
    (prefixed("medusa_head.") | vllm(plain()), "heads in 2 layouts"),
    (plain() | {"other.weight": torch.zeros(1)}, "unknown weights: other.weight; their layout is Medusa"),
    (prefixed("medusa_heads.") | MODEL | {"medusa_heads.0.0.linear.weight_scale": torch.ones(1)},
     r"unknown weights: medusa_heads.0.0.linear.weight_scale \(quantised heads are not read\)"),
    (prefixed("medusa_heads.") | {"medusa_heads.0.0.linear.weight": torch.zeros(8, 8).to(torch.float8_e4m3fn)},
     r"weight 0.0.linear.weight in .* is torch.float8_e4m3fn: quantised heads are not read"),
])  # fmt: skip
def test_what_no_layout_has_is_named_with_the_layouts_that_are_known(weights, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        MedusaHeads.from_pretrained(write(tmp_path, weights, MEDUSA, WHOLE))


def test_an_unknown_layout_lists_every_known_one():
    with pytest.raises(ValueError, match=re.escape(", ".join(f"{one.name} ({one.example})" for one in LAYOUTS))):
        find_layout(["a", "b", "c", "d", "e"], "here")
    assert all(find_layout([layout.example], "here") is layout for layout in LAYOUTS)


@pytest.mark.parametrize("layout", ["plain", "ModelOpt", "vLLM"])
def test_a_config_without_numbers_is_named(layout, tmp_path):
    weights = {"plain": plain(), "ModelOpt": prefixed("medusa_heads."), "vLLM": vllm(plain())}[layout]
    missing = "num_heads, num_hidden_layers" if layout == "vLLM" else "medusa_num_heads, medusa_num_layers"
    with pytest.raises(ValueError, match=f"the config lacks {missing}"):
        MedusaHeads.from_pretrained(write(tmp_path, weights, {}))


def test_damaged_files_are_named(tmp_path):
    folder = write(tmp_path, plain(), MEDUSA)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        MedusaHeads.from_pretrained(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json must hold an object, got list"):
        MedusaHeads.from_pretrained(folder)
    write(tmp_path, plain(), MEDUSA)
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:100])
    with pytest.raises(ValueError, match=r"medusa_lm_head\.safetensors is damaged or half-written \(100 bytes\)"):
        MedusaHeads.from_pretrained(folder)
    (folder / WEIGHTS).unlink()
    for index, said in (({}, "no weight_map"), ({"weight_map": {"medusa_head.0.0.linear.weight": "absent"}}, "absent")):
        (folder / INDEX).write_text(json.dumps(index))
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            MedusaHeads.from_pretrained(folder)
    save_file({"other": torch.zeros(1)}, folder / "absent")
    with pytest.raises(ValueError, match="absent lacks the weight medusa_head.0.0.linear.weight, which .* says it has"):
        MedusaHeads.from_pretrained(folder)
    assert load_file(folder / "absent").keys() == {"other"}
