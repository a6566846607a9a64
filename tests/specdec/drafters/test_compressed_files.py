"""Drafters whose files compressed-tensors has packed: they are the drafters of the unpacked weights, or are refused."""

import importlib.util
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import specdec
from specdec.drafters.block.loading import load_block
from specdec.drafters.eagle3.loading import load_eagle3
from tests.specdec.drafters.block.test_golden import GOLDEN as BLOCKS
from tests.specdec.drafters.eagle3.conftest import runner  # noqa: F401
from tests.specdec.drafters.eagle3.test_golden import GOLDEN

GROUP = 8
# kind -> format, type and bits of weights, whether zero points, whether activations are rounded too
KINDS = {
    "int4": ("pack-quantized", "int", 4, False, False),
    "int4, zero points": ("pack-quantized", "int", 4, True, False),
    "int8": ("pack-quantized", "int", 8, False, False),
    "int8 and activations": ("int-quantized", "int", 8, False, True),
    "fp8 and activations": ("float-quantized", "float", 8, False, True),
    "fp8": ("naive-quantized", "float", 8, False, False),
}


@pytest.fixture(autouse=True)
def library():
    pytest.importorskip("compressed_tensors")


def packed(weight, kind):
    """A weight as the library stores it, and the plain one that this stands for."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    form, type_, bits, zeros, _ = KINDS[kind]
    group = GROUP if bits == 4 else weight.shape[1]
    groups = weight.float().unflatten(1, (-1, group))
    most = 448.0 if type_ == "float" else 2 ** (bits - 1) - 1
    scale, zero = groups.abs().amax(2).clamp(min=1e-6) / most, torch.zeros(groups.shape[:2])
    if zeros:
        low, high = groups.amin(2), groups.amax(2)
        scale = (high - low).clamp(min=1e-6) / 15
        zero = (-8 - low / scale).round().clamp(-8, 7)
    numbers = groups / scale[..., None] + zero[..., None]
    if type_ == "float":
        numbers = numbers.to(torch.float8_e4m3fn)
    else:
        numbers = numbers.round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    plain = ((numbers.float() - zero[..., None]) * scale[..., None]).flatten(1)
    stored = {"weight_scale": scale}
    if form != "pack-quantized":
        return stored | {
            "weight": numbers.flatten(1).to(torch.float8_e4m3fn if type_ == "float" else torch.int8)
        }, plain
    words = pack_to_int32(numbers.flatten(1).to(torch.int8), bits)
    stored |= {"weight_packed": words, "weight_shape": torch.tensor(weight.shape)}
    if zeros:
        stored["weight_zero_point"] = pack_to_int32(zero.to(torch.int8), bits, packed_dim=0).contiguous()
    return stored, plain


def write(golden, folder, kind):
    """Two folders of a golden drafter: with all layers' matrices packed, and with what these stand for."""
    weights, config = load_file(golden / "model.safetensors"), json.loads((golden / "config.json").read_text())
    form, type_, bits, zeros, activations = KINDS[kind]
    inside, plain = dict(weights), dict(weights)
    for name, weight in weights.items():
        # the library cannot unpack the zero points of 8 outputs, which are one word
        if (name.endswith("_proj.weight") or name == "fc.weight") and not (zeros and len(weight) == 8):
            stored, plain[name] = packed(inside.pop(name), kind)
            inside |= {f"{name.removesuffix('.weight')}.{part}": value for part, value in stored.items()}
    scheme = dict(num_bits=bits, type=type_, symmetric=not zeros, strategy="group" if bits == 4 else "channel")
    scheme |= {"group_size": GROUP} if bits == 4 else {}
    rounded = dict(num_bits=8, type=type_, symmetric=True, strategy="token", dynamic=True) if activations else None
    group = dict(targets=["Linear"], weights=scheme, input_activations=rounded, output_activations=None, format=form)
    nothing = dict(kv_cache_scheme=None, global_compression_ratio=None, sparsity_config={}, transform_config={})
    section = dict(quant_method="compressed-tensors", format=form, quantization_status="compressed", version="0.20.1",
                   ignore=["lm_head", "embed_tokens"], config_groups={"group_0": group}, **nothing)  # fmt: skip
    for place, held, settings in (("packed", inside, {"quantization_config": section}), ("plain", plain, {})):
        shutil.copytree(golden, folder / place)
        save_file(held, folder / place / "model.safetensors")
        (folder / place / "config.json").write_text(json.dumps(config | settings))
    return folder / "packed", folder / "plain"


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_drafter_is_that_of_its_unpacked_weights(kind, runner, tmp_path):  # noqa: F811
    there, plain = write(GOLDEN / "each_norm", tmp_path, kind)
    (ours, _), (theirs, _) = (load_eagle3(runner, folder) for folder in (there, plain))
    weights, wanted = ours.state_dict(), theirs.state_dict()
    assert weights.keys() == wanted.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, wanted[name], atol=1e-6, rtol=1e-6)
    golden, _ = load_eagle3(runner, GOLDEN / "each_norm")
    assert (golden.fc.weight - ours.fc.weight).abs().max() > 1e-4, "packing rounds"
    form, type_, bits, *_ = KINDS[kind]
    assert f"weights unpacked from compressed-tensors ({form}, {type_}{bits}); activations stay" in ours.about
    ids = torch.tensor([[5, 17, 30, 2, 9]])
    texts = [specdec.SpeculativeGenerator(runner, specdec.load_drafter(folder, runner)).generate(ids, max_new_tokens=12)
             for folder in (there, plain)]  # fmt: skip
    assert texts[0].sequences.equal(texts[1].sequences)
    assert texts[0].stats.pooled.accepted == texts[1].stats.pooled.accepted


