"""What a file must have, what its format decides, and errors that name what does not fit."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import medusa
import specdec
from specdec.drafters.eagle3.loading import load_eagle3
from specdec.drafters.network.rotation import Rotation
from tests.specdec.drafters.eagle3.test_golden import CHAINS, GOLDEN


class Files:
    """A copy of a golden folder that a test may spoil."""

    def __init__(self, name, folder):
        shutil.copytree(GOLDEN / name, folder, dirs_exist_ok=True)
        self.folder, self.config = folder, json.loads((folder / "config.json").read_text())
        self.weights = load_file(folder / "model.safetensors")

    def write(self):
        (self.folder / "config.json").write_text(json.dumps(self.config))
        save_file(self.weights, self.folder / "model.safetensors")
        return self.folder

    def flat(self):
        """Turn it into an original file."""
        inner = self.config.pop("transformer_layer_config")
        kept = {name: self.config[name] for name in ("draft_vocab_size", "fc_norm", "norm_output")}
        self.config = inner | kept | dict(architectures=["LlamaForCausalLMEagle3"])
        self.weights = {name.replace("layers.0.", "midlayer."): weight for name, weight in self.weights.items()}
        return self


@pytest.fixture
def files(tmp_path):
    return lambda name="each_norm": Files(name, tmp_path)


def refuses(runner, files, match, **options):
    with pytest.raises(ValueError, match=match):
        load_eagle3(runner, files.write(), **options)


def test_the_format_is_told(runner):
    told = specdec.load_drafter(GOLDEN / "each_norm", runner).describe()
    assert "format: speculators, eagle3, llama layers" in told
    assert "target_layers (2, 4, 5): eagle_aux_hidden_state_layer_ids is [2, 4, 5], as in output_hidden_states" in told
    assert "embeddings: its own, width 16" in told


@pytest.mark.parametrize("name", CHAINS)
def test_a_loaded_drafter_drafts_for_greedy_text_of_the_target(runner, name):
    drafter = specdec.load_drafter(GOLDEN / name, runner.model)
    assert drafter.traits.max_tokens == 3, "as many as the file proposes"
    tokens = torch.tensor([[5, 17, 30, 2, 9]])
    plain = specdec.AutoregressiveGenerator(runner.model, mode="eager").generate(tokens, max_new_tokens=20)
    out = specdec.SpeculativeGenerator(runner.model, drafter, mode="eager").generate(tokens, max_new_tokens=20)
    assert torch.equal(out.sequences, plain.sequences)


def test_embeddings_and_output_layer_may_be_the_targets_own(runner, files):
    some = files("plain")
    del some.weights["embed_tokens.weight"], some.weights["lm_head.weight"]
    model, _ = load_eagle3(runner, some.write())
    assert "embeddings: the target's, width 16" in model.about and "output layer: the target's" in model.about
    tokens, states = torch.tensor([3, 40]), torch.randn(2, 16)
    assert torch.equal(model.embed(tokens), runner.model.get_input_embeddings()(tokens))
    torch.testing.assert_close(model.logits(states), runner.model.get_output_embeddings()(states))
    assert not any("embed_tokens" in name or "lm_head" in name for name, _ in model.named_parameters())


def test_a_drafter_of_another_width_has_embeddings_of_its_own(runner, files):
    """As in the original for Llama 3.3 70B: `target_hidden_size` is the target's, `hidden_size` the drafter's."""
    some = files("plain").flat()
    some.config |= dict(target_hidden_size=16, hidden_size=8, head_dim=8)
    for name, weight in some.weights.items():
        halves = {"fc.weight": weight[:8], "embed_tokens.weight": weight[:, :8]} if weight.ndim == 2 else {}
        weight = halves.get(name, weight)
        if name.startswith("midlayer.self_attn.") and "o_proj" not in name:
            weight = weight[:, :16]
        elif "o_proj" in name or "down_proj" in name:
            weight = weight[:8]
        elif "gate_proj" in name or "up_proj" in name or name == "lm_head.weight":
            weight = weight[:, :8]
        elif "norm" in name:
            weight = weight[:8]
        some.weights[name] = weight.contiguous()
    model, _ = load_eagle3(runner, some.write())
    assert model.config.hidden_size == 8 and model.fuse(torch.randn(2, 48)).shape == (2, 8)
    del some.weights["embed_tokens.weight"]
    refuses(runner, some, "no embed_tokens.weight, and embeddings of .* have width 16 where .* embeddings of width 8")


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda f: f.weights.pop("fc.weight"), "1 weights are missing: fc.weight"),
        (lambda f: f.weights.pop("d2t"), "d2t is missing: which 20 of 48 tokens"),
        (lambda f: f.weights.pop("lm_head.weight"), "lm_head.weight is missing"),
        (lambda f: f.weights.update(extra=torch.ones(2)), "1 weights are left over.*: extra"),
        (lambda f: f.config.update(fc_norm=False), "3 weights are left over.*fc_norm.0.weight"),
        (lambda f: f.weights.update({"norm.weight": torch.ones(8)}), r"norm.weight is \[8\], not \[16\]"),
        (lambda f: f.weights.update({"norm.weight": torch.ones(16, dtype=torch.int8)}), "norm.weight is torch.int8: quantised"),  # noqa: E501
        (lambda f: f.weights["d2t"].add_(1), "d2t and t2d disagree"),
        (lambda f: f.weights.update(t2d=torch.ones(48, dtype=torch.bool)), "d2t and t2d disagree.* 20 tokens, t2d 48"),
        (lambda f: f.weights.update(d2t=f.weights["d2t"][:10].clone()), r"d2t must hold 20 integers .*\[10\]"),
        (lambda f: f.config["transformer_layer_config"].pop("hidden_size"), "lacks the field hidden_size"),
        (lambda f: f.config.pop("draft_vocab_size"), "lacks the field draft_vocab_size"),
        (lambda f: f.config.update(norm_output="yes"), "norm_output must be of type bool, got 'yes'"),
        (lambda f: f.config.update(norm_before_fc=True), "fc_norm and norm_before_fc exclude each other"),
        (lambda f: f.config.update(new_trick=3), "unknown fields.*new_trick=3"),
        (lambda f: f.config["transformer_layer_config"].update(model_type="gemma3"), "model_type must be one of llama, qwen3"),  # noqa: E501
        (lambda f: f.config.update(quantization_config=dict(quant_method="gptq")), "quantised by gptq are not read"),
        (lambda f: f.config.update(speculators_model_type="dflash"), "speculators_model_type must be one of"),
        (lambda f: f.config["speculators_config"].update(algorithm="peagle"), "'eagle3' and algorithm .* 'peagle'"),
        (lambda f: f.config["transformer_layer_config"].update(rope_parameters=dict(rope_type="spiral")), "rope_type must"),  # noqa: E501
        (lambda f: f.config["transformer_layer_config"].update(hidden_act="sine"), "activation must be .* got 'sine'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(runner, files, spoil, match):
    some = files()
    spoil(some)
    refuses(runner, some, match)


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda c: c.update(target_hidden_size=32), r"hidden size \(target_hidden_size\) is 32 for it and 16"),
        (lambda c: c["transformer_layer_config"].update(vocab_size=64), r"t2d must have 64 entries \(vocab_size\)"),
        (lambda c: c.update(eagle_aux_hidden_state_layer_ids=[2, 4, 9]), r"\[2, 4, 9\] of 0 to 8 .* has 8 layers"),
    ],
)
def test_a_drafter_of_another_target_is_refused_with_both_values(runner, files, spoil, match):
    some = files()
    spoil(some.config)
    refuses(runner, some, match)


def test_another_vocabulary_is_refused_with_both_sizes(runner, files):
    some = files("plain")
    some.config["transformer_layer_config"]["vocab_size"] = some.config["draft_vocab_size"] = 64
    refuses(runner, some, r"vocabulary \(vocab_size\) is 64 for it and 48")


def test_unknown_fields_can_be_ignored_by_name(runner, files):
    some = files()
    some.config["new_trick"] = 3
    model, _ = load_eagle3(runner, some.write(), ignore=["new_trick"])
    assert model.config.draft_vocab_size == 20


def test_layer_ids_are_read_as_their_place_says(runner, files):
    """At top level indices of `output_hidden_states`, inside `eagle_config` outputs of layers; else the original's."""
    some = files("plain").flat()
    load = lambda: load_eagle3(runner, some.write())[0].config.target_layers
    name = "eagle_aux_hidden_state_layer_ids"
    some.config[name] = [1, 3, 4]
    assert load() == (1, 3, 4)
    some.config["eagle_config"] = {name: [1, 3, 4]}
    assert load() == (2, 4, 5)
    some.config[name] = [0, 2, 3]
    refuses(runner, some, r"\[0, 2, 3\] in config.json and \[1, 3, 4\] in its eagle_config")
    some.config["eagle_config"] = {name: [1, 3, 8]}
    del some.config[name]
    refuses(runner, some, r"eagle_config.* \[1, 3, 8\] means the states \[2, 4, 9\]")
    some.config["eagle_config"] = dict(use_aux_hidden_state=False)
    refuses(runner, some, "use_aux_hidden_state is False")
    del some.config["eagle_config"]
    assert load() == (2, 4, 5)  # 2, n // 2 and n - 3 of 8 layers


