"""What the experiment trains: a target, its Medusa heads, a draft model; and the tree of the heads."""

import json
from dataclasses import asdict

import numpy as np
import torch

from medusa import MedusaHeads, calibrated_tree, head_ranks
from medusa.calibration import reached
from medusa.settings import TrainingSettings
from medusa.training import train_medusa
from scripts.common.tiny_models import build_model, distillation, export, held_out_loss, rows_of
from scripts.common.training_loop import train
from specdec import AutoregressiveGenerator
from specdec.planning.costs import measure_costs
from specdec.training.data import Rows, build_rows

TREE_SIZE, TOPS = 64, (1, 5, 10)


def streams(folder):
    """The token streams `(training, held out)` that `make_corpus` wrote."""
    return tuple(np.load(folder / f"{name}.npy") for name in ("train", "held_out"))


def make_target(preset, folder, tokenizer, device, seed):
    """Next-token training on random windows; exported in bf16."""
    stream, held_out = streams(folder)
    model = build_model(preset["target"], len(tokenizer), preset["context"], seed).to(device)
    count, least = model.num_parameters(), preset["parameters_at_least"]
    print(f"target of {count:,} parameters, {len(stream):,} training tokens, {len(held_out):,} held out", flush=True)
    if count < least:
        raise ValueError(f"the target must have at least {least:,} parameters, got {count:,}")
    forward = torch.compile(model) if device.type == "cuda" else model
    loss_on = lambda x: forward(x, labels=x, use_cache=False).loss
    return trained("target", model, loss_on, stream, held_out, preset, folder, [seed, 1], log_every=5)


def make_draft(preset, target, folder, tokenizer, seed):
    """A draft model distilled from the target on random windows; exported in bf16."""
    model = build_model(preset["draft"], len(tokenizer), preset["context"], seed + 1).to(target.device)
    loss_on = distillation(model, target)
    return trained("draft", model, loss_on, *streams(folder), preset, folder, [seed, 4], log_every=4)


def trained(name, model, loss_on, stream, held_out, preset, folder, seed, log_every):
    """Train on random windows of `stream`, export to `folder`/`name`, and say how it went."""
    steps, batch, context = preset[f"{name}_steps"], preset[f"{name}_batch"], preset["context"]

    def loss_of(step):
        starts = np.random.default_rng([*seed, step]).integers(0, len(stream) - context, batch)
        return loss_on(rows_of(stream, starts, context, model.device))

    evaluate = lambda: {"held_out_loss": round(held_out_loss(model, held_out, context, model.device), 4)}
    log = train(
        model, loss_of, steps=steps, lr=preset[f"{name}_lr"], checkpoint=folder / f"{name}.pt", evaluate=evaluate,
        save_every_s=120.0, log_every=max(log_every, steps // 12),
    )  # fmt: skip
    export(model, folder / name)
    (folder / f"{name}.pt").unlink()  # gigabytes that nothing reads any more
    return {
        "parameters": model.num_parameters(),
        "held_out_loss": log[-1]["held_out_loss"],
        "tokens_seen": steps * batch * context,
        "log": log,
    }


def windows(stream, count, length, seed):
    """`count` windows of a token stream, none twice, as training rows that are learned everywhere."""
    starts = np.random.default_rng(seed).permutation(len(stream) // length)[:count] * length
    tokens = torch.from_numpy(np.stack([stream[start : start + length] for start in starts]).astype(np.int32))
    return Rows(tokens, tokens, torch.zeros_like(tokens))


def training_rows(preset, folder, seed):
    """The rows that heads, and what is compared with them, learn from."""
    stream, _ = streams(folder)
    return windows(stream, preset["heads_steps"] * preset["heads_batch"], preset["context"], [seed, 2])


def accelerator_for(model):
    """bf16 arithmetic on a GPU; elsewhere None, the training's default."""
    from accelerate import Accelerator

    return Accelerator(mixed_precision="bf16") if model.device.type == "cuda" else None


def make_heads(preset, model, folder, seed):
    """Medusa-1: heads in float32 on the frozen target; saved in the target's dtype."""
    steps, rows = preset["heads_steps"], training_rows(preset, folder, seed)
    validation = windows(streams(folder)[1], preset["validation_rows"], preset["context"], [seed, 3])
    settings = TrainingSettings(
        steps, preset["heads_batch"], preset["rows_at_once"], preset["heads_lr"], seed=seed, save_every=250,
        log_every=max(1, steps // 20), validate_every=steps,
    )  # fmt: skip
    heads = MedusaHeads.for_model(model, preset["heads"]).float()
    work, accelerator = folder / "heads_work", accelerator_for(model)
    log = train_medusa(model, heads, rows, work, settings, validation, accelerator, progress=False)
    heads.to(model.dtype).save_pretrained(folder / "heads")
    of_heads = lambda top: [log[-1].pop(f"head_{head}_top_{top}") for head in range(preset["heads"])]
    return {
        "parameters": sum(p.numel() for p in heads.parameters()),
        "accuracies": {f"top_{top}": of_heads(top) for top in TOPS},
        "tokens_seen": rows.tokens.numel(),
        "log": log,
    }


def calibration_ranks(preset, ours, heads, tokenizer, folder):
    """The heads' `HeadRanks` on the greedy text of the target of the generator `ours`, and the number of texts."""
    model = ours.target.model
    prompts = json.loads((folder / "prompts.json").read_text())["calibration"]
    asked = [prompt["text"] for chosen in prompts.values() for prompt in chosen]
    batch = tokenizer(asked, return_tensors="pt", padding=True).to(model.device)
    out = ours.generate(batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=preset["tokens"])
    width, lengths = batch.input_ids.shape[1], batch.attention_mask.sum(1).tolist()
    texts = [
        {"tokens": tokens[width - length : width + new], "learned_from": length}
        for tokens, length, new in zip(out.sequences.tolist(), lengths, out.lengths.tolist(), strict=True)
    ]
    return head_ranks(heads, model, build_rows(texts, tokenizer, preset["context"], packing=False)), len(texts)


def make_calibration(preset, model, heads, tokenizer, folder, mode):
    """Accuracies on the target's greedy text, costs on this machine in this mode, and the tree that follows."""
    ours = AutoregressiveGenerator(model, mode=mode)
    found, texts = calibration_ranks(preset, ours, heads, tokenizer, folder)
    costs = measure_costs(ours.target)
    tree = calibrated_tree(found, TREE_SIZE, costs)
    return {
        "texts": texts,
        "accuracies": found.accuracies(),
        "costs": asdict(costs),
        "nodes": tree.size,
        "depth": tree.max_depth,
        "expected_tokens_per_round": sum(reached(tree, found)),
        "choices": tree.choices,
    }
