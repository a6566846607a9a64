"""Measure what Medusa heads are worth, and write the tree that makes the most of them on this machine.

    python -m scripts.calibrate_medusa --model DIR_OR_HUB_ID --heads DIR --data FILE.jsonl [--nodes 64]

--data is text that the heads were not trained on, best in the model's own words: with --self-distil the model writes
 the answers first. The
tree of at most --nodes nodes that expects the most tokens a second, given the accuracies found and the time that
verifying 1 … --nodes tokens
takes here, goes to tree.json in the folder of the heads (or --output), with a heat map of the accuracies and a picture
of the tree.
--any-machine leaves times out and takes the tree of exactly --nodes nodes that expects the most tokens a round.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer

import medusa
from medusa.calibration import reached, save_tree
from specdec.info import environment
from specdec.loading import load_model
from specdec.planning.costs import SIZES, measure_costs
from specdec.training.data import build_rows, read_rows
from specdec.training.self_distillation import read_answers, self_distil


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", required=True, help="folder or hub id; for Medusa-2 the folder `model` that its training wrote"
    )
    parser.add_argument("--tokenizer", help="folder or hub id (default: the model's)")
    parser.add_argument("--heads", required=True, help="folder or hub id")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, help="default: the folder of the heads")
    parser.add_argument("--nodes", type=int, default=64, help="of the tree, its root included, at most")
    parser.add_argument("--any-machine", action="store_true")
    parser.add_argument("--rows", type=int, default=64, help="rows of the data to measure on, at most")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--self-distil", action="store_true")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0])
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    output = Path(options.output or options.heads)
    if options.output is None and not output.is_dir():
        raise ValueError(f"--output is needed, since {options.heads} is no folder here")
    if options.nodes < 2:
        raise ValueError(f"--nodes must be at least 2, got {options.nodes}")
    output.mkdir(parents=True, exist_ok=True)

    model = load_model(
        options.model, options.dtype if options.dtype == "auto" else getattr(torch, options.dtype), options.device
    )
    heads = medusa.MedusaHeads.from_pretrained(options.heads, model.dtype).to(options.device)
    tokenizer, rows = (
        AutoTokenizer.from_pretrained(options.tokenizer or options.model),
        read_rows(options.data)[: options.rows],
    )
    if options.self_distil:
        answers = output / "answers_calibration"
        self_distil(
            model,
            tokenizer,
            rows,
            answers,
            options.max_new_tokens,
            options.temperature,
            prompt_tokens=options.prompt_tokens,
            max_length=options.length,
        )
        rows = read_answers(answers)
    found = medusa.head_ranks(heads, model, build_rows(rows, tokenizer, options.length, packing=False))
    costs = (
        None
        if options.any_machine
        else measure_costs(model, sizes=[*(size for size in SIZES if size < options.nodes), options.nodes])
    )
    tree = medusa.calibrated_tree(found, options.nodes, costs)
    accuracies, reach = found.accuracies(), reached(tree, found)
    expected = sum(reach)
    save_tree(
        output, tree, accuracies, costs, reached=reach, expected_tokens_per_round=expected, environment=environment()
    )
    pictures = draw(output, accuracies, tree, reach)
    for head, shares in enumerate(accuracies):
        print(f"head {head}: " + " ".join(f"{share:.3f}" for share in shares))
    for size, cost in zip(costs.sizes, costs.verify, strict=True) if costs else ():
        print(f"{size} tokens cost {cost:.2f} steps")
    print(
        f"pictures: {', '.join(map(str, pictures))}"
        if pictures
        else "matplotlib is not installed, so nothing was drawn"
    )
    print(
        json.dumps(
            {
                "nodes": tree.size,
                "depth": tree.max_depth,
                "expected_tokens_per_round": round(expected, 3),
                "tree": str(output / "tree.json"),
            }
        )
    )


def draw(folder: Path, accuracies, tree, expected: list[float]) -> list[Path]:
    """The heat map and the tree beside its mask, as PNG files; none without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot

    from medusa.plots import plot_accuracies

    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.5 * len(accuracies)), layout="constrained")
    plot_accuracies(axes, accuracies)
    figures = {"accuracies.png": figure, "tree.png": tree.plot(expected=expected)}
    for name, drawn in figures.items():
        drawn.savefig(folder / name, dpi=120)
        pyplot.close(drawn)
    return [folder / name for name in figures]


if __name__ == "__main__":
    main()
