"""Prompts of a command: from its arguments, from files, and through chat templates."""

import argparse
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from specdec.training.templates import apply_template

SUFFIXES = (".json", ".jsonl")


def read_text(path: str) -> str:
    """The text of a file, or of standard input for "-"."""
    if path == "-":
        import sys

        return sys.stdin.read()
    return Path(path).read_text(encoding="utf-8")


def read_prompts(path: str) -> list[dict]:
    """The prompts of a file as `{"prompt": text or messages, "kind": str}`.

    A .jsonl or .json file holds strings or objects with "prompt" (a text), "messages" (a chat without its last answer)
    or MT-Bench's "turns" (the first is taken), and perhaps "kind" or "category"; any other file a prompt a line. Raises
    ValueError, naming the line, for what is none."""
    text = read_text(path)
    if not path.endswith(SUFFIXES):
        rows: list[Any] = [line for line in text.split("\n") if line.strip()]
    else:
        try:
            rows = json.loads(text)
            rows = rows if isinstance(rows, list) else [rows]
        except ValueError:
            lines = enumerate(text.split("\n"), 1)
            rows = [_parsed(line, f"{path}:{number}") for number, line in lines if line.strip()]
    if not rows:
        raise ValueError(f"{path} holds no prompt")
    return [_checked(row, f"{path}, prompt {number}") for number, row in enumerate(rows, 1)]


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is no JSON: {error}") from error


def _keys(row: dict) -> str:
    return f"an object with {', '.join(list(row)[:5])}" if row else "neither"


def _checked(row: Any, where: str) -> dict:
    if isinstance(row, str):
        return {"prompt": row, "kind": "own"}
    row = row if isinstance(row, dict) else {}
    prompt: Any = row.get("prompt", row.get("messages"))
    if prompt is None and isinstance(row.get("turns"), list) and row["turns"]:
        prompt = [{"role": "user", "content": row["turns"][0]}]
    if isinstance(prompt, list) and prompt and prompt[-1].get("role") == "assistant":
        prompt = prompt[:-1]
    if not prompt or not isinstance(prompt, str | list):
        raise ValueError(f"{where} must be a text, or an object with prompt, messages or turns, got {_keys(row)}")
    return {"prompt": prompt, "kind": str(row.get("kind", row.get("category", "own")))}


def load_tokenizer(options: argparse.Namespace):
    """The tokenizer of --tokenizer, or of the target. Raises ValueError for a folder without one."""
    from transformers import AutoTokenizer

    name = options.tokenizer or options.target
    try:
        return AutoTokenizer.from_pretrained(name)
    except (ValueError, OSError) as error:
        raise ValueError(f"{name} has no tokenizer that can be read; --tokenizer names another folder") from error


def encode(prompt: str | list, tokenizer, device, chat: bool, system: str | None = None,
           **template: Any) -> tuple[str, Tensor]:  # fmt: skip
    """A prompt as text, see `render`, and as ids `[1, S]`; a chat template writes its special tokens itself."""
    text = render(prompt, tokenizer, chat, system, **template)
    special = isinstance(prompt, str) and not chat
    return text, tokenizer(text, return_tensors="pt", add_special_tokens=special).input_ids.to(device)


def render(prompt: str | list, tokenizer, chat: bool, system: str | None = None, **template: Any) -> str:
    """A prompt as text: messages, or with `chat` a user's text too, through the tokenizer's chat template.

    Raises ValueError where there is no template or it does not take them."""
    if isinstance(prompt, str) and not chat:
        return prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    if tokenizer.chat_template is None:
        raise ValueError("the tokenizer has no chat template: give --chat-template FILE, or a prompt that is a text")
    return apply_template(messages, tokenizer, "the prompt", tokenize=False, add_generation_prompt=True, **template)
