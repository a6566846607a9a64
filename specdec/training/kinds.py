"""What a row of training data may hold, and the one form that the kinds come in: messages, a text, or tokens.

Rows of chats may bring `tools`, `chat_template_kwargs` and a `system` text. Tools, the arguments of tool calls and the
switches of the template may be given as JSON in a string. Everything else of a message goes to the chat template as it
is, without what is null."""

import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from specdec.training.report import BadRow, RowReport

Made = TypeVar("Made")

KINDS = ("messages", "text", "tokens", "conversations")
USER, ASSISTANT = ("user", "human"), ("assistant", "gpt", "chatgpt", "bing", "bard", "model")
TOOL, CALL = ("tool", "observation", "function", "function_response", "tool_response"), ("function_call", "tool_call")
ROLES = (
    dict.fromkeys(USER, "user")
    | dict.fromkeys(ASSISTANT + CALL, "assistant")
    | dict.fromkeys(TOOL, "tool")
    | {"system": "system"}
)
REASONING = ("reasoning_content", "thinking", "reasoning")  # the names that transformers takes for one field
RENDERING = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {"documents", "kwargs"}
NO_ANSWER, TOO_LONG, UNREADABLE_CALL = "no answer to learn", "too long", "a tool call that cannot be read"


def checked(row: object, place: str) -> dict:
    """The row with "where" it stands, `place` unless it says so; chats as "messages", unknown columns left alone.

    Raises BadRow where it is of no kind or of several, or its columns are not what they should be."""
    given = {name: value for name, value in row.items() if value is not None} if isinstance(row, dict) else {}
    where = str(given.get("where", place))
    kinds = [kind for kind in KINDS if given.get(kind)] or [kind for kind in KINDS if kind in given]
    if len(kinds) != 1:
        got = list(given) if isinstance(row, dict) else type(row).__name__
        reason = "of several kinds" if kinds else "of no known kind"
        raise BadRow(where, reason, f"a row holds one of {', '.join(KINDS)}, got {got}")
    if kinds == ["text"]:
        if not isinstance(given["text"], str):
            raise BadRow(where, "a text that is no string", type(given["text"]).__name__)
    elif kinds == ["tokens"]:
        _check_tokens(given, where)
    else:
        given = _chat(given, kinds[0], where)
    return {**given, "where": where}


def good_rows(rows: Iterable[dict], make: Callable[[dict], Made], report: RowReport) -> Iterator[Made]:
    """`make(row)` of every row as `checked` gives it; those for which either raises BadRow go to `report`."""
    return report.good(enumerate(rows, 1), lambda found: make(checked(found[1], f"row {found[0]}")))


def sharegpt_messages(turns: Sequence[dict], where: str = "the row") -> list[dict]:
    """ShareGPT's `{"from", "value"}` turns as messages, without answers that come before any user's turn.

    Such fragments begin in the middle of a chat, and chat templates refuse them. A call becomes a message with
    "function_call", see `spelled`. Raises BadRow naming `where` for a turn that is none.

    >>> sharegpt_messages([{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}])
    [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello'}]
    """
    messages: list[dict] = []
    for turn in turns:
        asked = any(message["role"] == "user" for message in messages)
        if asked or not isinstance(turn, dict) or _role(turn, where) not in ("assistant", "tool"):
            messages.append(_message(turn, where))
    return messages


def answers(messages: Sequence[dict]) -> list[int]:
    """The numbers of the messages that a model would write: an assistant's, with something before it to answer."""
    return [number for number, message in enumerate(messages) if number and message["role"] == "assistant"]


def spelled(message: dict, calls: bool) -> dict:
    """A message with "function_call", ShareGPT's text of a call, in a form that chat templates know.

    With `calls` it becomes `tool_calls` where the text is JSON of a call, else it is the content. Other messages stay
    as they are."""
    if "function_call" not in message:
        return message
    rest = {name: value for name, value in message.items() if name != "function_call"}
    text = message["function_call"]
    try:
        found: Any = json.loads(text) if calls else None
        found = found if isinstance(found, list) else [found]
        wrapped = [c if isinstance(c, dict) and "function" in c else {"type": "function", "function": c} for c in found]
        if wrapped:
            return {**rest, "tool_calls": _calls(wrapped, "the row")}
    except (json.JSONDecodeError, BadRow):
        pass  # a call in words, or in another format
    return {**rest, "content": text}


def _chat(row: dict, kind: str, where: str) -> dict:
    turns = row[kind]
    if not isinstance(turns, list):
        raise BadRow(where, "a chat that is no list", f"{kind} is {type(turns).__name__}")
    messages = sharegpt_messages(turns, where) if kind == "conversations" else [_message(t, where) for t in turns]
    system = row.get("system", "")
    if not isinstance(system, str):
        raise BadRow(where, "a system text that is no string", type(system).__name__)
    own = messages[0].get("content") if messages and messages[0]["role"] == "system" else None
    if own is not None and system.strip() and own != system:
        raise BadRow(where, "two system texts", "a column and a turn, which differ")
    if own is None and system.strip():
        messages = [{"role": "system", "content": system}, *messages]
    chat = {name: value for name, value in row.items() if name not in (kind, "system", "tools", "chat_template_kwargs")}
    chat["messages"] = messages
    if tools := _tools(row.get("tools"), where):
        chat["tools"] = tools
    if switches := _switches(row.get("chat_template_kwargs"), where):
        chat["chat_template_kwargs"] = switches
    return chat


