"""Train the target and the draft model that ship with the library, from scratch, on the Python standard library.

    python -m scripts.train_tiny_pair --output runs/tiny_pair               # about ten minutes on one H200
    python -m scripts.train_tiny_pair --output runs/smoke --preset smoke    # seconds on a CPU: checks the path only

Stages: tokenizer, target, samples drawn from the target, draft distilled on them, record. Each resumes where an
interrupted run stopped. The draft learns the target's own distribution on the target's own text (Kim and Rush 2016;
Zhou et al. 2024, DistillSpec), half Kullback-Leibler, half total variation, because 1 - total variation is the
acceptance probability itself (Leviathan et al. 2023).
"""

import argparse
import hashlib
import json
import platform
import time
from pathlib import Path

import numpy as np
import torch
import transformers

from scripts.common.entry import run_script
from scripts.common.quality import completions, expected_acceptance, parses_as_python, repeats_itself
from scripts.common.tiny_corpus import HELD_OUT, build_prompts, edit_documents, load_corpus
from scripts.common.tiny_models import (
    build_model,
    distillation,
    export,
    held_out_loss,
    rows_of,
    tokenize,
    train_tokenizer,
)
from scripts.common.training_loop import train
from specdec.training.checkpoint import refuse_other_settings, write_json

# context: tokens per training row; batch: rows per step; samples: rows drawn from the target for distillation
# dropout and weight decay are high because the corpus has 10 M tokens and the target sees each of them some twenty
# times: held-out loss 1.92 with these, 1.98 with dropout 0.1 and weight decay 0.5, 2.26 at best without dropout
# fmt: off
PRESETS = {
    "full": dict(
        context=1024, batch=128, target_steps=1800, target_lr=3e-3, dropout=0.15, weight_decay=1.0,
        samples=32768, sample_batch=4096, draft_steps=5400, draft_lr=3e-3,
        target=dict(hidden_size=192, intermediate_size=432, num_hidden_layers=20, num_attention_heads=3,
                    num_key_value_heads=1),
        draft=dict(hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=2,
                   num_key_value_heads=1),
    ),
    "smoke": dict(
        context=64, batch=4, target_steps=6, target_lr=3e-3, dropout=0.1, weight_decay=0.5,
        samples=8, sample_batch=8, draft_steps=6, draft_lr=3e-3,
        target=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                    num_key_value_heads=1),
        draft=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                   num_key_value_heads=1),
    ),
}
# fmt: on


def add_dropout(model, probability):
    """Drop elements of each block's addition to the residual stream, in training mode only; nothing of it is saved."""

    def drop(module, inputs, output):
        if isinstance(output, tuple):
            return (torch.nn.functional.dropout(output[0], probability, module.training), *output[1:])
        return torch.nn.functional.dropout(output, probability, module.training)

    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(drop)
        layer.mlp.register_forward_hook(drop)


def train_target(preset, stream, held_out, tokenizer, folder, device, seed):
    """Next-token training on random windows of the corpus."""
    model = build_model(preset["target"], len(tokenizer), preset["context"], seed).to(device)
    add_dropout(model, preset["dropout"])
    forward = torch.compile(model) if device.type == "cuda" else model

    def loss_of(step):
        torch.manual_seed(seed * 1_000_003 + step)  # dropout repeats after a resume
        starts = np.random.default_rng([seed, 1, step]).integers(0, len(stream) - preset["context"], preset["batch"])
        x = rows_of(stream, starts, preset["context"], device)
        return forward(x, labels=x, use_cache=False).loss

    records = train(
        model, loss_of, steps=preset["target_steps"], lr=preset["target_lr"], weight_decay=preset["weight_decay"],
        checkpoint=folder / "target.pt", evaluate=_evaluation(model, held_out, preset, device),
    )  # fmt: skip
    return model.eval(), records


def _evaluation(model, held_out, preset, device):
    return lambda: {"held_out_loss": round(held_out_loss(model, held_out, preset["context"], device), 4)}


