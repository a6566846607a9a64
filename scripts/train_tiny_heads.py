"""Train the Medusa heads that ship with the library: self-distilled on the shipped target, calibrated, measured on
held-out prompts.

    python -m scripts.train_tiny_heads --output runs/tiny_heads             # some minutes on one GPU
    python -m scripts.train_tiny_heads --output runs/tiny_heads --preset cpu  # hours on two cores
    python -m scripts.train_tiny_heads --output runs/smoke --preset smoke   # checks the path on a CPU, not the heads

The target continues pieces of the Python standard library, greedily and at other temperatures; heads learn from its
words (`scripts.train_medusa`), at the end from its greedy words after whole prompts, which are harder to guess; ranks
on such words from held-out files choose the tree (`scripts.calibrate_medusa`). Then the shipped prompts, which neither
has seen, are decoded greedily with that tree and with every regular tree of its size; and, since they are few, the
prompts of the calibration too, each half of them with a tree from the other half. record.json says what came out."""

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
from scripts import calibrate_medusa, train_medusa
from scripts.common.result_files import git_sha
from scripts.common.tiny_corpus import build_prompts, edit_documents, functions_of, load_corpus
from specdec.info import environment
from specdec.report.stats import RoundStats, pool
from specdec.training.checkpoint import write_json
from specdec.training.data import build_rows
from specdec.training.self_distillation import padded, read_answers
from specdec.trees.tree import TokenTree

PRESETS = {
    "full": dict(
        every=1,
        texts=24576,
        heads=5,
        length=1024,
        epochs=12,
        batch=16,
        max_new_tokens=192,
        answer_batch=1024,
        temperatures=("0", "0", "0.7"),
        whole=2400,
        whole_epochs=3,
        whole_batch=4,
        held_out=96,
        tokens=128,
        prompts=8,
        precision="bf16",
    ),
    "cpu": dict(
        every=1,
        texts=12288,
        heads=5,
        length=512,
        epochs=5,
        batch=8,
        max_new_tokens=128,
        answer_batch=64,
        temperatures=("0", "0.5", "1"),
        whole=1200,
        whole_epochs=2,
        whole_batch=4,
        held_out=32,
        tokens=128,
        prompts=8,
        precision="bf16",
    ),
    "smoke": dict(
        every=40,
        texts=6,
        heads=2,
        length=128,
        epochs=1,
        batch=2,
        max_new_tokens=8,
        answer_batch=4,
        temperatures=("0", "0.7"),
        whole=4,
        whole_epochs=1,
        whole_batch=2,
        held_out=1,
        tokens=8,
        prompts=1,
        precision="no",
    ),
}
NODES, CALIBRATED = 26, "calibrated"
REGULAR = ((25,), (5, 4), (5, 2, 1), (5, 1, 1, 1, 1))  # all of 26 nodes


def write_texts(folder: Path, preset: dict, seed: int) -> None:
    """training.jsonl, whole.jsonl and held_out.jsonl, unless they are there.

    Of the first 64 tokens are a prompt: beginnings of functions, files and edits. The other two hold prompts as those
    that ship with the library."""
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
    whole, held = (
        [
            entry["text"]
            for prompts in build_prompts(files, count, seed + 1, or_fewer=True).values()
            for entry in prompts
        ]
        for files, count in ((train, preset["whole"] // 4), (held_files, preset["held_out"]))
    )
    for name, chosen in (
        ("training", texts),
        ("whole", whole),
        ("held_out", [text for text in held if text not in shipped]),
    ):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text[:600]}) + "\n" for text in chosen))


def decoded(
    target, heads: medusa.MedusaHeads, tree: TokenTree, prompts: Sequence[list[int]], tokens: int
) -> RoundStats:
    """All prompts continued greedily, 32 at a time."""
    generator, stats = medusa.MedusaGenerator(target, heads, tree), []
    for start in range(0, len(prompts), 32):
        ids, mask = padded(prompts[start : start + 32], target.device)
        stats.append(generator.generate(ids, mask, max_new_tokens=tokens).stats.pooled)
    return pool(stats)


def measure(
    target, heads: medusa.MedusaHeads, prompts: dict[str, list[list[int]]], trees: dict[str, TokenTree], tokens: int
) -> dict[str, dict]:
    """Tokens per round on `{kind: prompts}`, {tree: {kind: value}}, and over all of them."""
    stats = {
        name: {kind: decoded(target, heads, tree, some, tokens) for kind, some in prompts.items()}
        for name, tree in trees.items()
    }
    return {
        name: {kind: one.tokens_per_round for kind, one in of.items()}
        | {"all": pool(list(of.values())).tokens_per_round}
        for name, of in stats.items()
    }


def summary(found: dict[str, dict[str, float]]) -> dict[str, float]:
    """The calibrated tree's tokens per round, and how many times those of the best regular tree."""
    best = max(row["all"] for name, row in found.items() if name != CALIBRATED)
    return {
        "calibrated_tokens_per_round": found[CALIBRATED]["all"],
        "calibrated_over_the_best_regular_tree": found[CALIBRATED]["all"] / best,
    }


