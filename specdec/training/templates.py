"""Chats through the tokenizer's chat template: the prompts that a model would answer, and what it would answer."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

from specdec.training.kinds import NO_ANSWER, REASONING, answers, spelled
from specdec.training.report import BadRow


@dataclass(frozen=True, slots=True)
class Chat:
    """A chat and the template that renders it, with the row's tools and switches.

    messages  the turns, in the form that the template takes
    options   of `apply_chat_template`
    template  the template's source
    answers   the numbers of the messages that are learned
    """

    messages: Sequence[dict]
    options: dict
    template: str
    answers: Sequence[int]
    tokenizer: Any  # a transformers tokenizer
    where: str

    @property
    def marked(self) -> bool:
        """The template marks what an assistant says with {% generation %}."""
        return re.search(r"{%-?\s*generation\b", self.template) is not None

    def text(self, messages: Sequence[dict], prompt: bool = False) -> str:
        """Some messages as text, with `prompt` up to where a model begins to answer."""
        return str(self.render(messages, tokenize=False, add_generation_prompt=prompt))

    def prompt_tokens(self, number: int) -> list[int]:
        """What a model reads before it writes message `number`."""
        options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
        return list(self.render(self.messages[:number], **options)["input_ids"])

    def marks(self, count: int) -> list[int]:
        """For each token of the first `count` messages, whether the template marks it as an assistant's."""
        options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        return list(self.render(self.messages[:count], **options)["assistant_masks"])

    def render(self, messages: Sequence[dict], **options):
        """`apply_template` with the row's tools and switches."""
        return apply_template(messages, self.tokenizer, self.where, **self.options, **options)


def apply_template(messages: Sequence[dict], tokenizer, where: str, **options):
    """The tokenizer's `apply_chat_template`, whose errors become a BadRow, a ValueError that names the row, `where`."""
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(list(messages), **options)
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:  # such as text + list in it
        raise BadRow(where, "the chat template does not take it", str(error)) from error


def chat_of(row: dict, tokenizer) -> Chat:
    """The chat of a row that `specdec.training.kinds.checked` made.

    Raises ValueError for a tokenizer without a chat template, BadRow where no assistant answers or the template refuses
    the chat."""
    tools, where = row.get("tools"), row["where"]
    try:
        template = tokenizer.get_chat_template(tools=tools)
    except ValueError as error:
        raise ValueError(
            f"{where} is a chat, but the tokenizer has no chat template: give rows of texts, or set "
            "tokenizer.chat_template"
        ) from error
    messages = [spelled(message, calls="tool_calls" in template) for message in row["messages"]]
    learned = answers(messages)
    if not learned:
        raise BadRow(where, NO_ANSWER, "no assistant speaks in it after something else")
    options = row.get("chat_template_kwargs", {}) | ({"tools": tools} if tools else {})
    chat = Chat(messages, options, template, learned, tokenizer, where)
    try:
        chat.text(messages)
    except BadRow:
        if not any("tool_calls" in message for message in messages):
            raise
        # some templates take the arguments of calls as text
        chat = Chat([_with_text_arguments(m) for m in messages], options, template, learned, tokenizer, where)
        chat.text(chat.messages)
    return chat


def unused(row: dict, tokenizer) -> list[str]:
    """What a chat brings and its template does not read, such as "tools that the chat template does not show".

    Empty for rows that are no chats."""
    if "messages" not in row:
        return []
    template = tokenizer.get_chat_template(tools=row.get("tools"))
    found = [] if "tools" in template or not row.get("tools") else ["tools that the chat template does not show"]
    switches = [
        name for name in row.get("chat_template_kwargs", ()) if not re.search(rf"\b{re.escape(name)}\b", template)
    ]
    found += [f"{name} of chat_template_kwargs, which the chat template does not read" for name in switches]
    read = re.search(rf"[.'\"]({'|'.join(REASONING)})\b", template)  # of a message; switches have such names too
    if any("reasoning_content" in message for message in row["messages"]) and not read:
        found.append("reasoning that the chat template does not show")
    return found


