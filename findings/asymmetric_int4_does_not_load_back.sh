#!/usr/bin/env bash
# transformers cannot load an asymmetric int4 model of compressed-tensors that it has just saved.
#
# With: transformers 5.24.0, compressed-tensors 0.20.1, torch 2.13.0 on a CPU, Python 3.11. Date: 2026-12-02.
#
# Weights in groups of 32 with a zero point a group, the form that AWQ and GPTQ recipes write: compression packs eight
# zero points in a 32-bit word along the outputs, so the file holds [outputs / 8, groups]. When transformers makes the
# empty model to load into, its zero points stay unpacked, [outputs, groups], and from_pretrained raises for seven
# mismatched shapes. The same model with symmetric weights, which have no zero points, loads and gives the logits that
# it had before. compressed-tensors 0.19.0 does the same; transformers 5.17.0 loads the folder with either version.
#
# Output seen:
#   symmetric: loads, logits as before: True
#   asymmetric: zero points in the file [16, 4] for a layer of 128 outputs; from_pretrained raises RuntimeError
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder" && python3 -m venv venv
venv/bin/pip install --quiet transformers==5.24.0 compressed-tensors==0.20.1 torch==2.13.0 accelerate==1.14.0
cat > run.py <<'PYTHON'
import sys
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
sizes = dict(vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4)
ids = torch.arange(8)[None]
def saved(name, symmetric):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    weights = dict(num_bits=4, type="int", strategy="group", group_size=32, symmetric=symmetric)
    groups = {"group_0": dict(targets=["Linear"], weights=weights)}
    config = QuantizationConfig(config_groups=groups, format="pack-quantized", ignore=["lm_head"])
    apply_quantization_config(model, config)
    for module in (one for one in model.modules() if getattr(one, "weight_scale", None) is not None):
        values = module.weight.data.unflatten(1, (-1, 32))
        low, high = values.amin(2), values.amax(2)
        scale = values.abs().amax(2) / 7.5 if symmetric else (high - low) / 15
        module.weight_scale.data.copy_(scale)
        if not symmetric: module.weight_zero_point.data.copy_((-8 - low / scale).round().clamp(-8, 7))
    logits = model(ids).logits
    compressor = ModelCompressor(quantization_config=config)
    compressor.compress_model(model)
    model.save_pretrained(name)
    compressor.update_config(name)
    return logits
before = saved("symmetric", True)
same = torch.allclose(AutoModelForCausalLM.from_pretrained("symmetric")(ids).logits, before, atol=1e-4)
print("symmetric: loads, logits as before:", same)
saved("asymmetric", False)
with safe_open("asymmetric/model.safetensors", "pt") as file:
    shape = list(file.get_tensor("model.layers.0.self_attn.q_proj.weight_zero_point").shape)
try: AutoModelForCausalLM.from_pretrained("asymmetric"); raised = "nothing"
except RuntimeError as error: raised = type(error).__name__
print(f"asymmetric: zero points in the file {shape} for a layer of 128 outputs; from_pretrained raises {raised}")
sys.exit(not same or shape != [16, 4] or raised != "RuntimeError")
PYTHON
venv/bin/python run.py 2> log || { cat log; exit 1; }
