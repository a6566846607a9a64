"""Chats through templates that take tools and switches, and through those that rewrite earlier turns: what is learned
is what a model would write after the very prompt that it is given.
"""

import pytest

from specdec.training.data import build_rows, encode
from specdec.training.kinds import checked
from specdec.training.labels import IGNORED
from specdec.training.report import BadRow, RowReport
from specdec.training.self_distillation import prompts_of
from specdec.training.templates import unused
from tests.specdec.training.test_data import CHAT, PLAIN, characters, learned_text
from tests.specdec.training.test_kinds import CALL, TOOLS

END = "{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
WITH_TOOLS = (
    "{% for t in tools or [] %}<t>{{ t.function.name }}{% endfor %}{% for m in messages %}<{{ m.role[0] }}>"
    "{{ m.content }}{% for c in m.tool_calls or [] %}<c>{{ c.function.name }} {{ c.function.arguments | tojson }}"
    "{% endfor %}|" + END
)
TEXT_ARGUMENTS = WITH_TOOLS.replace("{{ c.function.arguments | tojson }}", "{{ '' + c.function.arguments }}")
SWITCH = PLAIN.replace("<a>", "<a>{% if not thinking %}<no>{% endif %}")
# thoughts stay in the answers after the last user's turn; the prompt opens them; the system's text moves
LAST_TURN = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<{{ m.role[0] }}>{% if m.role == 'assistant' and loop.index0 > "
    "ns.last %}{{ m.content }}{% else %}{{ m.content.split('</h>')[-1] }}{% endif %}|" + END
)
OPENED = (
    "{% for m in messages %}<{{ m.role[0] }}>{{ m.content.split('</h>')[-1] }}|"
    "{% endfor %}{% if add_generation_prompt %}<a><h>\n{% endif %}"
)
MOVED = (
    "{% for m in messages %}{% if m.role == 'user' %}<u>{% if loop.last or loop.index0 == messages | length - 2 %}"
    "{{ messages[0].content }}{% endif %}{{ m.content }}|<a>{% elif m.role == 'assistant' %}{{ m.content }}|{% endif %}"
    "{% endfor %}"
)
FORGETFUL = "{{ messages[-1].content }}{% if add_generation_prompt %}<a>{% endif %}"
THOUGHTS = [CHAT[0], {"role": "assistant", "content": "<h>\nx\n</h>cde"}, CHAT[2],
            {"role": "assistant", "content": "<h>\ny\n</h>gh"}]  # fmt: skip
GENERATED = [m | {"content": m["content"].removeprefix("<h>\n")} for m in THOUGHTS]
CALLING = [CHAT[0], {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "3"}, CHAT[1]]


def pieces(row: dict, tokenizer) -> list[tuple[str, str]]:
    """(all tokens, those learned) of each piece as texts; every label is its own token."""
    found = encode(row, tokenizer, 500)
    assert all(label in (token, IGNORED) for piece in found for token, label in zip(*piece, strict=True))
    return [("".join(tokenizer.convert_ids_to_tokens(piece[0])), learned_text(tokenizer, *piece)) for piece in found]


def prompts(row: dict, tokenizer) -> list[str]:
    return ["".join(tokenizer.convert_ids_to_tokens(prompt)) for prompt in prompts_of(row, tokenizer)]


@pytest.mark.parametrize("template", [WITH_TOOLS, {"default": PLAIN, "tool_use": WITH_TOOLS}], ids=["one", "named"])
def test_tools_are_in_the_text_and_in_the_prompt(template):
    tokenizer, row = characters(template), {"messages": CHAT[:2], "tools": TOOLS}
    assert pieces(row, tokenizer) == [("<t>now<u>ab|<a>cde|", "cde|")]
    assert prompts(row, tokenizer) == ["<t>now<u>ab|<a>"]


@pytest.mark.parametrize("template", [WITH_TOOLS, TEXT_ARGUMENTS], ids=["objects", "texts"])
@pytest.mark.parametrize("arguments", [{"city": "oslo"}, '{"city": "oslo"}'], ids=["object", "text"])
def test_a_call_without_content_is_learned_as_the_answer_after_it(template, arguments):
    """Some templates write arguments themselves, others expect them written; data bring them in both forms."""
    tokenizer = characters(template)
    calls = [{"type": "function", "function": {"name": "now", "arguments": arguments}}]
    row = {"messages": [CALLING[0], {"role": "assistant", "tool_calls": calls}, *CALLING[2:]]}
    said = '<c>now {"city": "oslo"}|'
    assert pieces(row, tokenizer) == [(f"<u>ab|<a>{said}<t>3|<a>cde|", f"{said}cde|")]
    assert prompts(row, tokenizer) == ["<u>ab|<a>", f"<u>ab|<a>{said}<t>3|<a>"]


def test_a_call_that_the_template_does_not_show_is_no_empty_answer():
    with pytest.raises(BadRow, match="data:1: the chat template does not show a tool call: now, message 1"):
        encode({"messages": CALLING, "where": "data:1"}, characters(PLAIN), 500)