def test_layers_after_the_first_read_what_sglang_reads(runner, files):
    some = files("two_layers")
    some.config = files("two_layers").flat().config
    some.config |= dict(num_hidden_layers=2)
    name = "layers.1.input_layernorm.weight"
    some.weights["layers.1.hidden_norm.weight"] = torch.full((16,), 2.0)
    model, reading = load_eagle3(runner, some.write())
    assert model.config.deeper_norm == "hidden_norm" and "has both" in model.about
    assert bool((model.layers[1].input_layernorm.weight == 2).all()) and name in reading.spare
    other, _ = load_eagle3(runner, some.folder, read=dict(deeper_norm="input_layernorm"))
    assert torch.equal(other.layers[1].input_layernorm.weight, reading.spare[name].float())


def test_a_legacy_bin_of_tensors_is_read_and_other_pickles_are_not(runner, files):
    some = files("plain")
    folder = some.write()
    (folder / "model.safetensors").unlink()
    torch.save(some.weights, folder / "pytorch_model.bin")
    model, _ = load_eagle3(runner, folder)
    assert torch.equal(model.fc.weight, some.weights["fc.weight"].float())
    torch.save(dict(fc=print), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="more than tensors"):
        load_eagle3(runner, folder)


def test_the_kind_is_seen_or_given(runner, files, tmp_path):
    folder = files("plain").flat().write()
    assert type(specdec.load_drafter(folder, runner)).__name__ == "Eagle3Drafter"
    drafter = specdec.load_drafter(folder, runner, kind="eagle3", num_tokens=2)
    assert drafter.traits.max_tokens == 2
    with pytest.raises(ValueError, match="kind must be one of .*eagle3.*, got 'eagle4'"):
        specdec.load_drafter(folder, runner, kind="eagle4")
    (folder / "config.json").write_text(json.dumps(dict(speculators_model_type="xpress")))
    with pytest.raises(ValueError, match="speculators_model_type is 'xpress', which no kind"):
        specdec.load_drafter(folder, runner)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        load_eagle3(runner, tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (dict(rope_theta=5e5), ("default", 5e5)),
        (dict(rope_theta=5e5, rope_scaling=dict(type="linear", factor=2.0)), ("linear", 5e5)),
        (dict(rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=7e3)), ("linear", 7e3)),
        (dict(rope_scaling=dict(type="mrope", mrope_section=[1, 1, 2])), ("default", 1e4)),
        (dict(), ("default", 1e4)),
    ],
)
def test_rotations_of_old_and_new_configs(runner, files, given, expected):
    some = files("plain")
    inner = some.config["transformer_layer_config"]
    del inner["rope_parameters"]
    inner.update(given)
    rotation = load_eagle3(runner, some.write())[0].config.rotation
    assert (rotation.kind, rotation.parameters["rope_theta"]) == expected


