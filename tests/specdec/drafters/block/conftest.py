"""A random target of the golden drafters' sizes, one with the embeddings that they were run with, files to spoil."""

import copy
import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from specdec.drafters.block.loading import load_block
from specdec.model.runner import ModelRunner
from tests.specdec.drafters.block.test_golden import FOLDERS
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


class Files:
    """A copy of a golden folder that a test may spoil."""

    def __init__(self, name, folder):
        shutil.copytree(FOLDERS[name], folder, dirs_exist_ok=True)
        self.folder, self.config = folder, json.loads((folder / "config.json").read_text())
        self.weights = load_file(folder / "model.safetensors")

    def write(self):
        (self.folder / "config.json").write_text(json.dumps(self.config))
        weights = {name: weight.contiguous() for name, weight in self.weights.items()}
        save_file(weights, self.folder / "model.safetensors")
        return self.folder

    def flat(self, **fields):
        """Turn it into a file of z-lab, or of DeepSpec."""
        names = ("selector_rank", "selector_top_k", "conv_kernel_size", "conv_group_size", "markov_rank",
                  "markov_head_type", "enable_confidence_head", "confidence_head_with_markov",
                 "block_size", "mask_token_id", "draft_vocab_size")  # fmt: skip
        kept = {name: self.config[name] for name in names if name in self.config}
        ids = [index - 1 for index in self.config["aux_hidden_state_layer_ids"]]
        architecture = "Qwen3DSparkModel" if "markov_rank" in kept else "DFlashDraftModel"
        architecture = "DFlash2DraftModel" if "selector_rank" in kept else architecture
        self.config = self.config["transformer_layer_config"] | kept | dict(
            architectures=[architecture], model_type="qwen3", num_target_layers=8, target_layer_ids=ids
        )  # fmt: skip
        if architecture != "Qwen3DSparkModel":
            inside = ("block_size", "mask_token_id", "target_layer_ids")
            self.config["dflash_config"] = {name: self.config.pop(name) for name in inside}
        self.config |= fields
        return self


@pytest.fixture
def files(tmp_path):
    return lambda name="dspark": Files(name, tmp_path)


def refuses(runner, files, match, **options):  # noqa: F811
    with pytest.raises(ValueError, match=match):
        load_block(runner, files.write(), **options)
