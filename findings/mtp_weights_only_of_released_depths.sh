#!/usr/bin/env bash
# transformers finds a checkpoint's multi-token-prediction layer only at the depth of the released DeepSeek-V3.
#
# With: transformers 5.24.0, torch 2.13.0 on a CPU, Python 3.11. Date: 2026-12-02.
#
# DeepSeek-V3's layout keeps the MTP layer as decoder layer n of an n-layer model (`num_nextn_predict_layers: 1`). The
# model class drops such weights at load, and `generate(use_mtp=True)` reads them later, by a pattern that names layer
# 61. A valid checkpoint of another depth (distilled, pruned, a test's 3 layers) decodes as usual, but with use_mtp the
# weights, which are in the file, are reported as missing. GLM-4's classes name their released depths likewise. With the
# pattern of the instance changed to the true depth the same folder works.
#
# Output seen:
#   plain: 4 new tokens
#   use_mtp, as loaded: RuntimeError, weights missing
#   use_mtp, pattern of layer 3: 4 new tokens, the same: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder" && python3 -m venv venv
venv/bin/pip install --quiet transformers==5.24.0 torch==2.13.0 numpy==2.4.2
cat > run.py <<'PYTHON'
import json
import sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DeepseekV3Config
sizes = dict(vocab_size=23, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=4,
             moe_intermediate_size=16, n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2,
             kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, v_head_dim=8, qk_nope_head_dim=8,
             first_k_dense_replace=1, bos_token_id=0, eos_token_id=None, pad_token_id=1)
torch.manual_seed(0)
AutoModelForCausalLM.from_config(DeepseekV3Config(num_hidden_layers=4, **sizes)).save_pretrained("model")
weights = load_file("model/model.safetensors")  # layer 3 becomes the MTP layer of a model of three
for part, shape in {"enorm": [32], "hnorm": [32], "eh_proj": [32, 64], "shared_head.norm": [32]}.items():
    weights[f"model.layers.3.{part}.weight"] = torch.rand(shape) / 9 + (len(shape) == 1)
save_file(weights, "model/model.safetensors", {"format": "pt"})
config = json.load(open("model/config.json")) | {"num_hidden_layers": 3, "num_nextn_predict_layers": 1}
json.dump(config, open("model/config.json", "w"))
model = AutoModelForCausalLM.from_pretrained("model").eval()
ids, options = torch.tensor([[5, 6, 7]]), dict(max_new_tokens=4, do_sample=False)
plain = model.generate(ids, **options)
print(f"plain: {plain.shape[1] - 3} new tokens")
try:
    refused = model.generate(ids, use_mtp=True, **options) is None
except Exception as error:
    refused = "missing" in str(error)
    print(f"use_mtp, as loaded: {type(error).__name__}, weights missing" if refused else error)
model._keys_to_ignore_on_load_unexpected = [r"model\.layers\.3.*"]
text = model.generate(ids, use_mtp=True, **options)
print(f"use_mtp, pattern of layer 3: {text.shape[1] - 3} new tokens, the same: {text.equal(plain)}")
sys.exit(not (refused and text.equal(plain)))
PYTHON
venv/bin/python run.py 2> log || { cat log; exit 1; }
