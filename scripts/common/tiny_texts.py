"""Texts that the shipped target continues, for drafters that learn from it; and command lines of the training."""

import json
import random
from pathlib import Path

import specdec
from scripts.common.tiny_corpus import build_prompts, edit_documents, functions_of, load_corpus


def write_texts(folder: Path, preset: dict, seed: int) -> None:
    """Write training.jsonl, whole.jsonl and held_out.jsonl, unless they are there.

    The first holds beginnings of functions, files and edits, of which 64 tokens are the prompt; the other two hold
    prompts like those that ship with the library."""
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
    prompts_from = lambda files, count: build_prompts(files, count, seed + 1, or_fewer=True).values()
    whole, held = (
        [entry["text"] for prompts in prompts_from(files, count) for entry in prompts]
        for files, count in ((train, preset["whole"] // 4), (held_files, preset["held_out"]))
    )
    held = [text for text in held if text not in shipped]
    for name, chosen in (("training", texts), ("whole", whole), ("held_out", held)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text[:600]}) + "\n" for text in chosen))


def as_arguments(**options) -> list[str]:
    """A command line: `max_new_tokens=8` -> ["--max-new-tokens", "8"]; True is a flag, None and False leave it out."""
    arguments: list[str] = []
    for name, value in options.items():
        if value is None or value is False:
            continue
        values = [] if value is True else value if isinstance(value, tuple) else [value]
        arguments += [f"--{name.replace('_', '-')}", *map(str, values)]
    return arguments
