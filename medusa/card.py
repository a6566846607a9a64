"""The README.md that travels with a set of heads."""

from collections.abc import Sequence

from medusa.calibration import TOPS, top_accuracies
from medusa.heads import MedusaHeads
from specdec.info import environment


def model_card(
    heads: MedusaHeads, accuracies: Sequence[Sequence[float]], training: dict, picture: str | None = None
) -> str:
    """Markdown with the heads' shape, their measured `accuracies`, and the names and values of `training`.

    `picture` is the name of an image of the training beside the card."""
    config = heads.config
    lines = [
        "---",
        "library_name: specdec-lab",
        "tags: [medusa, speculative-decoding]",
        *([f"base_model: {config.base_model}"] if config.base_model else []),
        "---",
        f"# Medusa heads for {config.base_model or 'a model of your own'}",
        "",
        f"{config.num_heads} heads of {config.num_layers} residual block(s), output `{config.output}`"
        + (f" of rank {config.rank}" if config.rank else "")
        + f", hidden size {config.hidden_size}, vocabulary {config.vocab_size}"
        + (f", base revision {config.base_revision}" if config.base_revision else "")
        + ".",
        "",
        "| head | guesses the token | " + " | ".join(f"top-{top}" for top in TOPS) + " |",
        "|---" * (2 + len(TOPS)) + "|",
        *(
            f"| {head} | {head + 2} places on | " + " | ".join(f"{share:.3f}" for share in shares.values()) + " |"
            for head, shares in enumerate(top_accuracies(accuracies))
        ),
        "",
        "Accuracies are shares of positions of the validation set.",
        "",
        "```python",
        "import medusa, specdec",
        "",
        'heads = medusa.MedusaHeads.from_pretrained("this folder or hub id")',
        f'generator = medusa.MedusaGenerator(specdec.load_model("{config.base_model or "the model"}"), heads, '
        'medusa.load_tree("this folder"))',
        "```",
        "",
        "## Training",
        "",
        *([f"![loss, accuracies and tokens/s over the steps]({picture})", ""] if picture else []),
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in {**training, **environment()}.items()),
        "",
    ]
    return "\n".join(lines)
