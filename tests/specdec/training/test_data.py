"""Rows of tokens from chats, texts and ShareGPT: what is learned, what is refused, what packing keeps apart."""

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from specdec.training.data import PADDING, build_rows, encode, require_known_tokens
from specdec.training.files import read_rows
from specdec.training.labels import IGNORED
from specdec.training.report import RowReport
from tests.families import VOCAB, build

PLAIN = (
    "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{{ eos_token }}{% endfor %}{% if "
    "add_generation_prompt %}<a>{% endif %}"
)
MARKED = PLAIN.replace(
    "{{ m.content }}",
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content "
    "}}{% endif %}",
)
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 is even) %}{{ "
    "raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
)
CHAT = [
    {"role": "user", "content": "ab"},
    {"role": "assistant", "content": "cde"},
    {"role": "user", "content": "f"},
    {"role": "assistant", "content": "gh"},
]


def characters(template=None) -> PreTrainedTokenizerFast:
    """A tokenizer of one token a character."""
    vocabulary = {
        symbol: number
        for number, symbol in enumerate(["[pad]", "|", *'<>abcdefghijklmnopqrstuvwxyz 0123456789/\n{}":,_'])
    }
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="|", pad_token="[pad]")
    tokenizer.chat_template = template
    return tokenizer


def learned_text(tokenizer, tokens, labels) -> str:
    return "".join(
        tokenizer.convert_ids_to_tokens(
            [token for token, label in zip(tokens, labels, strict=True) if label != IGNORED]
        )
    )


@pytest.mark.parametrize(("template", "said"), [(PLAIN, "cde|gh|"), (MARKED, "cdegh")])
def test_only_the_assistants_tokens_are_learned(template, said):
    tokenizer = characters(template)
    ((tokens, labels),) = encode({"messages": CHAT}, tokenizer, 100)
    assert "".join(tokenizer.convert_ids_to_tokens(tokens)) == "<u>ab|<a>cde|<u>f|<a>gh|"
    assert learned_text(tokenizer, tokens, labels) == said
    assert all(label in (token, IGNORED) for token, label in zip(tokens, labels, strict=True))


@pytest.mark.parametrize(("template", "said"), [
    (ALTERNATING + PLAIN, "roles must alternate"),
    (ALTERNATING + MARKED, "roles must alternate"),
    ("{{ messages[0].name.title() }}", "'dict object' has no attribute 'name'"),
    ("{{ messages[0].content + 1 }}", "can only concatenate str"),
])  # fmt: skip
def test_a_chat_that_the_template_does_not_take_is_named(template, said):
    with pytest.raises(ValueError, match=f"data:7: the chat template does not take it: {said}") as caught:
        list(encode({"messages": [CHAT[0], *CHAT], "where": "data:7"}, characters(template), 100))
    assert said in str(caught.value.__cause__)


def test_a_chat_for_a_tokenizer_without_a_template_is_named():
    with pytest.raises(ValueError, match="data:7 is a chat, but the tokenizer has no chat template"):
        list(encode({"messages": CHAT, "where": "data:7"}, characters(), 100))


def test_an_answer_with_nothing_before_it_is_read_and_not_learned():
    tokenizer = characters(PLAIN)
    ((tokens, labels),) = encode({"messages": CHAT[1:]}, tokenizer, 100)
    assert "".join(tokenizer.convert_ids_to_tokens(tokens)) == "<a>cde|<u>f|<a>gh|"
    assert learned_text(tokenizer, tokens, labels) == "gh|"


