import random
import re

import pytest
from transformers import AutoTokenizer

from specdec.report.stats import RoundStats
from specdec.report.terminal import BLUE, GREEN, authors, coloured, table
from specdec.tiny_pair import FOLDER

T, D = False, True
ANSI = re.compile(r"\x1b\[\d+m")
TEXT = "def f(a , b) :\n\treturn 'x' + str(1234) # it 's done . \n"


class Letters:
    """A tokenizer of one letter a token."""

    def decode(self, tokens):
        return "".join(map(chr, tokens))


def stats(accepted, emitted):
    return RoundStats(tuple(3 for _ in accepted), tuple(accepted), tuple(emitted), tuple(0.1 for _ in accepted))


def ids(text):
    return [ord(c) for c in text]


def test_authors_by_hand():
    rounds = stats((2, 0, 3), (3, 1, 4))
    written = [D, D, T, T, D, D, D, T]
    assert authors(rounds, 8) == written
    assert authors(rounds, 6) == written[:6]  # cut where the row ended
    assert authors(stats((2,), (2,)), 2) == [D, D]  # ended on an accepted token: the target added none
    assert authors(stats((0, 0), (1, 1)), 2) == [T, T]
    assert authors(stats((), ()), 0) == []


def test_colours_by_hand():
    shown = coloured(Letters(), "ab", ids("cdef"), [T, D, D, T])
    assert shown.startswith("\x1b[2mab\x1b[0m")
    assert shown[len("\x1b[2mab\x1b[0m") :] == f"{BLUE}c\x1b[0m{GREEN}de\x1b[0m{BLUE}f\x1b[0m"


@pytest.mark.parametrize("seed", range(5))
def test_without_its_colours_the_text_is_the_plain_text(seed):
    rng = random.Random(seed)
    drafted = [rng.random() < 0.5 for _ in TEXT]
    plain = coloured(Letters(), "prompt: ", ids(TEXT), drafted, colour=False)
    shown = coloured(Letters(), "prompt: ", ids(TEXT), drafted)
    assert plain == "prompt: " + TEXT and "\x1b" not in plain
    assert ANSI.sub("", shown) == plain
    assert shown.count(GREEN) + shown.count(BLUE) == 1 + sum(a != b for a, b in zip(drafted, drafted[1:], strict=False))


def test_a_prompt_alone_is_shown_alone():
    assert ANSI.sub("", coloured(Letters(), "ab", [], [])) == coloured(Letters(), "ab", [], [], colour=False) == "ab"


def test_a_real_tokenizer_keeps_spaces_and_punctuation_when_cut_into_runs():
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "target")
    tokens = tokenizer(TEXT).input_ids
    drafted = [i % 3 == 0 for i in range(len(tokens))]
    assert (
        ANSI.sub("", coloured(tokenizer, "p", tokens, drafted))
        == coloured(tokenizer, "p", tokens, drafted, colour=False)
        == "p" + TEXT
    )


def test_a_table_is_aligned():
    lines = table(["method", "α"], [["plain", "1.00"], ["speculative", "10.25"]]).split("\n")
    assert lines == ["method           α", "-----------  -----", "plain         1.00", "speculative  10.25"]
    assert len({len(line) for line in lines}) == 1


def test_a_table_without_rows_is_its_header_and_ragged_rows_are_refused():
    assert table(["a", "bc"], []) == "a  bc\n-  --"
    with pytest.raises((ValueError, IndexError)):
        table(["a", "b"], [["x"]])
