"""Files of training rows: what is read, what ShareGPT's turns become, and which row an error names."""

import json

import pytest

from scripts import convert_sharegpt
from specdec.training.files import read_rows
from specdec.training.kinds import sharegpt_messages
from tests.specdec.training.test_data import CHAT


def test_sharegpt_becomes_messages(tmp_path, capsys):
    turns = [{"from": "gpt", "value": "early"}, {"from": "human", "value": "ab"}, {"from": "gpt", "value": "cde"}]
    assert sharegpt_messages(turns) == CHAT[:2]
    source, result = tmp_path / "share.json", tmp_path / "chats.jsonl"
    source.write_text(json.dumps([{"id": "x", "conversations": turns}, {"conversations": turns[:2]}]))
    convert_sharegpt.main([str(source), str(result)])
    assert [row["messages"] for row in read_rows(result)] == [
        CHAT[:2]
    ] and "1 rows without an answer" in capsys.readouterr().out


@pytest.mark.parametrize(("line", "said"), [
    ("{", r"data\.jsonl:1 is no JSON"),
    ('{"prompt": "x"}', r"data\.jsonl:1 must hold one of messages, text, tokens, conversations, got \['prompt'\]"),
    ('{"messages": [{"role": "user"}]}', "a message has a role and a content"),
    ('{"conversations": [{"from": "alien", "value": "x"}]}', "alien"),
])  # fmt: skip
def test_broken_rows_are_named(line, said, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=said):
        read_rows(path)


def test_separators_that_json_allows_do_not_break_a_row(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a\u2028b"}\n{"text": "c"}\n', encoding="utf-8")
    assert [row["text"] for row in read_rows(path)] == ["a\u2028b", "c"]
