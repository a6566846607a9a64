"""Quantise a model with calibration, through llm-compressor, as a checkpoint of compressed-tensors.

    python -m scripts.calibrate_quantised --model DIR --method gptq --output DIR_W4A16
    python -m scripts.calibrate_quantised --model DIR --method smoothquant --output DIR_W8A8
    python -m scripts.calibrate_quantised --train runs/wide --method awq --output DIR_W4A16  # a small model of its own

`gptq` (Frantar et al. 2023) and `awq` (Lin et al. 2024) give weights in 4 bits with a scale for each output and
`--group` inner positions; `smoothquant` (Xiao et al. 2023) gives weights and activations in 8 bits, these with a scale
for each token. Layers that do not divide into groups stay in 16 bits and are listed, as is the output layer. Texts to
calibrate on are the lines of `--data`, or this Python's own source. Whatever loads the result by transformers decodes
with it: `specdec.load_model(DIR)`.

llm-compressor holds transformers and compressed-tensors to versions of its own, so it goes into an environment of its
own (scripts/README.md). A CPU is enough for small models. The last line is the result as JSON.
"""

import argparse
import json
import re
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from scripts.common.entry import run_script
from scripts.common.quantise import GROUP, misfits, output_name
from scripts.generate_bench.models import read_texts
from scripts.quantised_bench.wide import PRESETS, read_streams, tiny_tokenizer, wide_target

METHODS = ("gptq", "awq", "smoothquant")


def recipe(model, method: str, ignore: Sequence[str], group: int) -> list:
    """What llm-compressor is to do with `model`, step by step; layers in `ignore` stay in 16 bits."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier

    if method == "smoothquant":
        from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

        rounded = GPTQModifier(targets="Linear", scheme="W8A8", ignore=list(ignore))
        return [SmoothQuantModifier(smoothing_strength=0.5, ignore=list(ignore)), rounded]
    weights = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=group, symmetric=True)
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    if method == "gptq":
        return [GPTQModifier(config_groups=groups, ignore=list(ignore))]
    from llmcompressor.modifiers.transform.awq import AWQModifier

    rounded = QuantizationModifier(config_groups=groups, ignore=list(ignore))
    return [AWQModifier(mappings=_smoothed(model, ignore)), rounded]


def _smoothed(model, ignore: Sequence[str]) -> list:
    """llm-compressor's mappings for AWQ, less those into layers that stay, where it has nothing to weigh."""
    from llmcompressor.modifiers.transform.awq.dynamic_mappings import get_layer_mappings_from_model

    stays = lambda pattern: any(re.match(pattern.removeprefix("re:"), name) for name in ignore)
    return [one for one in get_layer_mappings_from_model(model) if not any(map(stays, one.balance_layers))]


def calibration_rows(data: Path | None, tokenizer, samples: int, length: int) -> DataLoader:
    """Up to `samples` rows of `length` tokens, one at a time, evenly spread over the texts.

    Raises ValueError where the texts are too short for one row."""
    if data is None:
        stream = torch.from_numpy(read_streams(tokenizer, every=20).train.astype("int64"))
    else:
        stream = torch.tensor([token for text in read_texts(data) for token in tokenizer(text)["input_ids"]])
    count = min(samples, len(stream) // length)
    if count < 1:
        raise ValueError(f"{data} holds {len(stream)} tokens, too few for a row of {length}")
    starts = torch.linspace(0, len(stream) - length, count).long().tolist()
    rows = [{"input_ids": stream[start : start + length]} for start in starts]
    return DataLoader([row | {"attention_mask": torch.ones_like(row["input_ids"])} for row in rows], batch_size=1)


def without_pinned_memory():
    """A context in which AWQ pins no memory on a machine without a GPU, where PyTorch has none and raises."""
    from llmcompressor.pipelines.cache import IntermediatesCache

    pins = torch.accelerator.is_available()
    return nullcontext() if pins else mock.patch.object(IntermediatesCache, "pin_memory", lambda *_, **__: None)


def calibrate(model, tokenizer, options) -> list[str]:
    """Quantise `model` in place and save it; returns the names of layers that stay in 16 bits."""
    from llmcompressor import oneshot

    stay = [*(misfits(model, options.group) if options.method != "smoothquant" else []), output_name(model)]
    rows = calibration_rows(options.data, tokenizer, options.samples, options.length)
    with without_pinned_memory():
        oneshot(
            model=model, dataset=rows, recipe=recipe(model, options.method, stay, options.group),
            max_seq_length=options.length, num_calibration_samples=len(rows),
        )  # fmt: skip
    model.save_pretrained(options.output, save_compressed=True)
    tokenizer.save_pretrained(options.output)
    return stay


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", metavar="DIR_OR_HUB_ID", help="the model to quantise")
    which.add_argument("--train", type=Path, metavar="DIR", help="train a model 512 wide in DIR first (six minutes)")
    parser.add_argument("--preset", choices=PRESETS, default="full", help="of --train (default: %(default)s)")
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--output", type=Path, metavar="DIR", required=True)
    parser.add_argument("--group", type=int, default=GROUP, help="inner positions a scale (default: %(default)s)")
    parser.add_argument("--data", type=Path, metavar="FILE", help='texts, a line each, plain or {"text": …}')
    parser.add_argument("--samples", type=int, default=128, help="rows to calibrate on (default: %(default)s)")
    parser.add_argument("--length", type=int, default=128, help="tokens a row (default: %(default)s)")
    options = parser.parse_args(arguments)
    if min(options.group, options.samples, options.length) < 1:
        parser.error("--group, --samples and --length must be at least 1")
    name = options.model
    if options.train is not None:
        tokenizer = tiny_tokenizer()
        streams = read_streams(tokenizer, 60 if options.preset == "smoke" else 1)
        name = wide_target(options.train, streams, tokenizer, options.preset)
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype="auto").eval()
    stay = calibrate(model, tokenizer, options)
    print(f"in 16 bits: {', '.join(stay)}")
    print(json.dumps({"method": options.method, "group": options.group, "in_16_bits": stay}))


if __name__ == "__main__":
    run_script(main)