def test_sharegpts_call_in_json_takes_the_templates_form_and_else_stays_text():
    text = '{"name": "now", "arguments": {"city": "oslo"}}'
    row = {"conversations": [{"from": "human", "value": "ab"}, {"from": "function_call", "value": text},
                             {"from": "observation", "value": "3"}, {"from": "gpt", "value": "cde"}]}  # fmt: skip
    assert pieces(row, characters(WITH_TOOLS))[0][1] == '<c>now {"city": "oslo"}|cde|'
    assert pieces(row, characters(PLAIN))[0][1] == f"{text}|cde|"


def test_the_rows_switches_are_those_of_text_and_prompt():
    tokenizer, said = characters(SWITCH), [CHAT[0], {"role": "assistant", "content": "<no>cde"}]
    for switches, prompt, learned in (({"thinking": True}, "<u>ab|<a>", "<no>cde|"), ({}, "<u>ab|<a><no>", "cde|")):
        row = {"messages": said, "chat_template_kwargs": switches}
        assert prompts(row, tokenizer) == [prompt]
        assert pieces(row, tokenizer) == [("<u>ab|<a><no>cde|", learned)]


def test_what_the_template_does_not_read_is_told():
    reasoning = {"role": "assistant", "content": "cde", "reasoning": "hm"}
    row = {"messages": [CHAT[0], reasoning], "tools": TOOLS, "chat_template_kwargs": {"thinking": True}}
    told = ["tools that the chat template does not show",
            "thinking of chat_template_kwargs, which the chat template does not read",
            "reasoning that the chat template does not show"]  # fmt: skip
    report = RowReport()
    build_rows([row], characters(PLAIN), 500, report=report)
    assert list(report.remarks) == told and not report.left_out
    assert unused(checked(row, "data:1"), characters(SWITCH)) == [told[0], told[2]]


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_has_one_name_on_every_release(name):
    template = PLAIN.replace("{{ m.content }}", "{{ m.reasoning_content }}{{ m.content }}")
    row = {"messages": [CHAT[0], {"role": "assistant", "content": "cde", name: "hm"}]}
    assert pieces(row, characters(template)) == [("<u>ab|<a>hmcde|", "hmcde|")]


THINKING = {
    "thoughts in the last turn": (LAST_TURN, THOUGHTS, [
        ("<u>ab|<a><h>\nx\n</h>cde|", "<h>\nx\n</h>cde|"),
        ("<u>ab|<a>cde|<u>f|<a><h>\ny\n</h>gh|", "<h>\ny\n</h>gh|"),
    ]),
    "thoughts opened by the prompt": (OPENED, THOUGHTS, [
        ("<u>ab|<a><h>\nx\n</h>cde|", "x\n</h>cde|"),
        ("<u>ab|<a>cde|<u>f|<a><h>\ny\n</h>gh|", "y\n</h>gh|"),
    ]),
    "the same as a model writes them": (OPENED, GENERATED, [
        ("<u>ab|<a><h>\nx\n</h>cde|", "x\n</h>cde|"),
        ("<u>ab|<a>cde|<u>f|<a><h>\ny\n</h>gh|", "y\n</h>gh|"),
    ]),
    "a system text that moves": (MOVED, [{"role": "system", "content": "hm"}, *CHAT], [
        ("<u>hmab|<a>cde|", "cde|"),
        ("<u>ab|<a>cde|<u>hmf|<a>gh|", "gh|"),
    ]),
}  # fmt: skip


@pytest.mark.parametrize(("template", "messages", "wanted"), THINKING.values(), ids=THINKING)
def test_a_template_that_rewrites_earlier_turns_is_learned_turn_by_turn(template, messages, wanted):
    """Each answer comes after the very prompt that self-distillation and decoding give the model."""
    tokenizer, row = characters(template), {"messages": messages}
    assert pieces(row, tokenizer) == wanted
    assert prompts(row, tokenizer) == [text.removesuffix(learned) for text, learned in wanted]


def test_an_answer_without_thoughts_is_learned_alone_where_the_prompt_would_open_them():
    assert pieces({"messages": CHAT}, characters(OPENED)) == [
        ("<u>ab|<a>cde|", "cde|"),
        ("<u>ab|<a>cde|<u>f|<a>gh|", "gh|"),
    ]


def test_marks_of_a_template_hold_turn_by_turn_too():
    first, second = "{{ m.content }}", "{{ m.content.split('</h>')[-1] }}"
    mark = lambda shown: f"{{% generation %}}{shown}{{% endgeneration %}}"
    others = f"{{% if m.role == 'assistant' %}}{mark(second)}{{% else %}}{first}{{% endif %}}"
    marked = LAST_TURN.replace(first, mark(first)).replace(second, others)
    learned = [learned for _, learned in pieces({"messages": THOUGHTS}, characters(marked))]
    assert learned == ["<h>\nx\n</h>cde", "<h>\ny\n</h>gh"]


def test_a_turn_whose_prompt_is_as_long_as_a_row_is_left_out_and_the_others_stay():
    tokenizer = characters(LAST_TURN)
    (piece,) = encode({"messages": THOUGHTS}, tokenizer, 21)
    assert learned_text(tokenizer, *piece) == "<h>\nx\n</h>cd"


def test_a_template_that_does_not_show_the_turns_before_is_refused():
    with pytest.raises(BadRow, match="data:7: the chat template rewrites the turns before an answer: message 1, 'cde'"):
        encode({"messages": CHAT, "where": "data:7"}, characters(FORGETFUL), 100)
