"""The command line that calibrates heads: what it prints, with the names of its columns, and errors of one line."""

import json
import re
import shutil

import pytest

import medusa.tiny_heads
from medusa import MedusaHeads, load_tree
from medusa.cli.calibrate import tables
from scripts import calibrate_medusa as script
from specdec.loading import load_model
from specdec.planning.costs import Costs
from specdec.tiny_pair import FOLDER


@pytest.fixture
def arguments(tmp_path):
    """A few texts, and the shipped heads in a folder of their own."""
    heads, data = tmp_path / "heads", tmp_path / "data.jsonl"
    heads.mkdir()
    for name in ("config.json", "medusa_lm_head.safetensors"):
        shutil.copy(medusa.tiny_heads.FOLDER / name, heads)
    texts = (f"def function_{n}(value):\n    return value + {n}\n" for n in range(4))
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return dict(model=FOLDER / "target", heads=heads, data=data, nodes=6, length=32, device="cpu")


def run(arguments: dict) -> int:
    """The command line with these options."""
    return script.main([word for name, value in arguments.items() for word in (f"--{name}", str(value))])


def test_what_is_printed_says_what_its_columns_are(arguments, capsys):
    run(arguments)
    lines = capsys.readouterr().out.splitlines()
    tree = load_tree(arguments["heads"])
    kept = json.loads((arguments["heads"] / "tree.json").read_text())
    head = lines.index(next(line for line in lines if line.startswith("head  guesses")))
    assert lines[head - 1].startswith(
        "Share of positions where the head's 1st, 2nd, … choice is the token that follows"
    )
    assert lines[head].split() == [
        "head",
        "guesses",
        *("1st", "2nd", "3rd"),
        *(f"{choice}th" for choice in range(4, 11)),
    ]
    for number, line in enumerate(lines[head + 1 : head + 6]):
        first, place, *shares = line.split()
        assert (first, place) == (str(number), f"+{number + 2}")
        assert [float(share) for share in shares] == pytest.approx(kept["accuracies"][number], abs=6e-4)
    cost = lines.index("tokens  steps")
    assert re.fullmatch(r"Time to verify .* in plain steps of \d+\.\d\d ms each:", lines[cost - 1])
    assert [int(line.split()[0]) for line in lines[cost + 1 : cost + 5]] == kept["costs"]["sizes"] == [1, 2, 4, 6]
    assert "how many tokens a round is expected to give" in lines[-2]
    assert json.loads(lines[-1])["nodes"] == tree.size


def test_every_column_stands_under_its_name():
    lines = tables([[0.5] * 12, [0.25] * 12], Costs(0.0125, 0.0, (1, 128), (1.0, 3.5)))
    head, *rows = lines[1:4]
    assert [match.end() for match in re.finditer(r"\S+", head)] == [
        match.end() for match in re.finditer(r"\S+", rows[0])
    ] and "11th" in head
    assert lines[5:] == [
        "Time to verify so many tokens in one forward, in plain steps of 12.50 ms each:",
        "tokens  steps",
        "     1   1.00",
        "   128   3.50",
    ]


@pytest.mark.parametrize(("change", "said"), [
    ({"nodes": 1}, "--nodes must be at least 2, got 1"),
    ({"rows": 0}, "--rows must be at least 1, got 0"),
    ({"dtype": "nonsense"}, "--dtype must be one of auto, float32, bfloat16, float16, got nonsense"),
    ({"device": "nowhere"}, "device 'nowhere' cannot be used: "),
    ({"heads": "/no/such/folder"}, "--output is needed, since /no/such/folder is no folder here"),
    ({"heads": FOLDER / "target"}, "has no heads in a layout that is known here"),
    ({"model": "/no/such/folder"}, "model directory /no/such/folder does not exist"),
    ({"data": "/no/such.jsonl"}, "--data must be a file, and there is none at /no/such.jsonl"),
])  # fmt: skip
def test_bad_input_is_one_line(arguments, change, said, capsys):
    assert run(arguments | change) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and said in lines[0]


def test_heads_of_another_model_are_noticed(arguments, tmp_path):
    """Of other sizes an error, of other weights a warning."""
    assert run(arguments | {"model": FOLDER / "draft", "tokenizer": FOLDER / "target"}) == 2
    other = load_model(FOLDER / "target")
    other.model.embed_tokens.weight.data.mul_(1.1)
    MedusaHeads.for_model(other, 2, output="shared").save_pretrained(arguments["heads"])
    with pytest.warns(UserWarning, match="heads were made for .*, whose weights differ from those of .*target"):
        run(arguments)
