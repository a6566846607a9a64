"""One pass over pages, by every implementation of paged attention, against the same blocks over dense tensors."""

import pytest
import torch

from attention import PagedKVCache
from attention.gpu import to_device
from attention.paged import api, layer
from attention.paged.batch import build_batch
from specdec.drafters.block.config import BlockConfig
from specdec.drafters.block.dense import block_places
from specdec.drafters.block.module import BlockModel
from specdec.drafters.block.steps import BlockSteps, block_words
from specdec.drafters.network.rotation import Rotation

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LENGTHS = (37, 5)


def network_of(size) -> BlockModel:
    torch.manual_seed(3)
    config = BlockConfig(
        hidden_size=16, target_vocab_size=40, draft_vocab_size=40, target_layers=(0, 1), block_size=size, mask_token=2,
        num_heads=4, num_kv_heads=2, intermediate_size=16, rotation=Rotation(16), num_layers=4, own_embeddings=True,
        output="own", windows=(None, 7, 7, None), causal=(False, False, True, True),
    )  # fmt: skip
    return BlockModel(config).to(DEVICE).eval()


def paged(network, features, anchors):
    """`[A, B, h]`: the pass over pages of 16 tokens."""
    steps, size = BlockSteps(network), network.config.block_size
    cache = PagedKVCache.for_layout(steps.traits.layout, 24, 16, None, dtype=torch.float32, device=DEVICE)
    sequences = [cache.add() for _ in LENGTHS]
    cache.append(sequences, LENGTHS)
    steps.step(anchors, torch.cat(features), True, build_batch(cache, sequences, LENGTHS))
    counts = [size] * len(LENGTHS)
    cache.append(sequences, counts)
    held = build_batch(cache, sequences, counts)
    cache.append(sequences, counts)
    blank = torch.zeros(len(LENGTHS), 2 * size, dtype=torch.int64, device=DEVICE)
    words = blank.new_zeros(len(LENGTHS), 2 * size, -(-2 * size // 64))
    queries = build_batch(cache, sequences, counts, (blank, words))
    return steps.block(network.block_tokens(anchors), held, queries)


CASES = [("reference", 2), ("reference", 40), ("triton", 7)]  # the interpreter is slow


@pytest.mark.parametrize(("impl", "size"), CASES + ([("triton", 40)] if DEVICE.type == "cuda" else []))
@torch.inference_mode()
def test_a_pass_over_pages_is_that_over_dense_tensors(impl, size, monkeypatch):
    """Blocks of two words of bits too; layers with and without windows, in both directions and causal."""
    attend = api.attend
    monkeypatch.setattr(layer, "attend", lambda *given: attend(*given, impl=impl))
    network = network_of(size)
    features = [torch.randn(length, network.config.feature_size).to(DEVICE) for length in LENGTHS]
    anchors = to_device(torch.tensor([5, 11]), DEVICE)
    ours = paged(network, features, anchors)
    for row, length in enumerate(LENGTHS):
        text = anchors.new_zeros(length + 1)
        text[-1] = anchors[row]
        last = torch.tensor([length], device=DEVICE)
        anew = block_places(network, features[row], text, last)[0]
        torch.testing.assert_close(ours[row], anew, atol=2e-5, rtol=1e-4)


def test_each_query_sees_itself_and_the_first_nodes_of_the_others():
    full, causal = block_words(3, torch.device("cpu"))
    assert full[:, 0].tolist() == [0b001110, 0b010101, 0b100011]
    assert causal[:, 0].tolist() == [0b001000, 0b010001, 0b100011]
