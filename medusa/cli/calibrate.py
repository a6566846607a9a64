"""`python -m scripts.calibrate_medusa`: the accuracies of heads on text, and the tree that follows for this machine."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from medusa.calibration import calibrated_tree, head_ranks, reached, save_tree
from medusa.heads import MedusaHeads
from medusa.plots import plot_accuracies
from specdec.info import environment
from specdec.loading import load_model
from specdec.planning.costs import SIZES, measure_costs
from specdec.report.headless import headless_pyplot
from specdec.training.data import build_rows
from specdec.training.files import read_rows
from specdec.training.self_distillation import read_answers, self_distil
from specdec.trees.tree import TokenTree


def parser(description: str | None = None) -> argparse.ArgumentParser:
    """The options and their defaults."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = options.add_argument
    model = "folder or hub id; for Medusa-2 the folder `model` that its training wrote"
    add("--model", required=True, help=model)
    add("--tokenizer", help="folder or hub id (default: the model's)")
    add("--heads", required=True, help="folder or hub id")
    add("--data", type=Path, required=True)
    add("--output", type=Path, help="default: the folder of the heads")
    add("--nodes", type=int, default=64, help="of the tree, its root included, at most")
    add("--any-machine", action="store_true")
    add("--rows", type=int, default=64, help="rows of the data to measure on, at most")
    add("--length", type=int, default=2048)
    add("--self-distil", action="store_true")
    add("--max-new-tokens", type=int, default=256)
    add("--prompt-tokens", type=int, default=64)
    add("--temperature", type=float, nargs="+", default=[0.0])
    add("--dtype", default="auto")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return options


def run(options: argparse.Namespace) -> None:
    """Measure the heads, write tree.json and the pictures, and print what was found."""
    output = Path(options.output or options.heads)
    if options.output is None and not output.is_dir():
        raise ValueError(f"--output is needed, since {options.heads} is no folder here")
    if options.nodes < 2:
        raise ValueError(f"--nodes must be at least 2, got {options.nodes}")
    output.mkdir(parents=True, exist_ok=True)

    dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    model = load_model(options.model, dtype, options.device)
    heads = MedusaHeads.from_pretrained(options.heads, model.dtype).to(options.device)
    found = head_ranks(heads, model, _texts(options, model, output))
    sizes = [*(size for size in SIZES if size < options.nodes), options.nodes]
    costs = None if options.any_machine else measure_costs(model, sizes=sizes)
    tree = calibrated_tree(found, options.nodes, costs)
    accuracies, shares = found.accuracies(), reached(tree, found)
    expected = sum(shares)
    save_tree(
        output, tree, accuracies, costs, reached=shares, expected_tokens_per_round=expected, environment=environment()
    )
    pictures = draw(output, accuracies, tree, shares)
    for head, ranks in enumerate(accuracies):
        print(f"head {head}: " + " ".join(f"{share:.3f}" for share in ranks))
    for size, cost in zip(costs.sizes, costs.verify, strict=True) if costs else ():
        print(f"{size} tokens cost {cost:.2f} steps")
    drawn = f"pictures: {', '.join(map(str, pictures))}"
    print(drawn if pictures else "matplotlib is not installed, so nothing was drawn")
    result = {"nodes": tree.size, "depth": tree.max_depth, "expected_tokens_per_round": round(expected, 3)}
    print(json.dumps(result | {"tree": str(output / "tree.json")}))


def _texts(options: argparse.Namespace, model, output: Path):
    """The rows to measure on; with --self-distil the model writes their answers first."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer or options.model)
    rows = read_rows(options.data)[: options.rows]
    if options.self_distil:
        answers = output / "answers_calibration"
        self_distil(
            model, tokenizer, rows, answers, options.max_new_tokens, options.temperature,
            prompt_tokens=options.prompt_tokens, max_length=options.length,
        )  # fmt: skip
        rows = read_answers(answers)
    return build_rows(rows, tokenizer, options.length, packing=False)


def draw(folder: Path, accuracies: Sequence[Sequence[float]], tree: TokenTree, expected: Sequence[float]) -> list[Path]:
    """The heat map and the tree beside its mask, as PNG files; none without matplotlib."""
    pyplot = headless_pyplot()
    if pyplot is None:
        return []
    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.5 * len(accuracies)), layout="constrained")
    plot_accuracies(axes, accuracies)
    figures = {"accuracies.png": figure, "tree.png": tree.plot(expected=expected)}
    for name, drawn in figures.items():
        drawn.savefig(folder / name, dpi=120)
        pyplot.close(drawn)
    return [folder / name for name in figures]
