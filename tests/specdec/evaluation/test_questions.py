"""Questions of every layout of files, and the prompts of their turns."""

import json

import pytest
import torch
from transformers import AutoTokenizer

from specdec.evaluation.questions import Question, read_questions, shipped_questions, some_of
from specdec.evaluation.texts import Texts, pad_left
from specdec.tiny_pair import FOLDER

USER = lambda text: {"role": "user", "content": text}
SAID = {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [("a.txt", "one\n\ntwo\n", [("own", 0, ("one",)), ("own", 1, ("two",))]),
     ("a.json", '["one", {"prompt": "two", "kind": "k"}]', [("own", 0, ("one",)), ("k", 0, ("two",))]),
     ("lines.json", '{"prompt": "one"}\n{"prompt": "two"}\n', [("own", 0, ("one",)), ("own", 1, ("two",))]),
     ("spec_bench.jsonl", '{"question_id": 81, "category": "m", "turns": ["one", "later"]}\n',
      [("m", 81, ((USER("one"),), (USER("later"),)))]),
     ("deepspec.jsonl", '{"turns": ["one"]}\n{"turns": ["two"]}\n',
      [("own", 0, ((USER("one"),),)), ("own", 1, ((USER("two"),),))]),
     ("speed_bench.jsonl",
      json.dumps({"messages": [{"role": "system", "content": "s"}, USER("q"), USER("r")], "question_id": "x",
                  "category": "c"}),
      [("c", "x", (({"role": "system", "content": "s"}, USER("q")), (USER("r"),)))]),
     ("chat.jsonl", json.dumps({"messages": [USER("q"), SAID, USER("r"), SAID]}),
      [("own", 0, ((USER("q"), SAID, USER("r")),))])],
)  # fmt: skip
def test_questions_are_read_from_files_of_these_kinds(tmp_path, name, text, expected):
    (tmp_path / name).write_text(text)
    assert [(q.kind, q.number, q.turns) for q in read_questions(str(tmp_path / name))] == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [('{"turns": []}', "got an object with turns"), ('{"messages": ["q"]}', "got an object with messages"),
     ("3", "got neither"), ('{"text": "x"}', "prompt 1 must be a text"), ("{", ":1 is no JSON"), ("", "no prompt")],
)  # fmt: skip
def test_what_is_no_question_is_named(tmp_path, text, said):
    (tmp_path / "bad.jsonl").write_text(text)
    with pytest.raises(ValueError, match=said):
        read_questions(str(tmp_path / "bad.jsonl"))


def test_some_are_taken_evenly_and_the_shipped_ones_are_of_four_kinds():
    assert {q.kind for q in shipped_questions(2)} == {"code", "prose", "data", "editing"}
    assert [q.number for q in some_of(shipped_questions(), 4)] == [0, 0, 0, 0]
    assert some_of(shipped_questions(1), 9) == shipped_questions(1) == some_of(shipped_questions(1), None)


def test_a_turns_prompt_holds_the_answers_before_it():
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "target")
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    question = Question("m", 1, ((USER("one"),), (USER("two"),)))
    text = lambda texts, *given: tokenizer.decode(texts.ids(*given))
    assert text(Texts(tokenizer), question, 0) == "<user>one<assistant>"
    assert text(Texts(tokenizer), question, 1, ["a"]) == "<user>one<assistant>a<user>two<assistant>"
    assert text(Texts(tokenizer, plain=True), question, 1, ["a"]) == "one\n\na\n\ntwo\n\n"
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        Texts(tokenizer).ids(question, 0)


def test_prompts_of_several_lengths_are_padded_on_the_left():
    ids, mask = pad_left([torch.tensor([5]), torch.tensor([6, 7])], 9)
    assert ids.tolist() == [[9, 5], [6, 7]] and mask.tolist() == [[0, 1], [1, 1]]
