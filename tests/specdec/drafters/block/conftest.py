"""A random target of the golden drafters' sizes, and one with the embeddings that they were run with."""

import copy

import pytest

from specdec.model.runner import ModelRunner
from tests.specdec.drafters.eagle3.conftest import runner  # noqa: F401


@pytest.fixture
def lender(runner):  # noqa: F811
    """`lender(expected)`: the target with the embeddings and the output layer of a golden file."""

    def with_tables(expected):
        model = copy.deepcopy(runner.model)
        model.get_input_embeddings().weight.data.copy_(expected["embeddings"])
        if "output" in expected:
            model.get_output_embeddings().weight.data.copy_(expected["output"])
        return ModelRunner(model, mode="eager")

    return with_tables