@dataclass(frozen=True, slots=True)
class Piece:
    """A text to learn from: the character spans `[start, stop)` of answers in it, their end marks included.

    `messages` is how many of the chat's messages it shows, None where it is not the template's own rendering."""

    text: str
    spans: Sequence[tuple[int, int]]
    messages: int | None


def pieces_of(chat: Chat) -> list[Piece]:
    """The chat as one text with all its answers; or, where the template rewrites earlier turns, a text per answer.

    Such templates drop the thoughts of earlier turns, or move the system's text. Each answer is then the last turn of a
    text of its own, as a model would write it. Raises BadRow where the template does not show the turns before an
    answer, or a tool call."""
    whole, spans = chat.text(chat.messages), []
    for number in chat.answers:
        before, after = chat.text(chat.messages[:number], prompt=True), chat.text(chat.messages[: number + 1])
        if not (after.startswith(before) and whole.startswith(after)):
            return [_last_turn(chat, number) for number in chat.answers]
        spans.append((len(before), len(after)))
        _require_calls(chat, number, after[len(before) :])
    return [Piece(whole, spans, len(chat.messages))]


def _last_turn(chat: Chat, number: int) -> Piece:
    """The chat up to answer `number`, of which that answer is learned.

    The prompt of some templates opens a block of thoughts that finished turns do not show. It is not learned, and what
    a model would write there are the thoughts that the data bring."""
    base = chat.messages[:number]
    before, after = chat.text(base, prompt=True), chat.text(chat.messages[: number + 1])
    if after.startswith(before):
        _require_calls(chat, number, after[len(before) :])
        return Piece(after, [(len(before), len(after))], number + 1)
    # where an answer begins and ends, told by two that differ in their only character
    zero, one = (chat.text([*base, {"role": "assistant", "content": digit}]) for digit in "01")
    header = commonprefix([zero, one])
    start = len(commonprefix([header, after]))
    if not after[:start].startswith(chat.text(base)):
        raise BadRow(
            chat.where, "the chat template rewrites the turns before an answer", f"message {number}, {after[:60]!r}"
        )
    _require_calls(chat, number, after[start:])
    said = chat.messages[number]
    opened = before.removeprefix(header) if before.startswith(header) else ""
    thoughts = None if "tool_calls" in said else _thoughts(said.get("content", ""), opened)
    if thoughts is None:
        return Piece(after, [(start, len(after))], number + 1)
    text = before + thoughts + zero[len(header) + 1 :]
    return Piece(text, [(len(before), len(text))], None)


def _thoughts(content: str, opened: str) -> str | None:
    """What is left to write of an answer with thoughts after a prompt that ends with `opened`, such as "<think>\\n".

    None for an answer without thoughts.

    >>> _thoughts("<think>\\nhm\\n</think>\\n\\nYes", "<think>\\n"), _thoughts("hm\\n</think>\\n\\nYes", "<think>\\n")
    ('hm\\n</think>\\n\\nYes', 'hm\\n</think>\\n\\nYes')
    """
    mark = opened.strip()
    if mark and content.lstrip().startswith(mark):
        rest = content.lstrip().removeprefix(mark)
        return rest.removeprefix(opened[opened.index(mark) + len(mark) :])
    closing = mark.replace("<", "</", 1)
    return content if closing != mark and closing in content else None


def _require_calls(chat: Chat, number: int, shown: str) -> None:
    """Raise BadRow unless the functions that message `number` calls are in the text of its turn."""
    for call in chat.messages[number].get("tool_calls", ()):
        name = call.get("function", call)["name"]
        if name not in shown:
            raise BadRow(chat.where, "the chat template does not show a tool call", f"{name}, message {number}")


def _with_text_arguments(message: dict) -> dict:
    """The message with the arguments of its calls as JSON text."""
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call.get("function", call)
        function = {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}
        calls.append({**call, "function": function} if "function" in call else function)
    return {**message, "tool_calls": calls}