def _role(turn: dict, where: str) -> str:
    """The role of a turn; ShareGPT's "from" must be known, another "role" is left to the chat template."""
    given = turn.get("role")
    name = turn.get("from") if given is None else given
    if not isinstance(name, str) or (given is None and _plain(name) not in ROLES):
        raise BadRow(where, "an unknown speaker", f"{name!r} is none of {', '.join(ROLES)}")
    return ROLES.get(_plain(name), name)


def _plain(speaker: object) -> str:
    return str(speaker).strip().lower().replace("-", "_")


def _message(turn: object, where: str) -> dict:
    if not isinstance(turn, dict):
        raise BadRow(where, "a turn that is no object", type(turn).__name__)
    role = _role(turn, where)
    given = {name: value for name, value in turn.items() if value is not None}
    speaker = _plain(given.get("role", given.get("from")))
    if "from" in given:  # the other keys are ShareGPT's own, such as weights
        given = {name: given[name] for name in ("content", "value") if name in given}
    message = {"role": role, **{name: value for name, value in given.items() if name not in ("role", "value")}}
    if not given.keys().isdisjoint(("content", "value")):
        message["content"] = _text(given.get("content", given.get("value")), role, where)
    reasoning = next((message[name] for name in REASONING if name in message), None)
    if reasoning is not None:
        message |= {"thinking": reasoning, "reasoning_content": reasoning}
    if speaker in CALL and message.get("content"):
        message["function_call"] = message.pop("content")
    elif isinstance(message.get("function_call"), dict):  # OpenAI's older form
        message["tool_calls"] = [{"type": "function", "function": message.pop("function_call")}]
    calls = message.pop("tool_calls", None)
    if calls:
        message["tool_calls"] = _calls(calls, where)
    if not isinstance(message.get("function_call", ""), str):
        raise BadRow(where, UNREADABLE_CALL, f"got {message['function_call']!r}")
    says = bool(message.keys() & {"tool_calls", "function_call", "reasoning_content"})
    if not says and "content" not in message:
        raise BadRow(where, "a turn without content", f"of {role}")
    return message


def require_answers(messages: list[dict], where: str) -> None:
    """Raise BadRow for an assistant's turn that says nothing; self-distillation writes such turns itself."""
    for message in messages:
        says = message.keys() & {"tool_calls", "function_call", "reasoning_content"}
        if message["role"] == "assistant" and not says and not message["content"].strip():
            raise BadRow(where, "an empty answer")


def _text(content: object, role: str, where: str) -> str:
    """The content as text: parts of it a line each, as servers join them; a tool's result may be any JSON."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [None]
    texts = [
        part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part for part in parts
    ]
    if all(isinstance(text, str) for text in texts):
        return "\n".join(map(str, texts))
    if role == "tool":
        return json.dumps(content, ensure_ascii=False)
    kinds = {str(part.get("type")) if isinstance(part, dict) else type(part).__name__ for part in parts}
    got = ", ".join(sorted(kinds)) if isinstance(content, list) else type(content).__name__
    raise BadRow(where, "content that is no text", f"of {role}: {got}")


def _parsed(value: object, where: str, reason: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except json.JSONDecodeError as error:
        raise BadRow(where, reason, f"{error} in {value[:80]!r}") from error


def _calls(value: object, where: str) -> list[dict]:
    """Tool calls with their arguments as objects, which chat templates expect."""
    calls, reason = _parsed(value, where, UNREADABLE_CALL), UNREADABLE_CALL
    made = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRow(where, reason, f"a call has a name and arguments, got {call!r}")
        arguments = _parsed(function.get("arguments"), where, reason)
        if not isinstance(arguments, dict | None):
            raise BadRow(where, reason, f"arguments are an object, got {arguments!r}")
        whole = {**function, "arguments": arguments or {}}
        kept = {name: part for name, part in call.items() if part is not None}
        made.append({**kept, "function": whole} if function is not call else whole)
    return made


def _tools(value: object, where: str) -> list[dict]:
    reason = "tools that cannot be read"
    tools = _parsed(value, where, reason) or []
    tools = [_parsed(tool, where, reason) for tool in tools] if isinstance(tools, list) else [None]
    if not all(isinstance(tool, dict) for tool in tools):
        raise BadRow(where, reason, f"tools are a list of objects, got {str(value)[:80]}")
    return tools


def _switches(value: object, where: str) -> dict:
    reason = "chat_template_kwargs that cannot be read"
    switches = _parsed(value, where, reason) or {}
    if not isinstance(switches, dict):
        raise BadRow(where, reason, f"they are an object, got {type(switches).__name__}")
    if taken := sorted(switches.keys() & RENDERING):
        raise BadRow(where, reason, f"{', '.join(taken)} say how a chat is rendered, not what its template reads")
    return switches


def _check_tokens(row: dict, where: str) -> None:
    tokens, start = row["tokens"], row.get("learned_from")
    if not isinstance(tokens, list) or not all(type(token) is int and 0 <= token < 2**31 for token in tokens):
        raise BadRow(where, "tokens that are no ids", "tokens are a list of numbers from 0 on")
    if type(start) is not int or not 0 <= start <= len(tokens):
        raise BadRow(where, "tokens without learned_from", f"a number up to {len(tokens)}, got {start!r}")
