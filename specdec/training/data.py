"""Training data: chats, texts or tokens become packed rows of tokens, with labels only on the assistant's turns.

The kinds of rows are those of `specdec.training.kinds`; errors name the file's row."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from specdec.training.kinds import NO_ANSWER, TOO_LONG, checked, good_rows, require_answers
from specdec.training.labels import IGNORED
from specdec.training.report import BadRow, RowReport, reported
from specdec.training.templates import Chat, chat_of, pieces_of, unused

PADDING = -1  # the document number of padding; negative is what `Backbone` takes for it


@dataclass(frozen=True, slots=True)
class Rows:
    """N rows of S tokens, int32 `[N, S]` each.

    tokens       the token ids
    labels       the same, IGNORED where nothing is learned
    documents    the number of each packed text in its row, PADDING after the last
    marked       what a learner has marked each token with in `Learner.prepare`; None before
    """

    tokens: Tensor
    labels: Tensor
    documents: Tensor
    marked: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, indices: Sequence[int] | slice) -> "Rows":
        """Those rows, as int64."""
        marked = None if self.marked is None else self.marked[indices]
        tokens, labels, documents = (x[indices].long() for x in (self.tokens, self.labels, self.documents))
        return Rows(tokens, labels, documents, marked)

    def batch(self, step: int, size: int, seed: int = 0) -> "Rows":
        """The `size` rows of training step `step`: a function of (step, size, seed); each epoch is shuffled anew."""
        places = range(step * size, (step + 1) * size)
        orders = {
            epoch: np.random.default_rng([seed, epoch]).permutation(len(self))
            for epoch in {place // len(self) for place in places}
        }
        return self.take([int(orders[place // len(self)][place % len(self)]) for place in places])


def encode(row: dict, tokenizer, max_length: int) -> list[tuple[list[int], list[int]]]:
    """`(tokens, labels)` of one row, at most `max_length` long each.

    A long text comes in pieces, a long chat is cut; a chat whose template rewrites earlier turns is a piece per answer.
    Raises BadRow, a ValueError that names the row, where `specdec.training.kinds.checked` or the chat template refuses
    it, or nothing is left to learn: no answer, or only after `max_length`."""
    return _encoded(checked(row, "the row"), tokenizer, max_length)[0]


def _encoded(row: dict, tokenizer, max_length: int) -> tuple[list[tuple[list[int], list[int]]], list[str]]:
    """What `encode` returns, and remarks on what was cut or not used."""
    if "messages" in row:
        require_answers(row["messages"], row["where"])
        whole = _encode_chat(chat_of(row, tokenizer))
    elif "tokens" in row:
        start = row["learned_from"]
        whole = [(row["tokens"], [IGNORED] * start + row["tokens"][start:])]
    else:
        tokens = tokenizer(row["text"])["input_ids"]
        tokens = tokens if tokenizer.eos_token_id is None else [*tokens, tokenizer.eos_token_id]
        parts = [tokens[start : start + max_length] for start in range(0, len(tokens), max_length)]
        whole = [(part, part) for part in parts]
    # the first head's first label is the third token
    learned = lambda labels: any(label != IGNORED for label in labels[2:max_length])
    if not any(learned(labels) for _, labels in whole):
        longest = max((len(tokens) for tokens, _ in whole), default=0)
        if any(label != IGNORED for _, labels in whole for label in labels[2:]):
            detail = f"no token of an answer within the first {max_length} of {longest} tokens"
            raise BadRow(row["where"], TOO_LONG, detail)
        raise BadRow(row["where"], NO_ANSWER, f"none from the third of {longest} tokens on")
    cut = [f"cut to {max_length} tokens"] if any(len(tokens) > max_length for tokens, _ in whole) else []
    kept = [(tokens[:max_length], labels[:max_length]) for tokens, labels in whole if "text" in row or learned(labels)]
    return kept, cut + unused(row, tokenizer)


def _encode_chat(chat: Chat) -> list[tuple[list[int], list[int]]]:
    """Labels where the text of an answer is and, if the template has marks ({% generation %}), where those are too."""
    if not chat.tokenizer.is_fast:
        name = type(chat.tokenizer).__name__
        raise ValueError(f"{name} cannot tell where its tokens lie in a text; take a fast tokenizer")
    encoded = []
    for piece in pieces_of(chat):
        out = chat.tokenizer(piece.text, add_special_tokens=False, return_offsets_mapping=True)
        tokens = out["input_ids"]
        marks = chat.marks(piece.messages) if chat.marked and piece.messages else [1] * len(tokens)
        # by where a token ends: some tokenizers trim where it begins
        ends = [end for _, end in out["offset_mapping"]]
        said = [any(start < end <= stop for start, stop in piece.spans) for end in ends]
        learned = [inside and mark for inside, mark in zip(said, marks, strict=True)]
        labels = [token if wanted else IGNORED for token, wanted in zip(tokens, learned, strict=True)]
        encoded.append((tokens, labels))
    return encoded


def encode_rows(
    rows: Iterable[dict], tokenizer, max_length: int, report: RowReport
) -> list[list[tuple[list[int], list[int]]]]:
    """`encode` of every row that can be learned from; the others, and what was cut or not used, go to `report`.

    Raises ValueError for a `max_length` below 3, or with `report.strict` the first bad row's error."""
    if max_length < 3:
        raise ValueError(f"max_length must be at least 3, got {max_length}")

    def make(row: dict) -> list[tuple[list[int], list[int]]]:
        pieces, remarks = _encoded(row, tokenizer, max_length)
        report.remark(row["where"], remarks)
        return pieces

    return list(good_rows(rows, make, report))