def test_rotations_that_change_with_the_length_say_up_to_where_they_hold():
    assert Rotation(8, dict(rope_type="dynamic", rope_theta=1e4, factor=2.0), 64).max_length == 64
    factors = dict(short_factor=[1.0] * 4, long_factor=[2.0] * 4, original_max_position_embeddings=32, factor=2.0)
    assert Rotation(8, dict(rope_type="longrope", rope_theta=1e4, **factors), 64).max_length == 32
    assert Rotation(8).max_length is None


@pytest.mark.parametrize("layout", ["ours", "ModelOpt", "vLLM"])
def test_medusa_heads_load_by_the_same_name(runner, tmp_path, layout):
    heads = medusa.MedusaHeads.for_model(runner.model, 2)
    heads.save_pretrained(tmp_path)
    if layout != "ours":
        weights = load_file(tmp_path / "medusa_lm_head.safetensors")
        (tmp_path / "medusa_lm_head.safetensors").unlink()
        plain = {"linear.": "", "0.0.": "blocks.0.layers.0.", "1.0.": "blocks.1.layers.0."}
        rename = lambda name: f"medusa_heads.{name}"
        if layout == "vLLM":
            outputs = {f"{head}.1.weight": f"lm_heads.{head}.weight" for head in range(2)}
            rename = lambda name: outputs.get(name) or plain[name[:4]] + name[4:].replace("linear.", "")
        save_file({rename(name): weight for name, weight in weights.items()}, tmp_path / "model.safetensors")
        config = dict(medusa=dict(num_medusa_heads=2, num_medusa_layers=1))
        vllm = dict(model_type="medusa", num_heads=2, num_hidden_layers=1, vocab_size=48, hidden_size=16)
        (tmp_path / "config.json").write_text(json.dumps(vllm if layout == "vLLM" else config))
    drafter = specdec.load_drafter(tmp_path, runner)
    assert type(drafter).__name__ == "MedusaDrafter" and "2 Medusa heads of 1 blocks" in drafter.describe()
    states = torch.randn(3, 16)
    ours, theirs = (x(states, runner.output_layer) for x in (heads, drafter.heads))
    torch.testing.assert_close(ours, theirs)


def test_a_hub_id_is_fetched_with_its_config_and_weights_alone(runner, monkeypatch):
    asked = []

    def fetch(name, allow_patterns):
        asked.append((name, *allow_patterns))
        return str(GOLDEN / "plain")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    drafter = specdec.load_drafter("someone/some-drafter", runner, kind="eagle3", num_tokens=2)
    assert drafter.traits.max_tokens == 2 and "EAGLE-3 drafter someone/some-drafter" in drafter.describe()
    assert asked == [("someone/some-drafter", "config.json", "*.safetensors", "*.safetensors.index.json")]
