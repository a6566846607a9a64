"""One small model with weights quantised in every way, as transformers loads them, and the checkpoints that it takes.

torchao quantises while transformers loads; checkpoints of GPTQ, AWQ and compressed-tensors are written here, with
numbers that are rounded to the nearest: what their algorithms choose is other numbers of the same form."""

import copy
import json
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import save_file
from torch import Tensor

from tests.families import VOCAB

GROUP = 32  # inner positions that share a scale in 4 bits
AWQ_ORDER = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
TORCHAO = ("int8", "int4", "fp8", "int8 dynamic")
PACKAGES = dict.fromkeys(TORCHAO, "torchao") | {
    "gptq": "gptqmodel", "awq": "gptqmodel", "compressed int8": "compressed_tensors",
    "compressed int4": "compressed_tensors", "compressed int8 dynamic": "compressed_tensors",
}  # fmt: skip
KINDS = tuple(PACKAGES)
DYNAMIC = tuple(kind for kind in KINDS if kind.endswith("dynamic"))  # activations in 8 bits, a scale for each token
FORMATS = {  # what config.json says of a checkpoint
    "gptq": dict(quant_method="gptq", bits=4, group_size=GROUP, desc_act=False, sym=False, checkpoint_format="gptq"),
    "awq": dict(quant_method="awq", bits=4, group_size=GROUP, zero_point=True, version="gemm"),
}


def model_of(kind: str | None, dtype: torch.dtype = torch.float32, output_layer: bool = False):
    """The model, quantised as one of KINDS (None: as it is), in eval mode; of its own to whoever asks.

    output_layer: whether torchao quantises that too.

    Skips the test, with a reason, where a package is missing."""
    if kind is not None:
        pytest.importorskip(PACKAGES[kind], reason=f"{PACKAGES[kind]} is not installed")
    if kind in TORCHAO:
        config = tf.TorchAoConfig(_torchao(kind))
        if output_layer:
            config.modules_to_not_convert = []
        options = {"quantization_config": config}
        return tf.AutoModelForCausalLM.from_pretrained(_folder(None), dtype=dtype, **options).eval()
    return tf.AutoModelForCausalLM.from_pretrained(_folder(kind), dtype=dtype).eval()


def draft_of():
    """A model whose tokens are those of `model_of` now and then."""
    draft = copy.deepcopy(_plain())
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.std() * 0.05)
    return draft


@cache
def _plain():
    config = tf.LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=160, initializer_range=0.15, bos_token_id=0, eos_token_id=2,
        pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(config).eval()


def _torchao(kind: str):
    from torchao import quantization as ao

    made = {
        "int8": ao.Int8WeightOnlyConfig,
        "int4": lambda: ao.IntxWeightOnlyConfig(torch.int4, ao.PerGroup(GROUP)),
        "fp8": ao.Float8WeightOnlyConfig,
        "int8 dynamic": ao.Int8DynamicActivationInt8WeightConfig,
    }
    return made[kind]()


@cache
def _folder(kind: str | None) -> Path:
    """A checkpoint, in float32 and scales of float16; it lives as long as this process."""
    model, tensors = _plain(), {}
    for name, weight in model.state_dict().items():
        if kind is None or not name.endswith("proj.weight"):
            tensors[name] = weight
            continue
        made = _compressed(weight, kind) if kind.startswith("compressed") else _four_bits(weight, kind)
        tensors |= {name.removesuffix("weight") + key: tensor.contiguous() for key, tensor in made.items()}
    _KEPT.append(tempfile.TemporaryDirectory())
    folder = Path(_KEPT[-1].name)
    settings = model.config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    if kind is not None:
        settings["quantization_config"] = FORMATS[kind] if kind in FORMATS else _scheme(kind)
    (folder / "config.json").write_text(json.dumps(settings, default=str))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


_KEPT: list[tempfile.TemporaryDirectory] = []


def _four_bits(weight: Tensor, kind: str) -> dict[str, Tensor]:
    """`weight [out, in]` as GPTQ or AWQ stores it, with scale and zero of each group and output."""
    groups = weight.t().unflatten(0, (-1, GROUP))  # [groups, GROUP, out]
    low, high = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
    scales = ((high - low) / 15).half()
    zeros = (-low / scales.float()).round().clamp(1, 15).long()
    numbers = (groups / scales.float()[:, None] + zeros[:, None]).round().clamp(0, 15).flatten(0, 1).long()
    return {"scales": scales} | (gptq_words if kind == "gptq" else awq_words)(numbers, zeros)


def gptq_words(numbers: Tensor, zeros: Tensor, less_one: bool = True) -> dict[str, Tensor]:
    """0 to 15 `numbers [in, out]` and `zeros [groups, out]`, stored less one, as GPTQ packs them."""
    words = numbers.long().unflatten(0, (-1, 8)) << 4 * torch.arange(8)[:, None]
    packed = (zeros.long() - int(less_one)).unflatten(1, (-1, 8)) << 4 * torch.arange(8)
    order = torch.arange(len(numbers), dtype=torch.int32) // (len(numbers) // len(zeros))
    return {"qweight": to_int32(words.sum(1)), "qzeros": to_int32(packed.sum(2)), "g_idx": order}


def awq_words(numbers: Tensor, zeros: Tensor) -> dict[str, Tensor]:
    """0 to 15 `numbers [in, out]` and `zeros [groups, out]` as AWQ packs them."""
    packed = {
        key: given.long().unflatten(1, (-1, 8))[..., AWQ_ORDER] << 4 * torch.arange(8)
        for key, given in (("qweight", numbers), ("qzeros", zeros))
    }
    return {key: to_int32(words.sum(-1)) for key, words in packed.items()}


def to_int32(words: Tensor) -> Tensor:
    """Numbers of 32 bits without a sign in an int32."""
    return torch.where(words > 0x7FFFFFFF, words - (1 << 32), words).to(torch.int32)


def _compressed(weight: Tensor, kind: str) -> dict[str, Tensor]:
    """`weight [out, in]` as compressed-tensors stores it: with a scale for each output, or in 4 bits for each group."""
    most, group = (7, GROUP) if kind.endswith("int4") else (127, weight.shape[1])
    groups = weight.unflatten(1, (-1, group))
    scales = groups.abs().amax(2) / most
    numbers = (groups / scales[..., None]).round().clamp(-most - 1, most).flatten(1).to(torch.int8)
    if kind.endswith("dynamic"):
        return {"weight": numbers, "weight_scale": scales}
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    packed = pack_to_int32(numbers, 4 if most == 7 else 8)
    return {"weight_packed": packed, "weight_scale": scales, "weight_shape": torch.tensor(weight.shape)}


def _scheme(kind: str) -> dict:
    common = dict(type="int", symmetric=True)
    weights = common | dict(num_bits=8, strategy="channel", dynamic=False)
    if kind.endswith("int4"):
        weights |= dict(num_bits=4, strategy="group", group_size=GROUP)
    activations = common | dict(num_bits=8, strategy="token", dynamic=True) if kind.endswith("dynamic") else None
    form = "int-quantized" if activations else "pack-quantized"
    group = dict(targets=["Linear"], weights=weights, input_activations=activations, output_activations=None)
    return dict(
        quant_method="compressed-tensors", format=form, quantization_status="compressed", ignore=["lm_head"],
        config_groups={"group_0": group | {"format": form}},
    )  # fmt: skip
