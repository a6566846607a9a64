"""Train the target and the draft model that ship with the library, from scratch, on the Python standard library's
source.

    python -m scripts.train_tiny_pair --output runs/tiny_pair            # about ten minutes on one H200 python -m
    scripts.train_tiny_pair --output runs/smoke --preset smoke # seconds on a CPU: checks the path, not the models

Stages: tokenizer, target, samples drawn from the target, draft distilled on them, record. Each resumes where an
interrupted run stopped. The draft learns the target's own distribution on the target's own text (Kim and Rush 2016;
Zhou et al. 2024, DistillSpec), half Kullback-Leibler, half total variation, because 1 - total variation is the
acceptance probability itself (Leviathan et al. 2023)."""

import argparse
import ast
import hashlib
import json
import math
import platform
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from scripts.common.tiny_corpus import HELD_OUT, build_prompts, edit_documents, load_corpus
from scripts.common.training_loop import train
from specdec.training.checkpoint import refuse_other_settings, write_json

EOS, PAD = "<|endoftext|>", "<|pad|>"
PRESETS = {
    # context: tokens per training row; batch: rows per step; samples: rows drawn from the target for distillation
    # dropout and weight decay are high because the corpus has 10 M tokens and the target sees each of them some twenty
    # times: held-out loss 1.92 with these, 1.98 with dropout 0.1 and weight decay 0.5, 2.26 at best without dropout
    "full": dict(
        context=1024,
        batch=128,
        target_steps=1800,
        target_lr=3e-3,
        dropout=0.15,
        weight_decay=1.0,
        samples=32768,
        sample_batch=4096,
        draft_steps=5400,
        draft_lr=3e-3,
        target=dict(
            hidden_size=192, intermediate_size=432, num_hidden_layers=20, num_attention_heads=3, num_key_value_heads=1
        ),
        draft=dict(
            hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
        ),
    ),
    "smoke": dict(
        context=64,
        batch=4,
        target_steps=6,
        target_lr=3e-3,
        dropout=0.1,
        weight_decay=0.5,
        samples=8,
        sample_batch=8,
        draft_steps=6,
        draft_lr=3e-3,
        target=dict(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
        ),
        draft=dict(
            hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
        ),
    ),
}


def train_tokenizer(texts, folder, vocab_size=4096):
    """Byte-level BPE with single digits, saved to `folder` in transformers' format; loaded again if it is there."""
    if not (folder / "tokenizer_config.json").exists():  # written last
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[EOS, PAD], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
        bpe.train_from_iterator(texts, trainer)
        fast = transformers.PreTrainedTokenizerFast(
            tokenizer_object=bpe, eos_token=EOS, bos_token=EOS, pad_token=PAD, padding_side="left"
        )
        fast.save_pretrained(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def tokenize(texts, tokenizer):
    """All texts as one uint16 array, each closed by the end-of-text token."""
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return np.concatenate([np.asarray([*row, tokenizer.eos_token_id], dtype=np.uint16) for row in rows])


def build_model(shape, vocab_size, context, seed):
    """A randomly initialised Llama of the given shape; residual outputs are scaled down with depth (Radford et al.
    2019).
    """
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=vocab_size,
        head_dim=64,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
        initializer_range=0.04,
        **shape,
    )
    model = transformers.LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.data.div_(math.sqrt(2 * config.num_hidden_layers))
    return model


def rows_of(stream, starts, length, device):
    """Rows `[len(starts), length]` (int64) of a token stream, beginning at `starts`."""
    rows = torch.from_numpy(np.stack([stream[s : s + length] for s in starts]).astype(np.int64))
    return rows.to(device, non_blocking=True)


