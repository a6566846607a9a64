"""One thread: the tests' matrices are tiny, and two threads that wait for each other on a busy machine are ten times
slower.

Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before the first kernel is defined.
"""

import gc
import os

import pytest
import torch

gc.disable()  # until all is imported
torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_finish():
    """Let the garbage collector pass over what was imported: a tenth of all time went into looking through it."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items):
    """Tests of one family of models are marked `families`; tests marked `gpu` skip where there is none."""
    for item in items:
        if "family" in getattr(getattr(item, "callspec", None), "params", ()):
            item.add_marker(pytest.mark.families)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
