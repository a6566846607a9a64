#!/usr/bin/env bash
# torchao's fp8 weights turn an output whose weights are all zero into NaN.
#
# With: torchao 0.18.0, torch 2.13.0 on a CPU, Python 3.11. Date: 2026-12-02.
#
# A row of zeros is valid: pruned heads, padded vocabularies and adapters before training have them. With
# Float8WeightOnlyConfig the row gets the scale 0, its numbers are divided by it, and the layer gives NaN there for any
# input, without an error; in a model one such row makes all that follows NaN. Int8WeightOnlyConfig,
# Int8DynamicActivationInt8WeightConfig and IntxWeightOnlyConfig (4 bits) give 0 for the same row.
#
# Output seen:
#   fp8: zero output gives nan, others finite: True
#   int8: zero output gives 0.0, others finite: True
#   int8, dynamic activations: zero output gives 0.0, others finite: True
#   int4: zero output gives 0.0, others finite: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder" && python3 -m venv venv
venv/bin/pip install --quiet torchao==0.18.0 torch==2.13.0 numpy==2.4.2
cat > run.py <<'PYTHON'
import math
import sys
import torch
from torch import nn
from torchao import quantization as ao
KINDS = {
    "fp8": ao.Float8WeightOnlyConfig(),
    "int8": ao.Int8WeightOnlyConfig(),
    "int8, dynamic activations": ao.Int8DynamicActivationInt8WeightConfig(),
    "int4": ao.IntxWeightOnlyConfig(torch.int4, ao.PerGroup(32)),
}
found = {}
for kind, config in KINDS.items():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 4, bias=False, dtype=torch.bfloat16))
    with torch.no_grad():
        model[0].weight[1] = 0
    ao.quantize_(model, config)
    with torch.no_grad():
        out = model(torch.randn(1, 64, dtype=torch.bfloat16))[0].float()
    found[kind] = float(out[1])
    others = bool(out[[0, 2, 3]].isfinite().all())
    print(f"{kind}: zero output gives {found[kind]}, others finite: {others}")
sys.exit(not (math.isnan(found.pop("fp8")) and others and all(value == 0 for value in found.values())))
PYTHON
venv/bin/python run.py 2> log || { cat log; exit 1; }
