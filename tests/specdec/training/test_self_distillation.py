"""Rows in the target's own words: the very tokens it generates, the same however often the work was interrupted or
shared.
"""

import pytest
import torch

from specdec import AutoregressiveGenerator
from specdec.training.data import encode
from specdec.training.report import RowReport
from specdec.training.self_distillation import prompts_of, read_answers, self_distil
from tests.families import VOCAB, build
from tests.specdec.training.test_data import ALTERNATING, CHAT, PLAIN, characters

ROWS = [{"text": text} for text in ("abcdefgh", "a b", "xyz 12", "0123456789", "qq")]
OPTIONS = dict(max_new_tokens=6, temperatures=(0.0, 1.0), batch=2, prompt_tokens=4, progress=False)


def test_a_chat_is_answered_turn_by_turn():
    tokenizer = characters(PLAIN)
    prompts = prompts_of({"messages": CHAT}, tokenizer)
    assert ["".join(tokenizer.convert_ids_to_tokens(prompt)) for prompt in prompts] == [
        "<u>ab|<a>",
        "<u>ab|<a>cde|<u>f|<a>",
    ]
    with pytest.raises(ValueError, match="data:3: no answer to learn: no assistant speaks"):
        prompts_of({"messages": CHAT[:1], "where": "data:3"}, tokenizer)


def test_an_answer_that_is_still_empty_is_written_by_the_model_and_no_row_to_learn_from():
    tokenizer, asked = characters(PLAIN), {"messages": [CHAT[0], {"role": "assistant", "content": " "}]}
    (prompt,) = prompts_of(asked, tokenizer)
    assert "".join(tokenizer.convert_ids_to_tokens(prompt)) == "<u>ab|<a>"
    with pytest.raises(ValueError, match="data:3: an empty answer"):
        encode(asked | {"where": "data:3"}, tokenizer, 64)


def test_a_chat_that_the_template_does_not_take_is_named():
    with pytest.raises(ValueError, match="data:3: the chat template does not take it: roles must alternate"):
        prompts_of({"messages": [CHAT[0], *CHAT], "where": "data:3"}, characters(ALTERNATING + PLAIN))


def test_greedy_answers_are_the_targets_and_sampled_ones_differ(tmp_path):
    model, tokenizer = build("llama"), characters()
    self_distil(model, tokenizer, ROWS, tmp_path, **OPTIONS)
    answers = read_answers(tmp_path)
    assert sorted(len(row["tokens"][: row["learned_from"]]) for row in answers) == [2, 3, 4, 4, 4]
    for number, row in enumerate(answers):
        prompt, answer = row["tokens"][: row["learned_from"]], row["tokens"][row["learned_from"] :]
        alone = AutoregressiveGenerator(model).generate(torch.tensor([prompt]), max_new_tokens=6)
        greedy = alone.sequences[0, len(prompt) :].tolist()
        assert (answer == greedy) == (number // 2 % 2 == 0)


def test_interrupted_or_shared_work_gives_the_same_answers(tmp_path):
    model, tokenizer = build("llama"), characters()
    self_distil(model, tokenizer, ROWS, tmp_path / "whole", **OPTIONS)
    for process in (1, 0):
        self_distil(model, tokenizer, ROWS, tmp_path / "shared", **OPTIONS, share=(process, 2))
    self_distil(model, tokenizer, ROWS, tmp_path / "again", **OPTIONS)
    (tmp_path / "again" / "000001.jsonl").unlink()
    self_distil(model, tokenizer, ROWS, tmp_path / "again", **OPTIONS)
    whole, shared, again = (
        [row["tokens"] for row in read_answers(tmp_path / name)] for name in ("whole", "shared", "again")
    )
    assert whole == shared == again
    with pytest.raises(
        ValueError, match=r"whole was made with other settings \(there, here\): {'max_new_tokens': \(6, 7\)}"
    ):
        self_distil(model, tokenizer, ROWS, tmp_path / "whole", **OPTIONS | {"max_new_tokens": 7})


def test_prompts_that_leave_no_room_are_counted_and_not_answered(tmp_path):
    report = RowReport()
    self_distil(build("llama"), characters(), ROWS, tmp_path, **OPTIONS, max_length=5, report=report)
    assert [row["learned_from"] for row in read_answers(tmp_path)] == [2, 3]
    assert report.left_out == {"too long": 3} and report.first == {"too long": "row 1"}
    with pytest.raises(ValueError, match="row 1: too long: a prompt of 4 tokens, where a row has 5"):
        self_distil(
            build("llama"), characters(), ROWS, tmp_path, **OPTIONS, max_length=5, report=RowReport(strict=True)
        )
    with pytest.raises(ValueError, match="prompts: there are no rows to learn from; left out: 5 too long"):
        self_distil(build("llama"), characters(), ROWS, tmp_path, **OPTIONS, max_length=3)


def test_a_prompt_of_tokens_that_the_model_does_not_have_is_named(tmp_path):
    rows = [{"tokens": [5, VOCAB, 6], "learned_from": 2}]
    with pytest.raises(ValueError, match=f"the model a table of {VOCAB}: 1 tokens of the data are beyond it: {VOCAB} "):
        self_distil(build("llama"), characters(), rows, tmp_path, **OPTIONS)


def test_answers_to_other_prompts_and_temperatures_below_zero_are_refused(tmp_path):
    model, tokenizer = build("llama"), characters()
    self_distil(model, tokenizer, ROWS, tmp_path, **OPTIONS)
    with pytest.raises(ValueError, match=r"000000\.jsonl holds answers to other prompts"):
        self_distil(model, tokenizer, [{"text": "zz"}, *ROWS], tmp_path, **OPTIONS)
    with pytest.raises(ValueError, match=r"temperatures must be at least 0, got \[-1\]"):
        self_distil(model, tokenizer, ROWS, tmp_path, temperatures=[-1])