def build_rows(
    rows: Iterable[dict], tokenizer, max_length: int, packing: bool = True, report: RowReport | None = None
) -> Rows:
    """All rows as tokens. With `packing` several texts share a row of `max_length`, none split.

    Rows that cannot be learned from are left out and counted in `report`; without one they are shown in a warning.
    Raises ValueError for a `max_length` below 3 or where no row is left, and with `report.strict` for the first bad
    row."""
    with reported(report) as own:
        encoded = encode_rows(rows, tokenizer, max_length, own)
        own.require(len(encoded), "training data")
    return pack([piece for pieces in encoded for piece in pieces], max_length if packing else 0)


def require_known_tokens(found: Iterable[int], tokenizer, model) -> None:
    """Raise ValueError, with both sizes, where `found` has token ids beyond the model's table or its output layer."""
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    size = min(table.weight.shape[0] for table in tables)
    if unknown := sorted(token for token in set(found) if token >= size):
        some = ", ".join(f"{token} ({tokenizer.convert_ids_to_tokens(token)!r})" for token in unknown[:4])
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens and the model a table of {size}: {len(unknown)} tokens of the "
            f"data are beyond it: {some}; take the model's own tokenizer, or give the model rows for them "
            "(resize_token_embeddings)"
        )


def pack(pieces: Sequence[tuple[list[int], list[int]]], room: int) -> Rows:
    """`(tokens, labels)` in rows, several in one as long as they have `room`; with 0 each has a row of its own.

    Padding is token 0: the pad token that was added to a tokenizer may lie beyond the model's table."""
    packed: list[list[tuple[list[int], list[int]]]] = []
    left = 0
    for tokens, labels in pieces:
        if len(tokens) > left:
            packed.append([])
            left = room
        packed[-1].append((tokens, labels))
        left -= len(tokens)
    length = max(sum(len(tokens) for tokens, _ in row) for row in packed)
    filled = Rows(*(torch.full((len(packed), length), fill, dtype=torch.int32) for fill in (0, IGNORED, PADDING)))
    for number, row in enumerate(packed):
        start = 0
        for document, (tokens, labels) in enumerate(row):
            place = number, slice(start, start := start + len(tokens))
            filled.tokens[place] = torch.tensor(tokens, dtype=torch.int32)
            filled.labels[place] = torch.tensor(labels, dtype=torch.int32)
            filled.documents[place] = document
    return filled
