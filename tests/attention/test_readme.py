"""The examples of attention/README.md run, and import from the package itself only."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "attention" / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.parametrize("source", EXAMPLES, ids=["paged", "flash"])
def test_an_example_runs(source):
    assert "from attention." not in source and "import attention." not in source
    exec(compile(source, str(README), "exec"), {})