@pytest.mark.parametrize(("row", "said"), [
    ({"messages": CHAT[:1]}, "no answer to learn: no assistant speaks in it"),
    ({"messages": CHAT[1:2]}, "no answer to learn: no assistant speaks in it after something else"),
    ({"messages": []}, "no answer to learn"),
    ({"messages": CHAT[:2]}, "too long: no token of an answer within the first 7 of 13 tokens"),
    ({"tokens": [3, 4, 5], "learned_from": 3}, "no answer to learn: none from the third of 3 tokens on"),
    ({"text": ""}, "no answer to learn"),
])  # fmt: skip
def test_a_row_in_which_nothing_is_to_be_learned_is_left_out_or_named(row, said, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"text": "abcdef"}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=rf"data\.jsonl:2: {said}"):
        build_rows(read_rows(path), characters(PLAIN), 7, report=RowReport(strict=True))
    with pytest.warns(UserWarning, match=rf"  1  {said.split(':')[0]} .*data\.jsonl:2$"):
        left = build_rows(read_rows(path), characters(PLAIN), 7)
    assert learned_text(characters(), left.tokens[0].tolist(), left.labels[0].tolist()) == "abcdef|"


def test_a_chat_that_is_cut_is_used_and_told():
    tokenizer, report = characters(PLAIN), RowReport()
    rows = build_rows([{"messages": CHAT}], tokenizer, 12, report=report)
    assert learned_text(tokenizer, rows.tokens[0].tolist(), rows.labels[0].tolist()) == "cde"
    assert report.remarks == {"cut to 12 tokens": 1} and not report.left_out


def test_tokens_beyond_the_models_table_are_named_before_they_are_used():
    model, tokenizer = build("llama"), characters()
    require_known_tokens(range(VOCAB), tokenizer, model)
    tokenizer.add_tokens([f"<new {n}>" for n in range(VOCAB + 1 - len(tokenizer))])
    with pytest.raises(
        ValueError, match=rf"has {VOCAB + 1} tokens and the model a table of {VOCAB}: 1 tokens .*: {VOCAB} "
    ):
        require_known_tokens([5, VOCAB], tokenizer, model)


def test_a_pad_token_beyond_the_models_table_does_no_harm():
    tokenizer = characters()
    tokenizer.add_special_tokens({"pad_token": "<new pad>"})
    rows = build_rows([{"text": "abcd"}, {"text": "ab"}], tokenizer, 100, packing=False)
    assert int(rows.tokens.max()) < tokenizer.pad_token_id


def test_long_texts_come_in_pieces_and_nothing_is_lost():
    tokenizer = characters()
    pieces = list(encode({"text": "abcdefghij"}, tokenizer, 4))
    assert [token for tokens, _ in pieces for token in tokens] == tokenizer("abcdefghij|")["input_ids"]
    assert all(tokens == labels for tokens, labels in pieces)


def test_packing_puts_whole_texts_beside_each_other():
    tokenizer = characters()
    rows = [{"text": text} for text in ("abc", "defg", "hijklm", "no")]
    packed, alone = build_rows(rows, tokenizer, 10), build_rows(rows, tokenizer, 10, packing=False)
    assert packed.documents.tolist() == [[0] * 4 + [1] * 5 + [PADDING], [0] * 7 + [1] * 3]
    assert len(alone) == 4 and alone.tokens.shape[1] == 7
    words = lambda built: sorted(int(t) for t in built.labels.flatten() if t != IGNORED)
    assert (
        words(packed)
        == words(alone)
        == sorted(token for row in rows for token in tokenizer(row["text"] + "|")["input_ids"])
    )
    assert (packed.labels[packed.documents == PADDING] == IGNORED).all()


def test_every_epoch_takes_every_row_once_in_another_order():
    rows = build_rows([{"text": letter * 3} for letter in "abcdefgh"], characters(), 10, packing=False)
    epochs = [torch.cat([rows.batch(step, 3).tokens[:, 0] for step in range(8)]).split(8)]
    assert (
        all(sorted(epoch.tolist()) == sorted(rows.tokens[:, 0].tolist()) for epoch in epochs[0])
        and epochs[0][0].tolist() != epochs[0][1].tolist()
    )
    assert torch.equal(rows.batch(5, 3).tokens, rows.batch(5, 3).tokens)


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="no rows to learn from$"):
        build_rows([], characters(), 8)
    with pytest.raises(ValueError, match="no rows to learn from; left out: 2 no answer to learn; the first: row 1: no"):
        build_rows([{"messages": CHAT[:1]}, {"messages": []}], characters(PLAIN), 8)
