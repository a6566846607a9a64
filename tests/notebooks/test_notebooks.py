"""Every notebook runs from top to bottom on a CPU, and what is committed is the output of such a run."""

import ast
import base64
import io
import os
import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")
pytest.importorskip("triton", minversion="3.7.1", reason="the interpreter of older ones fails with numpy 2.4 and newer")

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SECONDS = 600  # of a cell, which then hangs
AT_THE_END = """
import attention, matplotlib, torch
assert not torch.cuda.is_initialized() and not torch.cuda.is_available(), "the notebook used a GPU"
print("from", attention.__file__)
"""

notebooks = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def run(notebook, folder, tmp_path):
    """Execute `notebook` in place in a fresh kernel that starts in `folder`; raises CellExecutionError where a cell
    does.
    """
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES", "PYTHONPATH")
    }
    environment["IPYTHONDIR"] = str(tmp_path)  # nobody's profile
    nbclient.NotebookClient(notebook, timeout=SECONDS, resources={"metadata": {"path": str(folder)}}).execute(
        env=environment
    )
    return notebook


def has_output(source):
    """Whether a cell prints, displays or draws when it runs: calls inside functions that it only defines do not
    count.
    """
    waiting, names = list(ast.parse(source).body), set()
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.Call):
            names.add(node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", None))
        waiting += ast.iter_child_nodes(node)
    return bool(names & {"print", "display", "subplots", "figure", "show"})


def texts(notebook):
    """Everything that the committed outputs say."""
    for cell in code_cells(notebook):
        for output in cell.outputs:
            yield output.get("text", "")
            yield from (text for kind, text in output.get("data", {}).items() if kind.startswith("text/"))


def test_there_are_notebooks():
    names = {path.stem for path in NOTEBOOKS}
    learned = {"chats_to_speed", "learned_drafters", "medusa"}
    others = {"attention_and_kv_cache", "comparing_methods", "serving", "speculative_decoding", "trees_and_acceptance"}
    assert names >= learned | others


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("print(1)", True),
        ("for i in x:\n    display(i)", True),
        ("figure, axes = plt.subplots()", True),
        ("tree.plot()\nplt.show()", True),
        ("def f():\n    print(1)", False),
        ("x = 1", False),
    ],
)
def test_output_is_expected_where_a_cell_makes_some(source, expected):
    assert has_output(source) == expected


# what torchao makes PyTorch say on import; transformers imports it where it is installed
OF_TORCHAO = "torch/utils/_pytree.py", "torchao/_C"


@pytest.mark.notebook
@notebooks
def test_runs_on_a_cpu_without_an_error(path, tmp_path):
    """In the folder of the notebook, as Jupyter does; the file itself stays as it is."""
    before = path.read_bytes()
    notebook = read(path)
    notebook.cells.append(nbformat.v4.new_code_cell(AT_THE_END))
    run(notebook, path.parent, tmp_path)
    assert f"from {ROOT / 'attention'}" in notebook.cells[-1].outputs[0].text
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    told = [line for output in outputs if output.get("name") == "stderr" for line in output["text"].splitlines()]
    assert not [line for line in told if not any(name in line for name in OF_TORCHAO)]
    assert path.read_bytes() == before


def test_finds_the_library_from_the_root(tmp_path):
    """One notebook; the others look for it in the same way, from their own folder, in the test above."""
    path = ROOT / "notebooks" / "medusa.ipynb"
    notebook = read(path)
    notebook.cells = [*code_cells(notebook)[:3], nbformat.v4.new_code_cell(AT_THE_END)]
    run(notebook, ROOT, tmp_path)
    assert f"from {ROOT / 'attention'}" in notebook.cells[-1].outputs[0].text


@notebooks
def test_committed_outputs_are_those_of_one_whole_run(path):
    notebook = read(path)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert bool(cell.outputs) == has_output(cell.source), cell.source
        assert all(output.output_type != "error" and output.get("name") != "stderr" for output in cell.outputs), (
            cell.source
        )
    assert notebook.metadata.kernelspec.name == "python3"


def pictures(notebook):
    """The committed PNGs, as bytes."""
    outputs = [output.get("data", {}) for cell in code_cells(notebook) for output in cell.outputs]
    return [base64.b64decode(data["image/png"]) for data in outputs if "image/png" in data]


@notebooks
def test_committed_outputs_are_small_and_name_no_machine(path):
    notebook = read(path)
    assert path.stat().st_size < 1_000_000
    assert pictures(notebook) and max(map(len, pictures(notebook))) < 150_000
    assert not [
        text for text in texts(notebook) if re.search(r"site-packages|ipykernel_\d|/(home|root|tmp|work|Users)/", text)
    ]


@notebooks
def test_pictures_have_120_dots_an_inch(path):
    for picture in pictures(read(path)):
        assert min(Image.open(io.BytesIO(picture)).info["dpi"]) > 119.9  # a PNG stores dots a metre


@notebooks
def test_a_code_cell_has_at_most_15_lines(path):
    lengths = {cell.source.splitlines()[0]: len(cell.source.splitlines()) for cell in code_cells(read(path))}
    assert {first: lines for first, lines in lengths.items() if lines > 15} == {}


PATH_SURGERY = re.compile(r"sys\s*\.\s*path|from sys import|PYTHONPATH|chdir|addsitedir|^\s*[%!]", re.MULTILINE)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import sys\nsys.path.insert(0, '..')", True),
        ("from sys import path", True),
        ("os.chdir('..')", True),
        ("site.addsitedir('..')", True),
        ("os.environ['PYTHONPATH'] = '..'", True),
        ("%cd ..", True),
        ("  !pip install specdec-lab", True),
        ("remainder = 5 % 3\nok = remainder != 2\nfolder = tree.path(7)", False),
    ],
)
def test_the_search_for_path_surgery_sees_what_it_should(source, found):
    assert bool(PATH_SURGERY.search(source)) == found


@notebooks
def test_no_code_cell_changes_where_modules_come_from(path):
    """Notebooks run on the installed library."""
    assert [cell.source for cell in code_cells(read(path)) if PATH_SURGERY.search(cell.source)] == []
