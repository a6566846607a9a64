"""Train the Medusa heads that ship with the library: self-distilled on the shipped target, calibrated, measured on held-out prompts.

    python -m scripts.train_tiny_heads --output runs/tiny_heads             # some minutes on one GPU
    python -m scripts.train_tiny_heads --output runs/tiny_heads --preset cpu  # an hour and a half on two cores
    python -m scripts.train_tiny_heads --output runs/smoke --preset smoke   # checks the path on a CPU, not the heads

The target continues pieces of the Python standard library, greedily and at other temperatures; heads learn from its words (`scripts.train_medusa`);
accuracies on its greedy words from held-out files choose the tree (`scripts.calibrate_medusa`). Then the shipped prompts, which neither has
seen, are decoded greedily with that tree and with every regular tree of its size. record.json says what came out.
"""

import argparse
import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

import medusa
import specdec
from medusa.calibration import TREE
from medusa.card import model_card
from medusa.checkpoint import write_json
from scripts import calibrate_medusa, train_medusa
from scripts.bench_attention import git_sha
from scripts.tiny_corpus import build_prompts, edit_documents, functions_of, load_corpus
from specdec.info import environment
from specdec.stats import pool
from specdec.tree import TokenTree

PRESETS = {
    "full": dict(every=1, texts=24576, heads=5, length=1024, epochs=12, batch=16, max_new_tokens=192, answer_batch=1024, temperatures=("0", "0", "0.7"),
                 held_out=96, tokens=128, prompts=8, precision="bf16"),
    "cpu": dict(every=1, texts=12288, heads=5, length=512, epochs=5, batch=8, max_new_tokens=128, answer_batch=64, temperatures=("0", "0.5", "1"),
                held_out=32, tokens=128, prompts=8, precision="bf16"),
    "smoke": dict(every=40, texts=6, heads=2, length=128, epochs=1, batch=2, max_new_tokens=8, answer_batch=4, temperatures=("0", "0.7"),
                  held_out=1, tokens=8, prompts=1, precision="no"),
}  # fmt: skip
NODES = 26
REGULAR = ((25,), (5, 4), (5, 2, 1), (5, 1, 1, 1, 1))  # all of 26 nodes


def write_texts(folder: Path, preset: dict, seed: int) -> None:
    """training.jsonl and held_out.jsonl, unless they are there: beginnings of functions, files and edits, of which 64 tokens are a prompt."""
    if (folder / "held_out.jsonl").exists():
        return
    train, held_files = load_corpus()
    train = train[:: preset["every"]]
    rng = random.Random(seed)
    edits = edit_documents(train, seed)
    edits = rng.sample(edits, min(len(edits), preset["texts"] // 6))
    texts = [function for _, text in train for function in functions_of(text) if len(function) > 300]
    texts += [text[start : start + 600] for _, text in train for start in range(0, len(text) - 300, 4000)]
    texts = rng.sample(texts, min(len(texts), preset["texts"] - len(edits))) + edits
    shipped = {text for prompts in specdec.load_tiny_pair().prompts.values() for text in prompts}
    held = [entry["text"] for prompts in build_prompts(held_files, preset["held_out"], seed + 1, or_fewer=True).values() for entry in prompts]
    for name, chosen in (("training", texts), ("held_out", [text for text in held if text not in shipped])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text[:600]}) + "\n" for text in chosen))


def measure(heads: medusa.MedusaHeads, target, pair, trees: dict[str, TokenTree], preset: dict) -> dict[str, dict[str, float]]:
    """Greedy tokens per round on the shipped prompts, {tree: {kind: value}}."""
    found = {}
    for name, tree in trees.items():
        generator = medusa.MedusaGenerator(target, heads, tree)
        stats = {}
        for kind, texts in pair.prompts.items():
            batch = pair.tokenizer(texts[: preset["prompts"]], return_tensors="pt", padding=True).to(target.device)
            stats[kind] = generator.generate(batch.input_ids, batch.attention_mask, max_new_tokens=preset["tokens"]).stats.pooled
        found[name] = {kind: one.tokens_per_round for kind, one in stats.items()} | {"all": pool(list(stats.values())).tokens_per_round}
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--preset", choices=PRESETS, default="full")
    parser.add_argument("--output-layer", default="low_rank")
    parser.add_argument("--rank", type=int)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    preset, work, model = PRESETS[options.preset], options.output / "work", str(specdec.tiny_pair.FOLDER / "target")
    rank = options.rank or (96 if options.output_layer == "low_rank" else None)
    work.mkdir(parents=True, exist_ok=True)
    write_texts(work, preset, options.seed)
    train_medusa.main([
        "--model", model, "--data", str(work / "training.jsonl"), "--output", str(work), "--self-distil", "--temperature", *preset["temperatures"],
        "--dtype", "float32", "--heads", str(preset["heads"]), "--output-layer", options.output_layer, *(["--rank", str(rank)] if rank else []),
        "--layers", str(options.layers), "--lr", str(options.lr), "--length", str(preset["length"]), "--epochs", str(preset["epochs"]),
        "--batch", str(preset["batch"]), "--rows-at-once", str(preset["batch"]), "--max-new-tokens", str(preset["max_new_tokens"]),
        "--answer-batch", str(preset["answer_batch"]), "--precision", preset["precision"], "--seed", str(options.seed),
    ])  # fmt: skip
    calibrate_medusa.main([
        "--model", model, "--heads", str(work), "--data", str(work / "held_out.jsonl"), "--self-distil", "--nodes", str(NODES), "--any-machine",
        "--rows", "1000", "--max-new-tokens", str(preset["max_new_tokens"]), "--dtype", "float32", "--length", str(preset["length"]),
    ])  # fmt: skip
    heads = medusa.MedusaHeads.from_pretrained(work).to(torch.bfloat16)
    heads.config = replace(heads.config, base_model="specdec/tiny_pair/target")
    accuracies = json.loads((work / "accuracies.json").read_text())["accuracies"]
    heads.save_pretrained(options.output, model_card(heads, accuracies, {"made by": "python -m scripts.train_tiny_heads", "seed": options.seed, **preset}))
    shutil.copy(work / TREE, options.output)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pair = specdec.load_tiny_pair(device=device)
    heads = medusa.MedusaHeads.from_pretrained(options.output, torch.float32).to(device)  # as it ships: from bf16
    trees = {"calibrated": medusa.load_tree(options.output)}
    trees |= {"x".join(map(str, widths)): TokenTree.from_widths(widths) for widths in REGULAR if len(widths) <= preset["heads"]}
    found = measure(heads, specdec.ModelRunner(pair.target), pair, trees, preset)
    best = max(row["all"] for name, row in found.items() if name != "calibrated")
    summary = {"calibrated_tokens_per_round": found["calibrated"]["all"], "calibrated_over_the_best_regular_tree": found["calibrated"]["all"] / best}
    log = json.loads((work / "log.json").read_text())
    write_json({"tokens_per_round": found, **summary, "nodes": NODES, "settings": preset, "seed": options.seed, "log": log[-1], "environment": environment(),
                "git_sha": git_sha()},
               options.output / "record.json")  # fmt: skip
    print(json.dumps(found, indent=1))
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
