"""Train the Medusa heads that ship with the library: self-distilled, calibrated, measured on held-out prompts.

    python -m scripts.train_tiny_heads --output runs/tiny_heads             # some minutes on one GPU
    python -m scripts.train_tiny_heads --output runs/tiny_heads --preset cpu  # hours on two cores
    python -m scripts.train_tiny_heads --output runs/smoke --preset smoke   # checks the path on a CPU, not the heads

The target continues pieces of the Python standard library, greedily and at other temperatures; heads learn from its
text (`scripts.train_medusa`), at the end from its greedy text after whole prompts, which is harder to guess; ranks on
such text from held-out files choose the tree (`scripts.calibrate_medusa`). Then the shipped prompts, which were in
neither, are decoded greedily with that tree and with every regular tree of its size; and, since they are few, the
prompts of the calibration too, each half of them with a tree from the other half. The figures go to record.json.
"""

import argparse
import json
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
from scripts.common.entry import run_script
from scripts.common.tiny_texts import as_arguments, write_texts
from specdec.info import commit, environment
from specdec.report.stats import RoundStats, pool
from specdec.training.acceptance import decode_prompts
from specdec.training.checkpoint import write_json
from specdec.training.data import build_rows
from specdec.training.self_distillation import read_answers
from specdec.trees.tree import TokenTree

# fmt: off
PRESETS = {
    "full": dict(
        every=1, texts=24576, heads=5, length=1024, epochs=12, batch=16, max_new_tokens=192, answer_batch=1024,
        temperatures=("0", "0", "0.7"), whole=2400, whole_epochs=3, whole_batch=4, held_out=96, tokens=128, prompts=8,
        precision="bf16",
    ),
    "cpu": dict(
        every=1, texts=12288, heads=5, length=512, epochs=5, batch=8, max_new_tokens=128, answer_batch=64,
        temperatures=("0", "0.5", "1"), whole=1200, whole_epochs=2, whole_batch=4, held_out=32, tokens=128, prompts=8,
        precision="bf16",
    ),
    "smoke": dict(
        every=40, texts=6, heads=2, length=128, epochs=1, batch=2, max_new_tokens=8, answer_batch=4,
        temperatures=("0", "0.7"), whole=4, whole_epochs=1, whole_batch=2, held_out=1, tokens=8, prompts=1,
        precision="no",
    ),
}
# fmt: on
NODES, CALIBRATED = 26, "calibrated"
REGULAR = ((25,), (5, 4), (5, 2, 1), (5, 1, 1, 1, 1))  # all of 26 nodes


def decoded(
    target, heads: medusa.MedusaHeads, tree: TokenTree, prompts: Sequence[list[int]], tokens: int
) -> RoundStats:
    """All prompts continued greedily, 32 at a time."""
    return decode_prompts(target, medusa.MedusaDrafter(heads, tree), prompts, tokens)


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
    """`measure` on the prompts of the calibration, each half with the tree that the other half's answers give."""
    stats: dict[str, list[RoundStats]] = {}
    for half in range(2):
        rows = build_rows(answers[1 - half :: 2], tokenizer, preset["length"], packing=False)
        ranks = medusa.head_ranks(heads, target.model, rows)
        prompts = [row["tokens"][: row["learned_from"]] for row in answers[half::2]]
        for name, tree in {CALIBRATED: medusa.calibrated_tree(ranks, NODES), **regular}.items():
            stats.setdefault(name, []).append(decoded(target, heads, tree, prompts, preset["tokens"]))
    return {name: {"all": pool(halves).tokens_per_round} for name, halves in stats.items()}


