"""Training data: chats, texts or tokens become packed rows of tokens, with labels only on the assistant's turns.

The kinds of rows are those of `specdec.training.files`; errors name the file's row."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from specdec.training.labels import IGNORED

PADDING = -1  # the document number of padding; negative is what `Backbone` takes for it


@dataclass(frozen=True, slots=True)
class Rows:
    """N rows of S tokens, int32 `[N, S]` each.

    tokens       the token ids
    labels       the same, IGNORED where nothing is learned
    documents    the number of each packed text in its row, PADDING after the last
    """

    tokens: Tensor
    labels: Tensor
    documents: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, indices: Sequence[int] | slice) -> "Rows":
        """Those rows, as int64."""
        return Rows(*(x[indices].long() for x in (self.tokens, self.labels, self.documents)))

    def batch(self, step: int, size: int, seed: int = 0) -> "Rows":
        """The `size` rows of training step `step`: a function of (step, size, seed); each epoch is shuffled anew."""
        places = range(step * size, (step + 1) * size)
        orders = {
            epoch: np.random.default_rng([seed, epoch]).permutation(len(self))
            for epoch in {place // len(self) for place in places}
        }
        return self.take([int(orders[place // len(self)][place % len(self)]) for place in places])


def encode(row: dict, tokenizer, max_length: int) -> Iterator[tuple[list[int], list[int]]]:
    """`(tokens, labels)` of one row, at most `max_length` long: a long text comes in pieces, a long chat is cut.

    Raises ValueError naming the row where it has nothing to learn (no assistant's turn, or only after `max_length`) or
    the chat template refuses it."""
    where = row.get("where", "the row")
    if "messages" in row:
        tokens, labels = _encode_chat(row["messages"], tokenizer, where)
    elif "tokens" in row:
        tokens = list(row["tokens"])
        labels = [IGNORED] * row["learned_from"] + tokens[row["learned_from"] :]
    else:
        tokens = tokenizer(row["text"])["input_ids"]
        tokens = tokens if tokenizer.eos_token_id is None else [*tokens, tokenizer.eos_token_id]
        labels = tokens
    pieces = range(0, len(tokens), max_length) if "text" in row else range(1)
    learned = False
    for start in pieces:
        part = labels[start : start + max_length]
        learned |= any(label != IGNORED for label in part[2:])  # the first head's first label is the third token
        yield tokens[start : start + max_length], part
    if not learned:
        raise ValueError(
            f"{where} has nothing to learn: no token of an assistant within its first {max_length} of "
            f"{len(tokens)} tokens"
        )


def _encode_chat(messages: list[dict], tokenizer, where: str) -> tuple[list[int], list[int]]:
    """Labels from the template's own marks ({% generation %}), else from the text that each assistant's turn adds."""
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"{where} has nothing to learn: no assistant speaks in it")
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:
        raise ValueError(
            f"{where} is a chat, but the tokenizer has no chat template: give rows of texts, or set "
            "tokenizer.chat_template"
        ) from error
    if re.search(r"{%-?\s*generation\b", template):
        marks = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        out = apply_template(messages, tokenizer, where, **marks)
        tokens, said = list(out["input_ids"]), out["assistant_masks"]
    else:
        text, spans = _assistant_spans(messages, tokenizer, where)
        if not tokenizer.is_fast:
            name = type(tokenizer).__name__
            raise ValueError(f"{name} cannot tell where its tokens lie in a text; take a fast tokenizer")
        out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        tokens = out["input_ids"]
        # by where a token ends: some tokenizers trim where it begins
        said = [any(start < end <= stop for start, stop in spans) for _, end in out["offset_mapping"]]
    return tokens, [token if learned else IGNORED for token, learned in zip(tokens, said, strict=True)]


def _assistant_spans(messages: list[dict], tokenizer, where: str) -> tuple[str, list[tuple[int, int]]]:
    """The chat as text, and the character spans `[start, stop)` of the assistant's turns, their end marks included."""
    render = lambda part, **options: apply_template(part, tokenizer, where, tokenize=False, **options)
    text, spans = render(messages), []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = render(messages[:number], add_generation_prompt=True), render(messages[: number + 1])
            if not (after.startswith(before) and text.startswith(after)):
                raise ValueError(
                    f"{where}: the chat template changes earlier turns when later ones come, so what message {number} "
                    "adds cannot be told; mark it with {% generation %} in the template"
                )
            spans.append((len(before), len(after)))
    return text, spans


def apply_template(messages: list[dict], tokenizer, where: str, **options):
    """The tokenizer's `apply_chat_template`, whose errors become a ValueError that names the row, `where`."""
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, **options)
    except (TemplateError, TypeError, ValueError) as error:  # such as text + list in it; nothing before the first turn
        raise ValueError(f"{where}: the chat template does not take it: {error}") from error


def build_rows(rows: Sequence[dict], tokenizer, max_length: int, packing: bool = True) -> Rows:
    """All rows as tokens. With `packing` several texts share a row of `max_length`, none split.

    Raises ValueError for a `max_length` below 3, no rows, or a row that `encode` refuses."""
    if max_length < 3:
        raise ValueError(f"max_length must be at least 3, got {max_length}")
    packed: list[list[tuple[list[int], list[int]]]] = []
    room = 0
    for tokens, labels in (piece for row in rows for piece in encode(row, tokenizer, max_length)):
        if not packing or len(tokens) > room:
            packed.append([])
            room = max_length
        packed[-1].append((tokens, labels))
        room -= len(tokens)
    if not packed:
        raise ValueError("there are no rows to learn from")
    length = max(sum(len(tokens) for tokens, _ in row) for row in packed)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    filled = Rows(*(torch.full((len(packed), length), fill, dtype=torch.int32) for fill in (pad, IGNORED, PADDING)))
    for number, row in enumerate(packed):
        start = 0
        for document, (tokens, labels) in enumerate(row):
            place = number, slice(start, start := start + len(tokens))
            filled.tokens[place] = torch.tensor(tokens, dtype=torch.int32)
            filled.labels[place] = torch.tensor(labels, dtype=torch.int32)
            filled.documents[place] = document
    return filled
