"""Files of training rows: what is read, what ShareGPT's turns become, and which row an error names."""

import json

import pytest

from scripts import convert_sharegpt
from specdec.training.files import read_rows, write_chats
from specdec.training.kinds import sharegpt_messages
from specdec.training.report import BadRow, RowReport
from tests.specdec.training.test_data import CHAT


def test_sharegpt_becomes_messages_in_a_file_of_its_own(tmp_path, capsys):
    turns = [{"from": "gpt", "value": "early"}, {"from": "human", "value": "ab"}, {"from": "gpt", "value": "cde"}]
    assert sharegpt_messages(turns) == CHAT[:2]
    source, result = tmp_path / "share.json", tmp_path / "chats.jsonl"
    source.write_text(json.dumps([{"id": "x", "conversations": turns}, {"conversations": turns[:2]}]))
    convert_sharegpt.main([str(source), str(result)])
    assert [row["messages"] for row in read_rows(result)] == [CHAT[:2]]
    out = capsys.readouterr().out
    assert "1 rows left out" in out and f"1  no answer to learn  {source}:2" in out
    assert convert_sharegpt.main([str(source), str(result), "--strict"]) == 2
    assert f"error: {source}:2: no answer to learn" in capsys.readouterr().err


def test_a_converted_chat_keeps_its_tools_its_switches_and_its_calls(tmp_path):
    call = {"name": "now", "arguments": {"city": "oslo"}}
    turns = [{"from": "human", "value": "ab"}, {"from": "function_call", "value": json.dumps(call)},
             {"from": "observation", "value": "3"}, {"from": "gpt", "value": "cde"}]  # fmt: skip
    row = {"conversations": turns, "tools": json.dumps([{"name": "now"}]), "chat_template_kwargs": {"short": True}}
    (tmp_path / "share.json").write_text(json.dumps(row | {"system": "hm"}))
    assert write_chats(tmp_path / "share.json", tmp_path / "chats.jsonl") == (1, 0)
    (written,) = (json.loads(line) for line in (tmp_path / "chats.jsonl").read_text().splitlines())
    assert written == {
        "messages": [
            {"role": "system", "content": "hm"},
            CHAT[0],
            {"role": "assistant", "tool_calls": [{"type": "function", "function": call}]},
            {"role": "tool", "content": "3"},
            CHAT[1],
        ],
        "tools": [{"name": "now"}],
        "chat_template_kwargs": {"short": True},
    }


ROW = {"messages": CHAT[:2]}


@pytest.mark.parametrize(("line", "said"), [
    ("{", "not JSON"),
    ('{"prompt": "x"}', r"of no known kind: .* one of messages, text, tokens, conversations, got \['prompt'\]"),
    ("[1, 2]", "of no known kind: .*, got list"),
    ('"text"', "of no known kind: .*, got str"),
    ('{"text": "\\ud83d"}', "half of a Unicode character"),
])  # fmt: skip
def test_broken_lines_are_left_out_or_named(line, said, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(f"{json.dumps(ROW)}\n{line}\n\n{json.dumps(ROW)}\n")
    with pytest.raises(BadRow, match=rf"data\.jsonl:2: {said}"):
        read_rows(path, RowReport(strict=True))
    with pytest.warns(UserWarning, match=rf"  1  {said.split(':')[0]} .*data\.jsonl:2$"):
        rows = read_rows(path)
    assert [row["where"] for row in rows] == [f"{path}:1", f"{path}:4"]


def test_a_file_without_a_good_row_is_refused_by_its_first_one(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("{\n[]\n5\n")
    left = r"data\.jsonl: there are no rows to learn from; left out: 2 of no known kind, 1 not JSON; the first: "
    with pytest.raises(ValueError, match=left + r".*data\.jsonl:1: not JSON: Expecting"):
        read_rows(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match=r"data\.jsonl: there are no rows to learn from$"):
        read_rows(path)


@pytest.mark.parametrize("name", ["data.json", "data.jsonl", "data"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_what_is_in_a_file_tells_its_form_and_not_its_name(name, encoding, tmp_path):
    """A list, an object a line, and one object, each with and without a byte-order mark."""
    for text in (json.dumps([ROW, ROW], indent=1), f"{json.dumps(ROW)}\n{json.dumps(ROW)}", json.dumps(ROW, indent=1)):
        (tmp_path / name).write_text(text, encoding=encoding)
        rows = read_rows(tmp_path / name)
        assert [row["messages"] for row in rows] == [CHAT[:2]] * (1 if text.startswith("{\n") else 2)
        assert [row["where"] for row in rows] == [f"{tmp_path / name}:{n}" for n in range(1, len(rows) + 1)]


def test_strings_of_a_list_are_no_rows_even_where_they_hold_one(tmp_path):
    path, report = tmp_path / "data.json", RowReport()
    path.write_text(json.dumps([json.dumps(ROW), ROW]))
    assert len(read_rows(path, report)) == 1 and report.left_out == {"of no known kind": 1}


def test_a_path_that_is_no_file_of_rows_is_one_clear_error(tmp_path):
    cases = {"folder": "is a folder", "missing.json": "there is no file", "cut.json": "begins a JSON list, but is none"}
    (tmp_path / "folder").mkdir()
    (tmp_path / "cut.json").write_text(json.dumps([ROW, ROW], indent=1)[:-20])
    (tmp_path / "latin.json").write_bytes('{"text": "\xe9"}'.encode("latin-1"))
    for name, said in (cases | {"latin.json": "is no UTF-8 text"}).items():
        with pytest.raises(ValueError, match=said) as caught:
            read_rows(tmp_path / name)
        assert type(caught.value) is ValueError and str(tmp_path / name) in str(caught.value)


def test_separators_that_json_allows_do_not_break_a_row(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a\u2028b"}\n{"text": "c"}\n', encoding="utf-8")
    assert [row["text"] for row in read_rows(path)] == ["a\u2028b", "c"]
