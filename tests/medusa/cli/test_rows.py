"""Data as people bring them to the training command: the good rows are trained on, the others counted by reason."""

import json
import random
import re
from collections import Counter
from types import SimpleNamespace

import pytest

from medusa.cli.train import COMMAND, parser
from specdec import load_tiny_pair
from specdec.cli.training_rows import prepare, split
from specdec.training.labels import IGNORED
from specdec.training.report import RowReport

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' and not loop.first and messages[loop.index0 - 1].role == 'user' %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}{% if tools %}<|tools|>{{ tools | tojson }}\n"
    "{% endif %}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% for c in m.tool_calls or [] %}<call>"
    "{{ c.function.name }}{{ c.function.arguments | tojson }}</call>{% endfor %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
LENGTH = 160


def train(arguments: list[str]) -> None:
    """The command, whose errors are raised."""
    COMMAND.run(COMMAND.parser().parse_args(arguments))


def human(text: str) -> dict:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict:
    return {"from": "gpt", "value": text}


def quirks(n: int) -> list[tuple[object, str | None, str]]:
    """Rows of every kind with number `n` in them: the row, the reason that it is left out for, or what is learned."""
    ask, say, call = human(f"ask {n}"), gpt(f"say {n}"), json.dumps({"name": f"call{n}", "arguments": {"x": n}})
    messages = [{"role": "user", "content": f"ask {n}"}, {"role": "assistant", "content": f"say {n}"}]
    calls = [{"type": "function", "function": {"name": f"call{n}", "arguments": json.dumps({"x": n})}}]
    tools = [{"type": "function", "function": {"name": f"call{n}", "parameters": {}}}]
    called, said = f'<call>call{n}{{"x": {n}}}</call><|end|>', f"say {n}<|end|>"
    chat = lambda *turns, **more: {"conversations": list(turns), **more}
    return [
        (chat(ask, say), None, said),
        (chat(gpt("a fragment"), ask, say, human("and?")), None, said),
        (chat(ask, {"from": "function_call", "value": call}, {"from": "observation", "value": "3"}, say), None, called),
        (chat(ask, gpt("<call>"), {"from": "tool", "value": "3"}, say, tools=json.dumps(tools)), None, said),
        (chat(*messages, system="Be brief."), None, said),
        ({"messages": messages, "tools": tools, "chat_template_kwargs": {"short": True}}, None, said),
        ({"messages": [messages[0], {"role": "assistant", "content": None, "tool_calls": calls}]}, None, called),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "hm"}]}, messages[1]]}, None, said),
        (chat(), "no answer to learn", ""),
        (chat(ask), "no answer to learn", ""),
        (chat(human("word " * 200), say), "too long", ""),
        (chat(ask, ask, say), "the chat template does not take it", ""),
        (chat(ask, gpt("")), "an empty answer", ""),
        (chat(ask, {"from": "alien", "value": "x"}), "an unknown speaker", ""),
        (chat(ask, say, messages=messages), "of several kinds", ""),
        (chat(ask, say, tools="[{"), "tools that cannot be read", ""),
        ({"prompt": f"ask {n}", "completion": "x"}, "of no known kind", ""),
        ([n, n], "of no known kind", ""),
        ("{broken", "not JSON", ""),
    ]  # fmt: skip


@pytest.fixture
def brought(tmp_path):
    """The arguments of a short training on 300 such rows, the reasons by count, what is learned of the others,
    and how many of those have a switch."""
    rng, lines, reasons, learned, switched = random.Random(5), [], Counter(), [], 0
    for n in range(300):
        kinds = quirks(n)
        row, reason, said = kinds[n] if n < len(kinds) else rng.choice(kinds)
        lines.append(row if isinstance(row, str) else json.dumps(row))
        if reason is None:
            learned.append(said)
            switched += isinstance(row, dict) and "chat_template_kwargs" in row
        else:
            reasons[reason] += 1
    data, pair = tmp_path / "data.json", load_tiny_pair()
    data.write_text("\ufeff" + "\n".join(lines) + "\n", encoding="utf-8")
    pair.tokenizer.chat_template = TEMPLATE
    pair.tokenizer.save_pretrained(tmp_path / "tokenizer")
    arguments = ["--model", "specdec/tiny_pair/draft", "--tokenizer", str(tmp_path / "tokenizer"), "--data", str(data)]
    arguments += ["--output", str(tmp_path / "run"), "--heads", "2", "--output-layer", "shared", "--dtype", "float32"]
    return [*arguments, "--length", str(LENGTH), "--steps", "2", "--batch", "4"], reasons, learned, switched, pair


