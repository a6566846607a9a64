"""What is installed: a wheel with every file, built without a warning; versions that fit the library's open ranges."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = ("attention", "specdec", "medusa")
BUILD = "import sys; from setuptools.build_meta import {call}; {call}(sys.argv[1])"
APART = {"peers", "gptq", "ray", "eval"}  # extras for environments of their own
PYTHONS = ["3.11", "3.12", "3.13", "3.14"]

every_file = pytest.mark.parametrize(
    "path", sorted((ROOT / ".ci/constraints").glob("*.txt")), ids=lambda path: path.stem
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A copy of what a build reads."""
    folder = tmp_path_factory.mktemp("sources")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.mark.parametrize("call", ["build_wheel", "build_editable"])
def test_a_build_says_nothing_and_a_wheel_holds_every_file(call, sources, tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    environment = os.environ | {"PYTHONWARNINGS": "ignore:Editable installation"}  # as the Makefile does
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # a build says that it heeds it
    command = [sys.executable, "-c", BUILD.format(call=call), str(tmp_path)]
    run = subprocess.run(command, cwd=sources, env=environment, capture_output=True, text=True)
    assert run.returncode == 0 and not re.search("warning|deprecat", run.stderr, re.IGNORECASE), run.stderr
    if call == "build_wheel":
        (wheel,) = tmp_path.glob("*.whl")
        held = {name for name in zipfile.ZipFile(wheel).namelist() if name.split("/")[0] in PACKAGES}
        files = [path for name in PACKAGES for path in (sources / name).rglob("*") if path.is_file()]
        assert held == {str(path.relative_to(sources)) for path in files}


def versions(path: Path) -> dict[str, str]:
    """Package -> exact version; every line of a file of versions is one, or a comment."""
    lines = [line.split(";")[0].strip() for line in path.read_text().splitlines() if not line.startswith("#")]
    return dict(line.split("==") for line in lines)


def requirements() -> list[Requirement]:
    """Of the library and all extras but those for environments of their own."""
    extras = {name: lines for name, lines in PROJECT["optional-dependencies"].items() if name not in APART}
    groups = (PROJECT["dependencies"], *extras.values())
    return [Requirement(line) for lines in groups for line in lines]


@every_file
def test_tested_versions_lie_in_the_librarys_ranges_and_name_everything(path):
    pinned = versions(path)
    assert {"pip", "setuptools"} <= pinned.keys()
    assert not [r for r in requirements() if not r.specifier.contains(pinned[r.name])]


def test_the_files_of_versions_are_made_for_all_extras_but_those_apart():
    (line,) = re.findall(r"^EXTRAS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {*line.split(), *APART} == PROJECT["optional-dependencies"].keys()


@every_file
def test_which_cuda_packages_a_torch_takes_is_left_to_torch(path):
    """It says so itself, exactly, and a build for the CPU takes none."""
    assert not [name for name in versions(path) if name.startswith(("nvidia", "cuda"))]


def test_the_oldest_versions_are_the_lower_ends_of_the_ranges():
    oldest = versions(ROOT / ".ci/constraints/oldest.txt")
    for requirement in requirements():
        if requirement.name in ("torch", "transformers"):
            (lowest,) = [s.version for s in requirement.specifier if s.operator == ">="]
            assert oldest[requirement.name].removesuffix(".0") == lowest


def test_the_same_pythons_everywhere():
    assert [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if ":: Python :: 3." in line] == PYTHONS
    assert PROJECT["requires-python"] == f">={PYTHONS[0]}"
    makefile, readme = (ROOT / "Makefile").read_text(), (ROOT / "README.md").read_text()
    assert all(f"python{version}" in makefile for version in PYTHONS)
    assert "(3, 11) <= sys.version_info[:2] <= (3, 14)" in makefile and "Python 3.11 to 3.14" in readme
