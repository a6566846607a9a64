"""Train Medusa heads for a model of your own.

    python -m scripts.train_medusa --model DIR_OR_HUB_ID --data FILE.jsonl --output DIR
    python -m scripts.train_medusa --model … --data … --output … --self-distil --temperature 0 0.7
    accelerate launch --num_processes 2 -m scripts.train_medusa --model … --data … --output … --batch 64
    torchrun --standalone --nproc_per_node 2 -m scripts.train_medusa --model … --data … --output …  # on CPUs

Rows of the data are {"messages": […]}, {"text": …} or ShareGPT's {"conversations": […]}; chats are learned where the
assistant speaks, with their tools and switches of the template. Rows that cannot be learned from are left out and
counted by reason; --strict stops at the first. With --self-distil the model first writes the answers itself, which is
what heads learn best from. --joint-steps makes it Medusa-2: after the heads alone the model learns too, through LoRA,
and is written to DIR/model. A killed run goes on from its last checkpoint with the same command. DIR gets the heads, a
model card, accuracies.json, log.json, training.png where matplotlib is installed and, where TensorBoard is, its logs.
With --push-to-hub REPO the heads go to the hub when all that is done, and Medusa-2's model with its tokenizer to
REPO-model; the same command repeats a failed upload.
"""

from collections.abc import Sequence

from medusa.cli.train import parser, run


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    run(parser(__doc__).parse_args(arguments))


if __name__ == "__main__":
    main()
