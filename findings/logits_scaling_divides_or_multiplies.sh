#!/usr/bin/env bash
# One config field, two meanings: logits_scaling divides the logits in Granite and multiplies them in HyperCLOVA X.
#
# With: transformers 5.24.0, torch 2.13.0 on a CPU, Python 3.11. Date: 2026-12-01.
#
# Tiny random models of both families, logits_scaling=8: what the output layer gives is 8 times the model's logits in
# Granite, and an eighth of them in HyperCLOVA X. So whoever draws tokens from hidden states and the output layer
# (Medusa heads, early exit, EAGLE's shared head) gets the temperature wrong 64 times over by reading the field alone.
#
# Output seen:
#   GraniteForCausalLM: the model's logits are 0.125 times its output layer's
#   HyperCLOVAXForCausalLM: the model's logits are 8 times its output layer's
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.24.0 torch==2.13.0
cat > "$folder/run.py" <<'PYTHON'
import sys

import torch
from transformers import GraniteConfig, GraniteForCausalLM, HyperCLOVAXConfig, HyperCLOVAXForCausalLM

SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64, logits_scaling=8.0)  # fmt: skip
found = []
for config, kind in ((GraniteConfig, GraniteForCausalLM), (HyperCLOVAXConfig, HyperCLOVAXForCausalLM)):
    torch.manual_seed(0)
    model, seen = kind(config(**SIZES)).eval(), []
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        logits = model(torch.arange(5, 13)[None]).logits
    ratio = logits / seen[0]
    assert torch.allclose(ratio, ratio[0, 0, 0].expand_as(ratio), rtol=1e-3)
    found.append(round(float(ratio.median()), 3))
    print(f"{kind.__name__}: the model's logits are {found[-1]:g} times its output layer's")
sys.exit(found != [0.125, 8.0])
PYTHON
"$folder/venv/bin/python" "$folder/run.py"
