"""The examples of README.md and specdec/README.md run; those of one page share their names, as a reader types them."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("page", ["README.md", "specdec/README.md"])
def test_the_examples_run(page, capsys):
    examples = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    names: dict = {}
    for source in examples:
        exec(compile(source, page, "exec"), names)
    assert examples and capsys.readouterr().out


def test_the_first_page_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 1500