def crossed(
    target, heads: medusa.MedusaHeads, tokenizer, answers: Sequence[dict], regular: dict[str, TokenTree], preset: dict
) -> dict[str, dict]:
    """`measure` on the prompts that the calibration used, each half of them with the tree that the answers to the other
    half give.
    """
    stats: dict[str, list[RoundStats]] = {}
    for half in range(2):
        ranks = medusa.head_ranks(
            heads, target.model, build_rows(answers[1 - half :: 2], tokenizer, preset["length"], packing=False)
        )
        prompts = [row["tokens"][: row["learned_from"]] for row in answers[half::2]]
        for name, tree in {CALIBRATED: medusa.calibrated_tree(ranks, NODES), **regular}.items():
            stats.setdefault(name, []).append(decoded(target, heads, tree, prompts, preset["tokens"]))
    return {name: {"all": pool(halves).tokens_per_round} for name, halves in stats.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--preset", choices=PRESETS, default="full")
    parser.add_argument("--output-layer", default="low_rank")
    parser.add_argument("--rank", type=int)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    preset, work, model = PRESETS[options.preset], options.output / "work", str(specdec.tiny_pair.FOLDER / "target")
    whole = work / "whole"  # of the second stage
    rank = options.rank or (96 if options.output_layer == "low_rank" else None)
    work.mkdir(parents=True, exist_ok=True)
    write_texts(work, preset, options.seed)
    common = [
        "--model",
        model,
        "--self-distil",
        "--dtype",
        "float32",
        "--length",
        str(preset["length"]),
        "--precision",
        preset["precision"],
        "--seed",
        str(options.seed),
    ]
    train_medusa.main(
        [
            *common,
            "--data",
            str(work / "training.jsonl"),
            "--output",
            str(work),
            "--temperature",
            *preset["temperatures"],
            "--heads",
            str(preset["heads"]),
            "--output-layer",
            options.output_layer,
            *(["--rank", str(rank)] if rank else []),
            "--layers",
            str(options.layers),
            "--lr",
            str(options.lr),
            "--epochs",
            str(preset["epochs"]),
            "--batch",
            str(preset["batch"]),
            "--rows-at-once",
            str(preset["batch"]),
            "--max-new-tokens",
            str(preset["max_new_tokens"]),
            "--answer-batch",
            str(preset["answer_batch"]),
        ]
    )
    train_medusa.main(
        [
            *common,
            "--start",
            str(work),
            "--data",
            str(work / "whole.jsonl"),
            "--output",
            str(whole),
            "--temperature",
            "0",
            "--prompt-tokens",
            str(preset["length"] // 2),
            "--max-new-tokens",
            str(preset["tokens"]),
            "--answer-batch",
            "128",
            "--lr",
            str(options.lr / 4),
            "--epochs",
            str(preset["whole_epochs"]),
            "--batch",
            str(preset["whole_batch"]),
            "--rows-at-once",
            str(preset["whole_batch"]),
        ]
    )
    calibrate_medusa.main(
        [
            "--model",
            model,
            "--heads",
            str(whole),
            "--data",
            str(work / "held_out.jsonl"),
            "--self-distil",
            "--nodes",
            str(NODES),
            "--any-machine",
            "--rows",
            "1000",
            "--prompt-tokens",
            str(preset["length"] // 2),
            "--max-new-tokens",
            str(preset["tokens"]),
            "--dtype",
            "float32",
            "--length",
            str(preset["length"]),
        ]
    )
    heads = medusa.MedusaHeads.from_pretrained(whole).to(torch.bfloat16)
    heads.config = replace(heads.config, base_model="specdec/tiny_pair/target")
    accuracies = json.loads((whole / "accuracies.json").read_text())["accuracies"]
    heads.save_pretrained(
        options.output,
        model_card(
            heads, accuracies, {"made by": "python -m scripts.train_tiny_heads", "seed": options.seed, **preset}
        ),
    )
    shutil.copy(whole / TREE, options.output)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pair = specdec.load_tiny_pair(device=device)
    heads = medusa.MedusaHeads.from_pretrained(options.output, torch.float32).to(device)  # as it ships: from bf16
    regular = {
        "x".join(map(str, widths)): TokenTree.from_widths(widths)
        for widths in REGULAR
        if len(widths) <= preset["heads"]
    }
    target, prompts = (
        specdec.ModelRunner(pair.target),
        {kind: pair.tokenizer(texts[: preset["prompts"]]).input_ids for kind, texts in pair.prompts.items()},
    )
    found = measure(target, heads, prompts, {CALIBRATED: medusa.load_tree(options.output), **regular}, preset["tokens"])
    held_out = crossed(target, heads, pair.tokenizer, read_answers(whole / "answers_calibration"), regular, preset)
    log = [json.loads((folder / "log.json").read_text())[-1] for folder in (work, whole)]
    write_json(
        {
            "tokens_per_round": found,
            **summary(found),
            "held_out": {"tokens_per_round": held_out, **summary(held_out)},
            "nodes": NODES,
            "settings": preset,
            "seed": options.seed,
            "log": log,
            "environment": environment(),
            "git_sha": git_sha(),
        },
        options.output / "record.json",
    )
    print(json.dumps(found, indent=1))
    print(json.dumps({"shipped prompts": summary(found), "held-out texts, crossed": summary(held_out)}))


if __name__ == "__main__":
    main()
