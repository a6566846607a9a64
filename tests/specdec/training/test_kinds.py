"""Every kind of row in the one form that training takes, and what is wrong with those that are refused."""

import json

import pytest

from specdec.training.kinds import checked, spelled
from specdec.training.report import BadRow
from tests.specdec.training.test_data import CHAT

CALL = {"type": "function", "function": {"name": "now", "arguments": {"city": "oslo"}}}
TOOLS = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}]


def messages_of(row: dict) -> list[dict]:
    return checked(row, "data:1")["messages"]


@pytest.mark.parametrize(("speaker", "role"), [
    ("human", "user"), ("User", "user"), ("gpt", "assistant"), ("model", "assistant"), ("tool", "tool"),
    ("observation", "tool"), ("function-response", "tool"), ("system", "system"),
])  # fmt: skip
@pytest.mark.parametrize("key", ["from", "role"])
def test_every_name_of_a_speaker_is_one_of_four_roles(speaker, role, key):
    turn = {key: speaker, "value" if key == "from" else "content": "x"}
    asked = {"from": "human", "value": "ab"}
    assert messages_of({"conversations": [asked, turn]})[1] == {"role": role, "content": "x"}


def test_a_role_that_only_the_template_may_know_is_left_to_it():
    assert messages_of({"messages": [{"role": "developer", "content": "x"}, *CHAT]})[0]["role"] == "developer"


def test_null_columns_and_null_fields_are_as_if_they_were_not_there():
    """Sets with one schema for all rows are written so; transformers 5.24 drops such fields too, 5.17 does not."""
    nothing = {"tool_calls": None, "name": None}
    row = {"messages": [m | nothing for m in CHAT], "text": None, "tools": None, "chat_template_kwargs": None}
    assert checked(row, "data:1") == {"messages": CHAT, "where": "data:1"}
    call = {"role": "assistant", "content": None, "tool_calls": [CALL | {"id": None}]}
    assert messages_of({"messages": [CHAT[0], call]})[1] == {"role": "assistant", "tool_calls": [CALL]}


def test_an_empty_column_beside_a_full_one_is_no_second_kind():
    assert messages_of({"messages": CHAT, "text": "", "conversations": []}) == CHAT


def test_what_was_checked_is_checked_again_to_the_same():
    turns = [{"from": "human", "value": "ab"}, {"from": "function_call", "value": "<call>"}]
    rows = [
        {"conversations": turns, "system": "hm", "tools": json.dumps(TOOLS)},
        {"messages": [CHAT[0], {"role": "assistant", "tool_calls": json.dumps([CALL]), "thinking": "hm"}]},
    ]
    for row in rows:
        once = checked(row, "data:1")
        assert checked(once, "elsewhere") == once


@pytest.mark.parametrize("arguments", [{"city": "oslo"}, '{"city": "oslo"}'])
@pytest.mark.parametrize("as_text", [False, True])
def test_arguments_of_calls_are_objects_however_they_are_given(arguments, as_text):
    calls = [{"type": "function", "function": {"name": "now", "arguments": arguments}}]
    message = {"role": "assistant", "tool_calls": json.dumps(calls) if as_text else calls}
    assert messages_of({"messages": [CHAT[0], message]})[1]["tool_calls"] == [CALL]
    older = {"role": "assistant", "content": None, "function_call": {"name": "now", "arguments": arguments}}
    assert messages_of({"messages": [CHAT[0], older]})[1]["tool_calls"] == [CALL]


def test_a_call_without_arguments_has_an_empty_object():
    for function in ({"name": "now"}, {"name": "now", "arguments": ""}, {"name": "now", "arguments": None}):
        message = {"role": "assistant", "tool_calls": [{"function": function}]}
        (call,) = messages_of({"messages": [CHAT[0], message]})[1]["tool_calls"]
        assert call["function"] == {"name": "now", "arguments": {}}


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS), [json.dumps(tool) for tool in TOOLS]])
def test_tools_are_objects_however_they_are_given(tools):
    assert checked({"messages": CHAT, "tools": tools}, "data:1")["tools"] == TOOLS


