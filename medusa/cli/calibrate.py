"""`specdec calibrate --kind medusa`: the accuracies of heads on text, and the tree that follows for this machine."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from transformers.utils import logging

from medusa.calibration import calibrated_tree, head_ranks, reached, save_tree
from medusa.heads import MedusaHeads
from medusa.plots import plot_accuracies
from specdec.cli.command import Command, add_device_options, dtype_and_device, new_parser
from specdec.info import environment
from specdec.loading import load_model
from specdec.planning.costs import SIZES, Costs, measure_costs
from specdec.report.headless import NOT_DRAWN, headless_pyplot
from specdec.training.data import build_rows
from specdec.training.files import read_rows
from specdec.training.self_distillation import read_answers, self_distil
from specdec.trees.tree import TokenTree

ABOUT = """Measure how often Medusa heads are right, and write the tree that makes the most of them on this machine.

    specdec calibrate --kind medusa --model DIR_OR_HUB_ID --heads DIR --data FILE.jsonl [--nodes 64]

--data is text that the heads were not trained on, best in the model's own words: with --self-distil the model writes
the answers first. The tree of at most --nodes nodes with the most expected tokens a second, given the accuracies found
and the time that verifying 1 … --nodes tokens takes here, goes to tree.json in the folder of the heads (or --output),
with a heat map of the accuracies and a picture of the tree. --any-machine leaves times out and takes the tree of
exactly --nodes nodes with the most expected tokens a round.
"""


def parser(prog: str = "specdec calibrate --kind medusa") -> argparse.ArgumentParser:
    """The options and their defaults."""
    options = new_parser(prog, ABOUT)
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
    add_device_options(add)
    return options


def run(options: argparse.Namespace) -> None:
    """Measure the heads, write tree.json and the pictures, and print what was found."""
    output, (dtype, device) = Path(options.output or options.heads), dtype_and_device(options)
    if options.output is None and not output.is_dir():
        raise ValueError(f"--output is needed, since {options.heads} is no folder here")
    if not options.data.is_file():
        raise ValueError(f"--data must be a file, and there is none at {options.data}")
    for name, least in (("nodes", 2), ("rows", 1), ("length", 2)):
        if getattr(options, name) < least:
            raise ValueError(f"--{name} must be at least {least}, got {getattr(options, name)}")
    logging.disable_progress_bar()
    model = load_model(options.model, dtype, device)
    heads = MedusaHeads.from_pretrained(options.heads, model.dtype).to(device)
    output.mkdir(parents=True, exist_ok=True)
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
    for line in tables(accuracies, costs):
        print(line)
    drawn = f"pictures: {', '.join(map(str, pictures))}"
    print(drawn if pictures else NOT_DRAWN)
    print("\nThe tree, and how many tokens a round is expected to give with it, the model's own token included:")
    result = {"nodes": tree.size, "depth": tree.max_depth, "expected_tokens_per_round": round(expected, 3)}
    print(json.dumps(result | {"tree": str(output / "tree.json")}))


def tables(accuracies: Sequence[Sequence[float]], costs: Costs | None) -> list[str]:
    """The lines that show accuracies by head and choice, and what rounds cost, each table under a line that says what
    its columns are.

    >>> for line in tables([[0.5, 0.25], [0.375, 0.125]], None):
    ...     print(line)
    Share of positions where the head's 1st, 2nd, … choice is the token that follows (head 0: two places on):
    head  guesses    1st    2nd
       0       +2  0.500  0.250
       1       +3  0.375  0.125
    """
    names = [ordinal(choice) for choice in range(1, 1 + max(map(len, accuracies)))]
    lines = [
        "Share of positions where the head's 1st, 2nd, … choice is the token that follows (head 0: two places on):",
        "head  guesses" + "".join(f"{name:>7}" for name in names),
        *(
            f"{head:>4}{f'+{head + 2}':>9}" + "".join(f"{share:>7.3f}" for share in ranks)
            for head, ranks in enumerate(accuracies)
        ),
    ]
    if costs is None:
        return lines
    step = 1000 * costs.step_seconds
    return [
        *lines,
        "",
        f"Time to verify so many tokens in one forward, in plain steps of {step:.2f} ms each:",
        "tokens  steps",
        *(f"{size:>6}{cost:>7.2f}" for size, cost in zip(costs.sizes, costs.verify, strict=True)),
    ]


def ordinal(number: int) -> str:
    """
    >>> [ordinal(number) for number in (1, 2, 3, 4, 11, 21)]
    ['1st', '2nd', '3rd', '4th', '11th', '21st']
    """
    ending = {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{'th' if number % 100 in (11, 12, 13) else ending}"


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


COMMAND = Command(parser, run)