def train(options: argparse.Namespace, preset: dict, work: Path, model: str) -> Path:
    """Train on pieces of texts, then on whole prompts; choose the tree. Returns the folder of the finished heads."""
    whole, rank = work / "whole", options.rank or (96 if options.output_layer == "low_rank" else None)
    common = dict(model=model, self_distil=True, dtype="float32", length=preset["length"])
    training = common | dict(precision=preset["precision"], seed=options.seed)
    pieces = dict(
        data=work / "training.jsonl", output=work, temperature=preset["temperatures"], heads=preset["heads"],
        output_layer=options.output_layer, rank=rank, layers=options.layers, lr=options.lr, epochs=preset["epochs"],
        batch=preset["batch"], rows_at_once=preset["batch"], max_new_tokens=preset["max_new_tokens"],
        answer_batch=preset["answer_batch"],
    )  # fmt: skip
    train_medusa.main(as_arguments(**training, **pieces))
    prompts = dict(prompt_tokens=preset["length"] // 2, max_new_tokens=preset["tokens"])
    after_whole = dict(
        start=work, data=work / "whole.jsonl", output=whole, temperature=0, answer_batch=128, lr=options.lr / 4,
        epochs=preset["whole_epochs"], batch=preset["whole_batch"], rows_at_once=preset["whole_batch"],
    )  # fmt: skip
    train_medusa.main(as_arguments(**training, **prompts, **after_whole))
    tree = dict(heads=whole, data=work / "held_out.jsonl", nodes=NODES, any_machine=True, rows=1000)
    calibrate_medusa.main(as_arguments(**common, **prompts, **tree))
    return whole


def export(whole: Path, output: Path, preset: dict, seed: int) -> None:
    """The finished heads in bf16 with their card, and their tree."""
    heads = medusa.MedusaHeads.from_pretrained(whole).to(torch.bfloat16)
    heads.config = replace(heads.config, base_model="specdec/tiny_pair/target")
    accuracies = json.loads((whole / "accuracies.json").read_text())["accuracies"]
    made = {"made by": "python -m scripts.train_tiny_heads", "seed": seed, **preset}
    heads.save_pretrained(output, model_card(heads, accuracies, made))
    shutil.copy(whole / TREE, output)


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--preset", choices=PRESETS, default="full")
    parser.add_argument("--output-layer", default="low_rank")
    parser.add_argument("--rank", type=int)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, export, measure; see the module's docstring."""
    options = options_of(arguments)
    preset, work = PRESETS[options.preset], options.output / "work"
    work.mkdir(parents=True, exist_ok=True)
    write_texts(work, preset, options.seed)
    whole = train(options, preset, work, str(specdec.tiny_pair.FOLDER / "target"))
    export(whole, options.output, preset, options.seed)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pair = specdec.load_tiny_pair(device=device)
    heads = medusa.MedusaHeads.from_pretrained(options.output, torch.float32).to(device)  # as it ships: from bf16
    chosen = [widths for widths in REGULAR if len(widths) <= preset["heads"]]
    regular = {"x".join(map(str, widths)): TokenTree.from_widths(widths) for widths in chosen}
    target, trees = specdec.ModelRunner(pair.target), {CALIBRATED: medusa.load_tree(options.output), **regular}
    prompts = {kind: pair.tokenizer(texts[: preset["prompts"]]).input_ids for kind, texts in pair.prompts.items()}
    found = measure(target, heads, prompts, trees, preset["tokens"])
    held_out = crossed(target, heads, pair.tokenizer, read_answers(whole / "answers_calibration"), regular, preset)
    log = [json.loads((folder / "log.json").read_text())[-1] for folder in (work, whole)]
    record = {
        "tokens_per_round": found, **summary(found),
        "held_out": {"tokens_per_round": held_out, **summary(held_out)},
        "nodes": NODES, "settings": preset, "seed": options.seed, "log": log,
        "environment": environment(), "git_sha": commit(),
    }  # fmt: skip
    write_json(record, options.output / "record.json")
    print(json.dumps(found, indent=1))
    print(json.dumps({"shipped prompts": summary(found), "held-out texts, crossed": summary(held_out)}))


if __name__ == "__main__":
    run_script(main)