@torch.inference_mode()
def held_out_loss(model, stream, context, device, rows=64):
    """Mean next-token loss in nats over the first `rows` windows of the held-out stream."""
    losses, training = [], model.training
    model.eval()
    for start in range(0, min(rows, (len(stream) - 1) // context), 8):
        x = rows_of(
            stream, [i * context for i in range(start, min(start + 8, (len(stream) - 1) // context))], context, device
        )
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(x, use_cache=False).logits
        losses.append(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), x[:, 1:].flatten()))
    model.train(training)
    return torch.stack(losses).mean().item()


def add_dropout(model, probability):
    """Drop elements of what each block adds to the residual stream, in training mode only; the saved model has no trace
    of it.
    """

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

    def evaluate():
        return {"held_out_loss": round(held_out_loss(model, held_out, preset["context"], device), 4)}

    records = train(
        model,
        loss_of,
        steps=preset["target_steps"],
        lr=preset["target_lr"],
        weight_decay=preset["weight_decay"],
        checkpoint=folder / "target.pt",
        evaluate=evaluate,
    )
    return model.eval(), records


@torch.inference_mode()
def draw_samples(model, preset, stream, folder, device, seed):
    """Rows `[samples, context]` (uint16): a window of training text continued by the target, at the temperatures users
    decode with.
    """
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
            out = model.generate(
                rows_of(stream, starts, prompt, device),
                do_sample=True,
                temperature=temperature,
                top_k=0,
                max_new_tokens=length - prompt,
            )
            assert out.shape == (preset["sample_batch"], length), f"samples have shape {tuple(out.shape)}"
            with open(path.with_suffix(".tmp"), "wb") as file:
                np.save(file, out.cpu().numpy().astype(np.uint16))
            path.with_suffix(".tmp").rename(path)
            print(f"sampled chunk {chunk} at temperature {temperature} in {time.monotonic() - began:.1f} s", flush=True)
        chunks.append(np.load(path))
    return np.concatenate(chunks)


def distillation_loss(draft_logits, target_logits):
    """Half KL(p || q), half total variation, averaged over positions; p the target's distribution, q the draft's."""
    log_q, log_p = draft_logits.float().log_softmax(-1), target_logits.float().log_softmax(-1)
    p = log_p.exp()
    kl = (p * (log_p - log_q)).sum(-1)
    variation = 0.5 * (p - log_q.exp()).abs().sum(-1)
    return (0.5 * kl + 0.5 * variation).mean()


def distillation(draft, target):
    """A function from tokens `[B, S]` to the loss of `draft` against `target` on them; compiled on a GPU."""

    def loss_on(x):
        with torch.no_grad():
            p = target(x, use_cache=False).logits
        return distillation_loss(draft(x, use_cache=False).logits, p)

    return torch.compile(loss_on) if draft.device.type == "cuda" else loss_on


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

    def evaluate():
        return {"held_out_loss": round(held_out_loss(model, held_out, preset["context"], device), 4)}

    records = train(model, loss_of, steps=preset["draft_steps"], lr=preset["draft_lr"], weight_decay=0.01,
                    checkpoint=folder / "draft.pt", evaluate=evaluate)  # fmt: skip
    return model.eval(), records


@torch.inference_mode()
def expected_acceptance(target, draft, stream, context, device, rows=64):
    """Mean of Σ min(p, q) over held-out positions: the probability that one drafted token is accepted at temperature
    1.
    """
    means = []
    for start in range(0, min(rows, len(stream) // context), 8):
        x = rows_of(
            stream, [i * context for i in range(start, min(start + 8, len(stream) // context))], context, device
        )
        p, q = (m(x, use_cache=False).logits.float().softmax(-1) for m in (target, draft))
        means.append(torch.minimum(p, q).sum(-1).mean())
    return torch.stack(means).mean().item()


def parses_as_python(prompt, completion, slack=3):
    """Whether prompt + completion parses once at most `slack` unfinished last lines are dropped, keeping half of the
    completion or more.
    """
    lines, kept = (prompt + completion).splitlines(), len((prompt + completion[: len(completion) // 2]).splitlines())
    for drop in range(slack + 1):
        if len(lines) - drop < kept:
            return False
        try:
            ast.parse("\n".join(lines[: len(lines) - drop]))
            return True
        except (SyntaxError, ValueError):
            continue
    return False


def repeats_itself(completion):
    """Whether a completion of four lines or more has at most 60% distinct lines: small models decoded greedily loop."""
    lines = [line.strip() for line in completion.splitlines() if line.strip()]
    return len(lines) >= 4 and len(set(lines)) <= 0.6 * len(lines)


@torch.inference_mode()
def completions(model, tokenizer, texts, device, new_tokens=128):
    """Greedy completions of `texts`, decoded, cut at the end-of-text token."""
    batch = tokenizer(texts, return_tensors="pt", padding=True).to(device)
    batch.pop("token_type_ids", None)
    out = model.generate(**batch, do_sample=False, max_new_tokens=new_tokens)
    return tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def export(model, folder):
    """Save in bf16 safetensors with a plain config."""
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)


def main(arguments=None):
    """Run all stages; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for checkpoints and the finished pair")
    parser.add_argument("--stdlib", type=Path, help="standard library source (default: this interpreter's)")
    parser.add_argument("--preset", choices=PRESETS, default="full")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    preset, device, work = PRESETS[options.preset], torch.device(options.device), options.output / "work"
    pair = options.output / "tiny_pair"
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
    refuse_other_settings(work / "settings.json", {"seed": options.seed, "settings": preset, "corpus": corpus})
    texts = [text for _, text in files] + edit_documents(files, options.seed)
    tokenizer = train_tokenizer(texts, pair / "target", 4096 if options.preset == "full" else 512)
    stream, held_out = tokenize(texts, tokenizer), tokenize([text for _, text in held_files], tokenizer)
    print(f"{len(files)} files, {len(stream):,} training tokens, {len(held_out):,} held out", flush=True)

    target, target_records = train_target(preset, stream, held_out, tokenizer, work, device, options.seed)
    export(target, pair / "target")
    samples = draw_samples(target, preset, stream, work, device, options.seed)
    draft, draft_records = train_draft(target, preset, stream, samples, held_out, tokenizer, work, device, options.seed)
    export(draft, pair / "draft")

    target, draft = (
        transformers.AutoModelForCausalLM.from_pretrained(pair / name, dtype=torch.float32).to(device).eval()
        for name in ("target", "draft")
    )
    prompts = build_prompts(held_files, seed=options.seed)
    write_json(prompts, pair / "prompts.json")
    code = [
        entry["text"]
        for entry in build_prompts(held_files, per_kind=32, seed=options.seed + 1, kinds=("code",))["code"]
    ]
    texts = completions(target, tokenizer, code, device)
    write_json([{"prompt": p, "completion": c} for p, c in zip(code, texts, strict=True)], work / "completions.json")
    write_json(
        {
            "target": {
                "parameters": target.num_parameters(),
                "held_out_loss": round(held_out_loss(target, held_out, preset["context"], device), 4),
                "tokens_seen": preset["target_steps"] * preset["batch"] * preset["context"],
                "log": target_records,
            },
            "draft": {
                "parameters": draft.num_parameters(),
                "held_out_loss": round(held_out_loss(draft, held_out, preset["context"], device), 4),
                "tokens_seen": preset["draft_steps"] * preset["batch"] * samples.shape[1],
                "log": draft_records,
            },
            "expected_acceptance": round(expected_acceptance(target, draft, held_out, preset["context"], device), 4),
            "share_of_greedy_completions_that_parse": round(sum(map(parses_as_python, code, texts)) / len(code), 4),
            "share_of_greedy_completions_that_repeat_themselves": round(sum(map(repeats_itself, texts)) / len(code), 4),
            "training_tokens": len(stream),
            "held_out_tokens": len(held_out),
            "held_out_files": list(HELD_OUT),
            "seed": options.seed,
            "settings": preset,
            "corpus": corpus,
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu",
        },
        pair / "record.json",
    )
    summary = json.loads((pair / "record.json").read_text())
    print(json.dumps({k: summary[k] for k in ("expected_acceptance", "share_of_greedy_completions_that_parse")}))


if __name__ == "__main__":
    main()