def test_block_drafters_are_unpacked_too(runner, tmp_path):  # noqa: F811
    (ours, _), (theirs, _) = (load_block(runner, folder) for folder in write(BLOCKS / "dspark", tmp_path, "int4"))
    for name, weight in ours.state_dict().items():
        torch.testing.assert_close(weight, theirs.state_dict()[name], atol=1e-6, rtol=1e-6)


def test_a_wrong_scale_is_seen(runner, tmp_path):  # noqa: F811
    there, plain = write(GOLDEN / "each_norm", tmp_path, "int4")
    weights = load_file(there / "model.safetensors")
    weights["fc.weight_scale"] = weights["fc.weight_scale"].roll(1, 1)
    save_file(weights, there / "model.safetensors")
    (ours, _), (theirs, _) = (load_eagle3(runner, folder) for folder in (there, plain))
    assert (ours.fc.weight - theirs.fc.weight).abs().max() > 1e-3


REFUSED = {
    "kv_cache_scheme is {'num_bits': 8}": lambda s, w: s.update(kv_cache_scheme=dict(num_bits=8)),
    "transform_config is .*which is not read of compressed-tensors": lambda s, w: s.update(transform_config=dict(a=1)),
    "lacks the field config_groups": lambda s, w: s.pop("config_groups"),
    "group_0 is nvfp4-pack-quantized; of compressed-tensors pack-quantized, int-quantized": lambda s, w: s[
        "config_groups"
    ]["group_0"].update(format="nvfp4-pack-quantized"),
    "fc lacks weight_shape, which compressed-tensors's pack-quantized": lambda s, w: w.pop("fc.weight_shape"),
    "fc.weight_scale is there, but no group of compressed-tensors names": lambda s, w: s["ignore"].append("fc"),
    "1 weights are left over.*: fc.weight_g_idx": lambda s, w: w.update({"fc.weight_g_idx": torch.arange(48)}),
    "unknown fields.*new_trick": lambda s, w: s.update(new_trick=1),
    "1 weights are missing: fc.weight": lambda s, w: [w.pop(name) for name in list(w) if name.startswith("fc.")],
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_unpacked_is_refused_by_name(message, runner, tmp_path):  # noqa: F811
    there, _ = write(GOLDEN / "plain", tmp_path, "int4")
    weights, config = load_file(there / "model.safetensors"), json.loads((there / "config.json").read_text())
    REFUSED[message](config["quantization_config"], weights)
    save_file(weights, there / "model.safetensors")
    (there / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_eagle3(runner, there)


def test_without_the_library_that_is_said(runner, tmp_path, monkeypatch):  # noqa: F811
    there, _ = write(GOLDEN / "plain", tmp_path, "int8")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "compressed_tensors" else find(name))
    with pytest.raises(ImportError, match=r"compressed-tensors has packed .* 'specdec-lab\[quant\]'"):
        load_eagle3(runner, there)
