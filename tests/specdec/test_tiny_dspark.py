"""The shipped DSpark drafter: right for the shipped target, small, and as good as its record says."""

import torch
from safetensors import safe_open

import specdec
from specdec.drafters.block.drafter import BlockDrafter
from specdec.drafters.block.growth import Growth
from specdec.tiny_dspark import FOLDER, load_tiny_dspark, tiny_drafter
from tests.specdec.test_tiny_eagle3 import require_exact, require_recorded


def test_greedy_text_is_the_targets_and_comes_in_as_many_rounds_as_recorded():
    pair = specdec.load_tiny_pair()
    runner = specdec.ModelRunner(pair.target)
    network = load_tiny_dspark(runner)
    shapes = [BlockDrafter(network, confidence=0.5), BlockDrafter(network, growth=Growth(25, 5))]
    require_exact(pair, runner, [tiny_drafter(runner), *shapes])
    require_recorded(pair, runner, BlockDrafter(network, 5), FOLDER, "DSpark, chain of 5")


def test_it_is_small_and_stored_in_16_bits():
    assert (FOLDER / "model.safetensors").stat().st_size < 3e6
    with safe_open(FOLDER / "model.safetensors", "pt") as weights:
        assert weights.get_tensor("fc.weight").dtype == torch.bfloat16
    config = load_tiny_dspark(specdec.ModelRunner(specdec.load_tiny_pair().target)).config
    assert (config.markov, config.confidence, config.from_anchor) == ("vanilla", "markov", True)
