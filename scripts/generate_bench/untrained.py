"""Learned drafters with random weights for a target's shape: what their rounds take, whatever they would draft."""

import torch

from specdec.drafters.block.config import BlockConfig
from specdec.drafters.block.drafter import BlockDrafter
from specdec.drafters.block.growth import Growth
from specdec.drafters.block.module import BlockModel
from specdec.drafters.eagle3.config import Eagle3Config
from specdec.drafters.eagle3.drafter import Eagle3Drafter
from specdec.drafters.eagle3.module import Eagle3Model
from specdec.training.network import layer_fields

EAGLE3, GROWN, DRAFT_VOCABULARY = "eagle3", (60, 6, 10), 32_000  # nodes, depth and width of its trees; its tokens
BLOCK_SIZE, RANK = 7, 256  # of DSpark drafters, all of whose places predict
BLOCKS = {"dspark": (5, 64), "dspark-16": (5, 16), "dspark-one-layer": (1, 64)}  # layers, and rows that are verified


def untrained_eagle3(target) -> Eagle3Drafter:
    """An EAGLE-3 drafter of one layer like the target's, and dynamic trees of GROWN."""
    config = target.config.get_text_config()
    size, count = min(DRAFT_VOCABULARY, config.vocab_size), config.num_hidden_layers
    tokens = torch.arange(size, device=target.device)
    shape = Eagle3Config(
        **layer_fields(target, tokens, {}), target_hidden_size=config.hidden_size,
        target_layers=(min(2, count), count // 2, max(count - 3, 0)),
    )  # fmt: skip
    with torch.device(target.device):
        network = Eagle3Model(shape, tokens).to(target.dtype).requires_grad_(False)
    network.borrow(target.get_input_embeddings(), target.get_output_embeddings())
    width = GROWN[2] if size > GROWN[2] else 2
    return Eagle3Drafter(network, dynamic=(*GROWN[:2], width))


def untrained_dspark(kind: str, target) -> BlockDrafter:
    """A DSpark drafter of BLOCKS over the target's whole vocabulary, and best-first trees of its conditionals.

    The last token of the text is verified too: a tree of 64 rows drafts 63 tokens."""
    layers, verified = BLOCKS[kind]
    config = target.config.get_text_config()
    count, vocabulary = config.num_hidden_layers, config.vocab_size
    read = sorted({max(1, count * (index + 1) // 7) for index in range(5)})
    shape = BlockConfig(
        **layer_fields(target, None, {}), num_layers=layers, target_layers=tuple(read), block_size=BLOCK_SIZE,
        mask_token=vocabulary - 1, from_anchor=True, markov="vanilla", markov_rank=RANK,
    )  # fmt: skip
    with torch.device(target.device):
        network = BlockModel(shape).to(target.dtype).requires_grad_(False)
    network.borrow(target.get_input_embeddings(), target.get_output_embeddings())
    return BlockDrafter(network, growth=Growth.fast(verified - 1, BLOCK_SIZE))
