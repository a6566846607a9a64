"""The matrix lists every drafter and every acceptance rule of the library, under names and kinds that are right."""

import importlib
import pkgutil
import types
from pathlib import Path

import pytest
import torch

import medusa
import specdec
from specdec import acceptance
from specdec.drafters.assistant import AssistantDrafter
from specdec.generation.generators import SAMPLING
from specdec.sampling.noise import round_noise
from specdec.sampling.processors import name_of
from tests.families import build, noisy_copy
from tests.matrix import DRAFTERS, DRAFTS, RULES, kind_of


def modules():
    """All modules of the library, without kernels, which are no place for a drafter."""
    for package in (specdec, medusa):
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not found.name.endswith(("_kernel", "__main__")):
                yield importlib.import_module(found.name)


def drafter_classes(module) -> set[type]:
    """The classes that `module` defines with the methods of a drafter, protocols left out."""
    classes = [value for value in vars(module).values() if isinstance(value, type)]
    return {
        kind
        for kind in classes
        if kind.__module__ == module.__name__
        and all(callable(getattr(kind, name, None)) for name in ("validate", "start"))
        and not getattr(kind, "_is_protocol", False)
    }


def test_every_drafter_of_the_library_is_in_the_matrix():
    """But an assistant for Gemma 4, which no other target has: tests/specdec/drafters/test_assistant.py."""
    library = set().union(*map(drafter_classes, modules())) - {AssistantDrafter}
    assert {type(make(build("llama"), noisy_copy("llama"))) for make in DRAFTERS.values()} == library


def test_a_new_drafter_would_be_found():
    planted = types.ModuleType("specdec.drafters.planted")
    source = "class Planted:\n    def validate(self, target): ...\n    def start(self, rows, max_tokens): ..."
    exec(source, vars(planted))
    assert [kind.__name__ for kind in drafter_classes(planted)] == ["Planted"]
    assert drafter_classes(importlib.import_module("specdec.drafters.base")) == set(), "protocols are no drafters"


def test_every_rule_of_the_library_is_in_the_matrix():
    """All that `specdec.acceptance` exports, all files there, and all rules that the generators know by name."""
    assert set(acceptance.__all__) - {"Acceptance", "AcceptanceRule"} == RULES.keys()
    files = {path.stem for path in Path(acceptance.__file__).parent.glob("*.py") if not path.stem.endswith("_kernel")}
    listed = {case.rule.__module__.rpartition(".")[2] for case in RULES.values()}
    assert files - {"__init__", "base"} == listed - {"acceptance"}
    assert {case.rule for case in RULES.values() if case.samples} == set(SAMPLING)
    assert all(name == name_of(case.rule) for name, case in RULES.items())


@pytest.mark.parametrize("kind", DRAFTS)
def test_a_draft_is_of_the_kind_that_its_name_says(kind):
    q = torch.tensor([[0.5, 0.3, 0.2]] * 4)
    draft = DRAFTS[kind](q, round_noise(0, range(4), [0] * 4, torch.device("cpu")))
    assert kind_of(draft) == kind and len(draft.tokens) == 4
    if not isinstance(draft.tree, specdec.TokenTree):
        draft.tree.check()
    assert any(kind in case.takes for case in RULES.values())