def test_300_rows_of_every_kind_train_on_the_good_ones_and_count_the_others(brought, capsys):
    arguments, reasons, learned, switched, pair = brought
    report = RowReport()
    options = parser().parse_args(arguments)
    rows = prepare(options, pair.draft, pair.tokenizer, SimpleNamespace(), report)
    labels = [part.labels[part.labels != IGNORED].tolist() for part in rows]
    said = "".join(pair.tokenizer.decode(part) for part in labels)
    assert reasons.total() > 100 and len(learned) > 100
    assert all(text in said for text in learned) and "ask" not in said and "word" not in said
    assert report.left_out == reasons
    assert report.remarks == {"short of chat_template_kwargs, which the chat template does not read": switched}

    train(arguments)
    out = capsys.readouterr().out
    shown = dict(re.findall(r"^ +\d+  (.+?) +\S+data\.json:(\d+)$", out, re.MULTILINE))
    assert reasons.keys() <= shown.keys() and shown["not JSON"] == "19"
    assert "1 process on " in out


def test_strict_stops_at_the_first_row_that_would_be_left_out(brought):
    with pytest.raises(ValueError, match=r"data\.json:9: no answer to learn: no assistant speaks"):
        train([*brought[0], "--strict"])


@pytest.mark.parametrize("more", [[], ["--self-distil", "--max-new-tokens", "4"]], ids=["as they are", "answered"])
def test_data_without_a_good_row_are_one_error(more, brought, tmp_path):
    (tmp_path / "data.json").write_text(json.dumps([{"messages": []}, {"prompt": "x"}]))
    left = "left out: 1 no answer to learn, 1 of no known kind; the first: "
    with pytest.raises(
        ValueError, match=rf"data\.json: there are no rows to learn from; {left}\S+data\.json:1: no answer"
    ):
        train([*brought[0], *more])


def test_the_model_answers_the_good_rows_and_bad_ones_are_counted_once(brought, tmp_path, capsys):
    rows = [row for row, reason, _ in quirks(1) if not isinstance(row, str)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    train([*brought[0], "--self-distil", "--max-new-tokens", "4", "--temperature", "0"])
    out = capsys.readouterr().out
    assert re.search(r"^ +2  no answer to learn", out, re.MULTILINE)
    assert re.search(r"^ +1  too long", out, re.MULTILINE)
    assert re.search(r"^ +1  short of chat_template_kwargs", out, re.MULTILINE)


def test_the_command_tells_a_file_that_is_none_in_one_line(brought, tmp_path, capsys):
    for name, said in (("missing.jsonl", "there is no file"), ("", "is a folder, not a file of rows")):
        assert COMMAND([*brought[0], "--data", str(tmp_path / name)]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert said in line and str(tmp_path / name) in line


def test_rows_are_held_out_of_those_that_are_good():
    assert split(list(range(10)), 0.2) == ([0, 1, 2, 3, 5, 6, 7, 8], [4, 9])
    with pytest.raises(ValueError, match=r"two rows or more that can be learned from, got 0\.2 and 1"):
        split([1], 0.2)


def test_tokens_that_the_model_does_not_have_stop_before_training(brought, tmp_path):
    arguments, *_, pair = brought
    pair.tokenizer.add_tokens(["<|assistant|>"])
    pair.tokenizer.save_pretrained(tmp_path / "tokenizer")
    size = len(pair.tokenizer)
    with pytest.raises(ValueError, match=rf"has {size} tokens and the model a table of 4096: .* \('<\|assistant\|>'\)"):
        train(arguments)
    assert not (tmp_path / "run/checkpoint.pt").exists()