@torch.inference_mode()
def draw_samples(model, preset, stream, folder, device, seed):
    """Rows `[samples, context]` (uint16): windows of training text continued by the target at several temperatures."""
    length, prompt = preset["context"], min(96, preset["context"] // 8)
    model = model.to(torch.bfloat16) if device.type == "cuda" else model
    model.generation_config.eos_token_id = None  # rows run on past the end of a text, as the corpus does
    chunks = []
    for chunk in range(preset["samples"] // preset["sample_batch"]):
        path = folder / f"samples_{chunk}.npy"
        if not path.exists():
            began = time.monotonic()
            torch.manual_seed(seed * 1000 + chunk)
            starts = np.random.default_rng([seed, 2, chunk]).integers(0, len(stream) - prompt, preset["sample_batch"])
            temperature = (1.0, 1.0, 0.4)[chunk % 3]
            asked = rows_of(stream, starts, prompt, device)
            sampling = {"do_sample": True, "temperature": temperature, "top_k": 0}
            out = model.generate(asked, max_new_tokens=length - prompt, **sampling)
            assert out.shape == (preset["sample_batch"], length), f"samples have shape {tuple(out.shape)}"
            with open(path.with_suffix(".tmp"), "wb") as file:
                np.save(file, out.cpu().numpy().astype(np.uint16))
            path.with_suffix(".tmp").rename(path)
            print(f"sampled chunk {chunk} at temperature {temperature} in {time.monotonic() - began:.1f} s", flush=True)
        chunks.append(np.load(path))
    return np.concatenate(chunks)


def train_draft(target, preset, stream, samples, held_out, tokenizer, folder, device, seed):
    """Distil the draft: three quarters of each batch are the target's own samples, one quarter is corpus text."""
    model = build_model(preset["draft"], len(tokenizer), preset["context"], seed + 1).to(device)
    loss_on = distillation(model, target.to(torch.bfloat16) if device.type == "cuda" else target)
    length, rows = samples.shape[1], preset["batch"]

    def loss_of(step):
        rng = np.random.default_rng([seed, 3, step])
        own = torch.from_numpy(samples[rng.integers(0, len(samples), rows * 3 // 4)].astype(np.int64)).to(device)
        corpus = rows_of(stream, rng.integers(0, len(stream) - length, rows - len(own)), length, device)
        return loss_on(torch.cat([own, corpus]))

    records = train(
        model, loss_of, steps=preset["draft_steps"], lr=preset["draft_lr"], weight_decay=0.01,
        checkpoint=folder / "draft.pt", evaluate=_evaluation(model, held_out, preset, device),
    )  # fmt: skip
    return model.eval(), records


def options_of(arguments):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for checkpoints and the finished pair")
    parser.add_argument("--stdlib", type=Path, help="standard library source (default: this interpreter's)")
    parser.add_argument("--preset", choices=PRESETS, default="full")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


def main(arguments=None):
    """Run all stages; see the module's docstring."""
    options = options_of(arguments)
    preset, device, seed = PRESETS[options.preset], torch.device(options.device), options.seed
    pair, work = options.output / "tiny_pair", options.output / "work"
    work.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")

    files, held_files = load_corpus(options.stdlib)
    if options.preset == "smoke":
        files = files[::40]
    corpus = {
        "python": options.stdlib.name if options.stdlib else platform.python_version(),
        "files": len(files),
        "sha256": hashlib.sha256("".join(text for _, text in files).encode()).hexdigest(),
    }
    refuse_other_settings(work / "settings.json", {"seed": seed, "settings": preset, "corpus": corpus})
    texts = [text for _, text in files] + edit_documents(files, seed)
    tokenizer = train_tokenizer(texts, pair / "target", 4096 if options.preset == "full" else 512)
    stream, held_out = tokenize(texts, tokenizer), tokenize([text for _, text in held_files], tokenizer)
    print(f"{len(files)} files, {len(stream):,} training tokens, {len(held_out):,} held out", flush=True)

    target, target_log = train_target(preset, stream, held_out, tokenizer, work, device, seed)
    export(target, pair / "target")
    samples = draw_samples(target, preset, stream, work, device, seed)
    draft, draft_log = train_draft(target, preset, stream, samples, held_out, tokenizer, work, device, seed)
    export(draft, pair / "draft")

    measured = measure(pair, work, tokenizer, held_files, held_out, preset["context"], device, seed)
    of_target, of_draft = measured.pop("target"), measured.pop("draft")
    row = preset["batch"] * preset["context"]
    record = {
        "target": {**of_target, "tokens_seen": preset["target_steps"] * row, "log": target_log},
        "draft": {**of_draft, "tokens_seen": preset["draft_steps"] * row, "log": draft_log},
        **measured,
        "training_tokens": len(stream),
        "held_out_tokens": len(held_out),
        "held_out_files": list(HELD_OUT),
        "seed": seed,
        "settings": preset,
        "corpus": corpus,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu",
    }
    write_json(record, pair / "record.json")
    print(json.dumps({k: record[k] for k in ("expected_acceptance", "share_of_greedy_completions_that_parse")}))


def measure(pair, work, tokenizer, held_files, held_out, context, device, seed):
    """Load the finished pair, choose its prompts, and measure it on held-out files."""
    models = {
        name: transformers.AutoModelForCausalLM.from_pretrained(pair / name, dtype=torch.float32).to(device).eval()
        for name in ("target", "draft")
    }
    write_json(build_prompts(held_files, seed=seed), pair / "prompts.json")
    chosen = build_prompts(held_files, per_kind=32, seed=seed + 1, kinds=("code",))["code"]
    code = [entry["text"] for entry in chosen]
    texts = completions(models["target"], tokenizer, code, device)
    write_json([{"prompt": p, "completion": c} for p, c in zip(code, texts, strict=True)], work / "completions.json")
    losses = {
        name: {
            "parameters": model.num_parameters(),
            "held_out_loss": round(held_out_loss(model, held_out, context, device), 4),
        }
        for name, model in models.items()
    }
    return {
        **losses,
        "expected_acceptance": round(expected_acceptance(*models.values(), held_out, context, device), 4),
        "share_of_greedy_completions_that_parse": round(sum(map(parses_as_python, code, texts)) / len(code), 4),
        "share_of_greedy_completions_that_repeat_themselves": round(sum(map(repeats_itself, texts)) / len(code), 4),
    }


if __name__ == "__main__":
    run_script(main)
