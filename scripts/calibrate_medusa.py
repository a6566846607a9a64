"""Measure how often Medusa heads are right, and write the tree that makes the most of them on this machine.

    python -m scripts.calibrate_medusa --model DIR_OR_HUB_ID --heads DIR --data FILE.jsonl [--nodes 64]

--data is text that the heads were not trained on, best in the model's own words: with --self-distil the model writes
the answers first. The tree of at most --nodes nodes with the most expected tokens a second, given the accuracies found
and the time that verifying 1 … --nodes tokens takes here, goes to tree.json in the folder of the heads (or --output),
with a heat map of the accuracies and a picture of the tree. --any-machine leaves times out and takes the tree of
exactly --nodes nodes with the most expected tokens a round.
"""

from collections.abc import Sequence

from medusa.cli.calibrate import parser, run


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    run(parser(__doc__).parse_args(arguments))


if __name__ == "__main__":
    main()