@pytest.mark.parametrize("nothing", ["", "[]", [], None])
def test_no_tools_are_no_column(nothing):
    assert "tools" not in checked({"messages": CHAT, "tools": nothing}, "data:1")


def test_parts_of_a_content_are_joined_and_results_of_tools_may_be_any_json():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    turns = [{"role": "user", "content": parts}, {"role": "tool", "content": {"c": 3}}, {"role": "tool", "content": 4}]
    assert [m["content"] for m in messages_of({"messages": turns})] == ["a\nb", '{"c": 3}', "4"]


def test_a_system_column_is_the_first_turn():
    system = {"role": "system", "content": "be brief"}
    for row in ({"messages": CHAT}, {"messages": [system, *CHAT]}):
        assert messages_of(row | {"system": "be brief"}) == [system, *CHAT]
    assert messages_of({"messages": CHAT, "system": ""}) == CHAT


@pytest.mark.parametrize("text", ["<call>", "[]", "5", '["now"]', '{"name": 3}', '{"name": "now", "arguments": "["}'])
def test_a_call_that_is_no_json_of_one_stays_the_text_it_is(text):
    message = {"role": "assistant", "function_call": text}
    assert spelled(message, calls=True) == {"role": "assistant", "content": text}


def test_a_call_as_json_is_a_call_where_the_template_knows_calls():
    text = json.dumps(CALL["function"])
    message = {"role": "assistant", "function_call": text}
    assert spelled(message, calls=True) == {"role": "assistant", "tool_calls": [CALL]}
    assert spelled(message | {"function_call": f"[{text}, {text}]"}, calls=True)["tool_calls"] == [CALL, CALL]
    assert spelled(message, calls=False) == {"role": "assistant", "content": text}


USER = {"role": "user", "content": "ab"}
BAD = [
    ({"messages": CHAT, "text": "ab"}, "of several kinds: .* got .'messages', 'text'."),
    ({"conversations": "ab"}, "a chat that is no list: conversations is str"),
    ({"conversations": ["ab"]}, "a turn that is no object: str"),
    ({"conversations": [{"from": "alien", "value": "x"}]}, "an unknown speaker: 'alien' is none of user, human"),
    ({"messages": [{"content": "x"}]}, "an unknown speaker: None"),
    ({"messages": [{"role": "user"}]}, "a turn without content: of user"),
    ({"messages": [USER, {"role": "assistant", "content": None}]}, "a turn without content: of assistant"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "content that is no text: of user: image"),
    ({"messages": [{"role": "user", "content": 5}]}, "content that is no text: of user: int"),
    ({"messages": [USER, {"role": "assistant", "tool_calls": "{"}]}, "a tool call that cannot be read: .* in '{'"),
    ({"messages": [USER, {"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "a tool call .*: a call has a name"),
    (
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "now", "arguments": "3"}]}]},
        "a tool call that cannot be read: arguments are an object, got 3",
    ),
    ({"messages": CHAT, "tools": "[{"}, "tools that cannot be read"),
    ({"messages": CHAT, "tools": {"name": "now"}}, "tools that cannot be read: tools are a list of objects"),
    ({"messages": CHAT, "chat_template_kwargs": [1]}, "chat_template_kwargs that cannot be read: they are an object"),
    ({"messages": CHAT, "chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs .*: tokenize say how"),
    ({"messages": [{"role": "system", "content": "a"}, *CHAT], "system": "b"}, "two system texts"),
    ({"messages": CHAT, "system": 5}, "a system text that is no string: int"),
    ({"text": 5}, "a text that is no string: int"),
    ({"tokens": "ab", "learned_from": 0}, "tokens that are no ids"),
    ({"tokens": [1, -1], "learned_from": 0}, "tokens that are no ids"),
    ({"tokens": [1, 2]}, "tokens without learned_from: a number up to 2, got None"),
    ({"tokens": [1, 2], "learned_from": 3}, "tokens without learned_from: a number up to 2, got 3"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "said"), BAD, ids=[said for _, said in BAD])
def test_what_is_wrong_with_a_row_is_said(row, said):
    with pytest.raises(BadRow, match=f"^data:1: {said}"):
        checked(row, "data:1")
