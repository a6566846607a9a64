"""The tokenizer of a command."""

import argparse


def load_tokenizer(options: argparse.Namespace):
    """The tokenizer of --tokenizer, or of the target, see `tokenizer_in`."""
    return tokenizer_in(options.tokenizer or options.target)


def tokenizer_in(name: str):
    """The tokenizer of a folder or hub id. Raises ValueError for one without."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (ValueError, OSError) as error:
        raise ValueError(f"{name} has no tokenizer that can be read; --tokenizer names another folder") from error
