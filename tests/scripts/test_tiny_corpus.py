import ast
import random
import re

import pytest

from scripts.common.tiny_corpus import (
    EDIT_MARK,
    HELD_OUT,
    MAX_FILE_BYTES,
    build_prompts,
    edit_documents,
    edit_example,
    functions_of,
    is_held_out,
    load_corpus,
)

FUNCTION = '''def total(items, item_total, subtotal):
    """Add the items, item by item; items are numbers."""
    subtotal = 0
    for item in items:
        subtotal += item.items + item_total
        my_items = other.items_of(item)
    return subtotal, "items", my_items
'''


def body(seed, lines=12):
    """A little module of distinct lines, well over the 100 characters below which a file is left out."""
    return "".join(f"value_{seed}_{i} = {seed * 1000 + i}\n" for i in range(lines))


@pytest.fixture
def stdlib(tmp_path):
    """A small standard library: two held-out files, two for training."""
    for seed, name in enumerate(["argparse.py", "json/decoder.py", "abc.py", "json/tool.py"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(body(seed))
    return tmp_path


def names(files):
    return [name for name, _ in files]


def test_held_out_files_are_split_off_and_everything_is_sorted(stdlib):
    train, held_out = load_corpus(stdlib)
    assert names(train) == ["abc.py", "json/tool.py"] and names(held_out) == ["argparse.py", "json/decoder.py"]
    assert dict(train)["abc.py"] == body(2) and dict(held_out)["json/decoder.py"] == body(1)
    assert load_corpus(str(stdlib)) == (train, held_out)


def test_only_the_whole_relative_path_holds_a_file_out(stdlib):
    (stdlib / "mine").mkdir()
    (stdlib / "mine" / "argparse.py").write_text(body(7))
    assert "mine/argparse.py" in names(load_corpus(stdlib)[0])


def test_duplicates_appear_once_and_never_on_both_sides(stdlib):
    (stdlib / "zzz.py").write_text(body(2))  # of abc.py
    (stdlib / "sub").mkdir()
    (stdlib / "sub" / "copy.py").write_text(body(0))  # of the held-out argparse.py
    train, held_out = load_corpus(stdlib)
    texts = [text for _, text in train + held_out]
    assert len(set(texts)) == len(texts) == 4
    assert names(train) == ["abc.py", "json/tool.py"] and names(held_out) == ["argparse.py", "json/decoder.py"]


@pytest.mark.parametrize(("size", "kept"), [(MAX_FILE_BYTES, True), (MAX_FILE_BYTES + 1, False)])
def test_large_files_are_left_out(stdlib, size, kept):
    (stdlib / "large.py").write_text("#" * (size - 1) + "\n")
    assert ("large.py" in names(load_corpus(stdlib)[0])) is kept


@pytest.mark.parametrize("name", ["site-packages/x.py", "__pycache__/x.py", "lib2to3/x.py", "x.txt"])
def test_other_peoples_and_generated_files_are_left_out(stdlib, name):
    (stdlib / name).parent.mkdir(exist_ok=True)
    (stdlib / name).write_text(body(9))
    assert names(load_corpus(stdlib)[0]) == ["abc.py", "json/tool.py"]


def test_undecodable_and_tiny_files_are_left_out_and_tabs_expanded(stdlib):
    (stdlib / "latin.py").write_bytes(b"# caf\xe9\n" * 50)
    (stdlib / "tiny.py").write_text("x = 1\n")
    (stdlib / "tabs.py").write_text("if 1:\n\tx = 2\n" * 20)
    train, _ = load_corpus(stdlib)
    assert names(train) == ["abc.py", "json/tool.py", "tabs.py"]
    assert dict(train)["tabs.py"].startswith("if 1:\n    x = 2\n") and "\t" not in dict(train)["tabs.py"]


@pytest.mark.parametrize("keep", [[], ["argparse.py"], ["abc.py"]])
def test_a_folder_without_both_sides_is_an_error_that_names_it(stdlib, keep):
    for path in stdlib.rglob("*.py"):
        if path.name not in keep:
            path.unlink()
    with pytest.raises(FileNotFoundError, match=str(stdlib)):
        load_corpus(stdlib)


def test_held_out_modules_are_listed_once():
    assert len(set(HELD_OUT)) == len(HELD_OUT) and all(name.endswith(".py") for name in HELD_OUT)


def test_functions_are_dedented_and_parse():
    text = (
        "import os\n\n\nclass A:\n    def f(self):\n        def g():\n            return 1\n\n        "
        "return g\n\n\ndef h(x):\n    return x\n"
    )
    assert sorted(functions_of(text)) == [
        "def f(self):\n    def g():\n        return 1\n\n    return g\n",
        "def g():\n    return 1\n",
        "def h(x):\n    return x\n",
    ]
    assert list(functions_of("def broken(:\n")) == list(functions_of("a\0b")) == []


@pytest.mark.parametrize("seed", range(40))
def test_an_edit_renames_whole_words_everywhere_and_nothing_else(seed):
    prompt, answer = edit_example(FUNCTION, random.Random(seed))
    assert prompt.startswith(FUNCTION)
    old, new = re.fullmatch(rf"\n{re.escape(EDIT_MARK)}(\w+) -> (\w+)", prompt[len(FUNCTION) :]).groups()
    before, after = re.split(r"(\w+)", FUNCTION), re.split(r"(\w+)", answer.removeprefix("\n"))
    assert old != new and before.count(old) >= 2
    assert after == [new if word == old else word for word in before]
    ast.parse(answer)


def test_an_edit_covers_every_repeated_name_and_no_other():
    asked = {
        edit_example(FUNCTION, random.Random(seed))[0].rsplit(EDIT_MARK)[1].split(" -> ")[0] for seed in range(200)
    }
    assert asked == {"items", "item", "item_total", "subtotal", "my_items"}


@pytest.mark.parametrize(
    "function", ["def f():\n    pass\n", "def f(self):\n    return self.ab + self.ab\n", "return return for for\n"]
)
def test_without_a_repeated_name_there_is_no_edit(function):
    assert edit_example(function, random.Random(0)) is None


def held_out_file(i):
    """A module with a docstring, a function to complete, a function to edit and a table."""
    prose = "\n".join(f"Sentence {k} of module {i} says something quite long about nothing at all." for k in range(10))
    code = (
        f"def compute_{i}(first, second):\n"
        + "".join(f"    step_{k} = first * {k} + second - {i}\n" for k in range(20))
        + "    return step_19\n"
    )
    edit = f"def change_{i}(alpha_value, beta_value):\n" + "".join(
        f"    print(alpha_value + {k}, beta_value - {i})\n" for k in range(10)
    )
    data = "TABLE = [\n" + "".join(f"    ({k}, {i * k}, 'entry {i} {k}'),\n" for k in range(30)) + "]\n"
    return f'"""{prose}\n"""\n\n\n{code}\n\n{edit}\n\n{data}'


def test_edit_documents_are_deterministic_and_near_their_share():
    files = [(f"m{i}.py", held_out_file(i)) for i in range(20)]
    documents = edit_documents(files, seed=1, share=0.05)
    assert documents == edit_documents(files, seed=1, share=0.05) != edit_documents(files, seed=2, share=0.05)
    budget = 0.05 * sum(len(text) for _, text in files)
    assert 0 < sum(map(len, documents)) - budget + max(map(len, documents)) <= 2 * max(map(len, documents))
    assert all(EDIT_MARK in document for document in documents) and edit_documents(files, share=0.0) == []


def test_prompts_are_deterministic_distinct_and_from_the_files_given():
    files = [
        (name, "\n\n".join(held_out_file(i + 4 * part) for part in range(3))) for i, name in enumerate(HELD_OUT[:4])
    ]
    random.seed(1)
    prompts = build_prompts(files, per_kind=4, seed=5)
    random.seed(2)  # the global generator has no say
    assert build_prompts(files, per_kind=4, seed=5) == prompts != build_prompts(files, per_kind=4, seed=6)
    assert list(prompts) == ["code", "prose", "data", "editing"]
    for kind, entries in prompts.items():
        assert len(entries) == 4 and {entry["source"] for entry in entries} == set(
            HELD_OUT[:4]
        )  # one of each file before a second of any
        for entry in entries:
            start = entry["text"].split(f"\n{EDIT_MARK}")[0].removeprefix('"""').rstrip("\n")
            assert start in dict(files)[entry["source"]], kind
            assert (EDIT_MARK in entry["text"]) is (kind == "editing")


def test_more_prompts_than_files_take_several_from_a_file():
    files = [("argparse.py", "\n\n".join(held_out_file(i) for i in range(6)))]
    assert len(build_prompts(files, per_kind=4, kinds=("code",))["code"]) == 4


def test_tests_give_no_code_and_no_prose():
    files = [(f"test/test_{i}.py", held_out_file(i)) for i in range(4)]
    for kind in ("code", "prose"):
        with pytest.raises(ValueError, match=f"only 0 of 1 {kind} prompts"):
            build_prompts(files, per_kind=1, kinds=(kind,))
    assert set(build_prompts(files, per_kind=2, kinds=("data", "editing"))) == {"data", "editing"}


@pytest.mark.parametrize("kind", ["code", "prose", "data", "editing"])
def test_too_few_prompts_are_an_error_with_the_numbers(kind):
    with pytest.raises(ValueError, match=f"only 0 of 8 {kind} prompts could be made from 1 held-out files"):
        build_prompts([("argparse.py", "x = 1\n")], kinds=(kind,))
    with pytest.raises(ValueError, match=f"only 1 of 2 {kind} prompts could be made from 1 held-out files"):
        build_prompts([("argparse.py", held_out_file(0))], per_kind=2, kinds=(kind,))
    assert len(build_prompts([("argparse.py", held_out_file(0))], per_kind=2, kinds=(kind,), or_fewer=True)[kind]) == 1
    with pytest.raises(ValueError, match=f"only 0 of 2 {kind} prompts"):
        build_prompts([("argparse.py", "x = 1\n")], per_kind=2, kinds=(kind,), or_fewer=True)


def test_a_package_that_replaced_a_held_out_module_is_held_out_too():
    """zipfile.py became zipfile/ in Python 3.12, and its tests with it."""
    assert (
        is_held_out("zipfile.py")
        and is_held_out("zipfile/_path/glob.py")
        and is_held_out("test/test_zipfile/test_core.py")
    )
    assert not is_held_out("zipimport.py") and not is_held_out("json/__init__.py")
