"""Imports go down only, and a bare install imports without the optional packages: read off the syntax trees.

Files named *_kernel.py hold Triton kernels and are imported inside functions only.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "attention": {"specdec", "medusa", "scripts", "notebooks", "tests"},
    "specdec": {"medusa", "scripts", "notebooks", "tests"},
    "medusa": {"scripts", "notebooks", "tests"},
}
# the wings of specdec, from the top down: a wing imports those of lower lines only
WINGS = (
    {"__main__"},
    {"__init__"},
    {"cli"},
    {"evaluation"},
    {"training", "auditing"},
    {"generation"},
    {"engine"},
    {"rounds", "tiny_dspark", "tiny_eagle3"},
    {"drafters", "report", "tiny_pair"},
    {"requests", "info"},
    {"acceptance", "planning", "model"},
    {"trees", "_guard", "loading"},
    {"sampling", "cuda_graph"},
)
LEVELS = {wing: level for level, wings in enumerate(reversed(WINGS)) for wing in wings}
SIDEWAYS = {("planning", "model"): "planning/costs.py times forwards of a runner"}
OPTIONAL = {
    "triton",
    "matplotlib",
    "scipy",
    "tqdm",
    "accelerate",
    "peft",
    "hypothesis",
    "xgrammar",
    "llguidance",
    "lm_eval",
}
FILES = [
    pytest.param(package, path, id=str(path.relative_to(ROOT)))
    for package in FORBIDDEN
    for path in sorted((ROOT / package).rglob("*.py"))
]


def statements(node: ast.AST, in_functions: bool) -> Iterator[ast.AST]:
    """All nodes below `node`; with `in_functions=False` only those that run when the module is imported."""
    for child in ast.iter_child_nodes(node):
        if in_functions or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from statements(child, in_functions)


def imported(source: str, in_functions: bool = True) -> set[str]:
    """Top-level packages that `source` imports; a relative import counts as "."."""
    found = set()
    for node in statements(ast.parse(source), in_functions):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." if node.level else node.module.split(".")[0])
    return found


@pytest.mark.parametrize(("package", "path"), FILES)
def test_no_import_goes_up(package, path):
    """Relative imports are not used, so that the check by name is complete."""
    assert not imported(path.read_text()) & (FORBIDDEN[package] | {"."})


def wings_above(source: str, wing: str) -> set[str]:
    """The wings of specdec, other than `wing`, that a module of it imports although they are not below it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [f"specdec.{alias.name}" for alias in node.names] if node.module == "specdec" else [node.module]
        else:
            continue
        parts = [module.split(".") for module in modules if module]
        found |= {path[1] if len(path) > 1 else "__init__" for path in parts if path[0] == "specdec"}
    return {other for other in found - {wing} if LEVELS.get(other, len(WINGS)) >= LEVELS[wing]}


def test_no_wing_of_specdec_imports_one_above():
    files = {path: path.relative_to(ROOT / "specdec").parts[0] for path in (ROOT / "specdec").rglob("*.py")}
    wings = {path: part.removesuffix(".py") for path, part in files.items()}
    above = {(wing, other): path for path, wing in wings.items() for other in wings_above(path.read_text(), wing)}
    assert above.keys() == SIDEWAYS.keys(), above


def test_the_scan_of_wings_sees_what_it_should():
    source = """
import specdec.trees.tree
from specdec.rounds.loop import decode
from specdec import generation
def f():
    from specdec.acceptance import greedy
    from attention import UnsupportedArchitecture
"""
    assert wings_above(source, "acceptance") == {"rounds", "generation"}
    assert wings_above(source, "generation") == set()
    assert wings_above(source, "trees") == {"rounds", "generation", "acceptance"}
    assert wings_above("from specdec.model.runner import ModelRunner", "planning") == {"model"}, "not below either"
    assert wings_above("import specdec", "cli") == {"__init__"}
    assert wings_above("from specdec.a_new_wing import x", "cli") == {"a_new_wing"}, "a wing without a place in WINGS"


def kernel_modules(source: str) -> set[str]:
    """The *_kernel modules that `source` imports at its top level."""
    modules = {
        node.module for node in statements(ast.parse(source), in_functions=False) if isinstance(node, ast.ImportFrom)
    }
    modules |= {
        alias.name
        for node in statements(ast.parse(source), in_functions=False)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    return {module for module in modules if module and module.endswith("_kernel")}


@pytest.mark.parametrize(("package", "path"), FILES)
def test_optional_packages_are_imported_only_inside_functions(package, path):
    is_kernel = path.stem.endswith("_kernel")
    assert not imported(path.read_text(), in_functions=False) & (OPTIONAL - ({"triton"} if is_kernel else set()))
    assert is_kernel or not kernel_modules(path.read_text())


def test_every_package_is_scanned():
    assert {parameters.values[0] for parameters in FILES} == set(FORBIDDEN)


def test_the_scan_sees_what_it_should():
    source = """
import triton.language as tl
from specdec.trees.tree import TokenTree
try:
    import scipy
except ImportError:
    scipy = None
class A:
    import tqdm
    def method(self):
        import accelerate
def plot():
    from matplotlib import pyplot
    from . import sibling
"""
    assert imported(source) == {"triton", "specdec", "scipy", "tqdm", "accelerate", "matplotlib", "."}
    assert imported(source, in_functions=False) == {"triton", "specdec", "scipy", "tqdm"}
    kernels = (
        "from attention.flash.forward_kernel import a\nimport attention.paged.attention_kernel\ndef "
        "f():\n    import attention.kv.write_kernel"
    )
    assert kernel_modules(kernels) == {"attention.flash.forward_kernel", "attention.paged.attention_kernel"}


def test_importing_specdec_loads_nothing_that_only_a_model_needs():
    """They take as long as torch and transformers themselves; a model's own class brings most of them later."""
    heavy = ("torch._dynamo", "transformers.modeling_utils", "transformers.quantizers", "scipy", "triton", "matplotlib")
    code = f"import sys, specdec; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
