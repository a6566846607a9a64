"""Imports go down only, and a bare install imports without the optional packages: read off the syntax trees.

Files named *_kernel.py hold Triton kernels and are imported inside functions only.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "attention": {"specdec", "medusa", "scripts", "notebooks", "tests"},
    "specdec": {"medusa", "scripts", "notebooks", "tests"},
    "medusa": {"scripts", "notebooks", "tests"},
}
OPTIONAL = {"triton", "matplotlib", "scipy", "tqdm", "accelerate", "peft", "hypothesis", "xgrammar", "llguidance"}
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
