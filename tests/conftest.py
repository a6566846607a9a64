"""One thread: the tests' matrices are tiny, and two threads that wait for each other on a busy machine are ten times
slower.

Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before the first kernel is defined.
"""

import gc
import os
import random
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
gc.disable()  # until all is imported
torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_finish():
    """Let the garbage collector pass over what was imported: a tenth of all time went into looking through it."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(2_000, 10, 100)  # looking through what tests make took a twelfth of all time
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def plain_steps_timed_once():
    """Generators time a plain step for their statistics, of which no test needs a median: that took a twentieth of all
    time."""
    from specdec.planning import step_clock  # only now, as TRITON_INTERPRET must be set before

    step_clock.REPEATS = 1


LONGEST = (  # files of over half a minute each, which must not begin when all others are done
    "specdec/drafters/test_every_drafter.py", "specdec/rounds/test_captured.py",
    "attention/paged/test_attention_kernel.py", "specdec/engine/test_windows.py",
    "specdec/drafters/test_other_models.py", "specdec/engine/test_captured.py", "specdec/engine/test_gaps.py",
    "specdec/generation/test_generators.py", "specdec/generation/test_constrained.py",
    "medusa/cli/test_train_runs.py", "specdec/sampling/test_warped.py",
    "specdec/model/fusion/quantised/test_linear.py", "scripts/test_bench_generate.py",
    "specdec/engine/test_many_requests.py", "specdec/engine/test_engine.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """The longest files come first. Tests of one family of models are marked `families`, those of scripts `scripts`,
    of tests marked `covering` those that `covering` leaves out `thorough`; tests marked `gpu` skip where there is none.
    """
    place = {HERE / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))
    crossed = defaultdict(list)
    for item in items:
        if "family" in getattr(getattr(item, "callspec", None), "params", ()):
            item.add_marker(pytest.mark.families)
        elif item.get_closest_marker("covering"):
            crossed[item.path, item.originalname].append(item)
        if item.path.is_relative_to(HERE / "scripts"):
            item.add_marker(pytest.mark.scripts)
    for (_, name), cases in crossed.items():
        count = cases[0].get_closest_marker("covering").kwargs.get("cases")
        kept = covering([values_of(item) for item in cases]) if count is None else some_of(name, len(cases), count)
        for number in set(range(len(cases))) - kept:
            cases[number].add_marker(pytest.mark.thorough)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def values_of(item):
    """What a test is called with: arguments that are given together are one value, of which the object counts."""
    given = item.callspec.params
    together = [tuple(name.strip() for name in names.split(",")) if isinstance(names, str) else tuple(names)
                for names in (mark.args[0] for mark in item.iter_markers("parametrize"))]  # fmt: skip
    alone = [(name,) for name in given if not any(name in names for names in together)]  # of fixtures
    return {(names, tuple(id(given[name]) for name in names)) for names in together + alone}


def covering(values):
    """The places of a few cases, in which every one of their `values` occurs, about equally often.

    Which ones is drawn with a fixed seed, so that no two arguments go in step."""
    left, used, kept = set().union(*values), Counter(), set()
    order = random.Random(len(values)).sample(range(len(values)), len(values))
    while left:
        best = max(order, key=lambda place: (len(values[place] & left), -sum(used[value] for value in values[place])))
        kept.add(best)
        used.update(values[best])
        left -= values[best]
    return kept


def some_of(name, cases, count):
    """`count` places of so many cases. They follow from the test's name, so that other tests keep other cases."""
    return set(random.Random(name).sample(range(cases), min(count, cases)))
