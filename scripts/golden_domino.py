"""Tiny random Domino drafters, written and run by SpecForge's own classes, for the tests of our loader.

    python -m scripts.golden_domino tests/specdec/drafters/block/golden_specforge

needs an environment with specforge 0.2.0 (`pip install --no-deps specforge==0.2.0` is enough), torch and transformers.
Each folder gets config.json and model.safetensors as the library saves them, and `expected.safetensors`: what the
forward of its trainer in float64 makes of random features and tokens, and the target's embeddings and output layer,
which it reads. Weights are bfloat16, so that float32 and float64 begin with the same numbers."""

from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn

from scripts.common.golden import SIZES, Kind, write_all

TOKENS, BLOCK, ANCHORS, MASK = 14, 4, (1, 5, 9), 7
KINDS = {
    "domino": dict(emb_dim=6, gru_hidden_dim=10, pure_draft_prefix_len=1),
    "domino_shifted": dict(emb_dim=6, gru_hidden_dim=10, shift_label=True),
}


def new_model(name: str):
    """The library's own model of a kind."""
    from specforge.modeling.draft.domino import DominoDraftModel
    from transformers import Qwen3Config

    block = dict(projector_type="domino", mask_token_id=MASK, target_layer_ids=[1, 3, 4]) | KINDS[name]
    config = Qwen3Config(
        **SIZES, num_hidden_layers=2, layer_types=["full_attention"] * 2, num_target_layers=8, block_size=BLOCK,
        dflash_config=block, attn_implementation="eager",
    )  # fmt: skip
    return DominoDraftModel(config)


def saved_model(make_model, folder: Path):
    """What the library reads from a folder, in float64 and with dense attention."""
    return make_model.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()


@torch.no_grad()
def run(model, seed: int) -> dict[str, Tensor]:
    """The inputs of its trainer's forward, and the logits `[M, K, V]` of the slots scored after the text's tokens."""
    from specforge.algorithms.common.dflash_family_model import OnlineDominoModel

    torch.manual_seed(seed)
    vocab, hidden = model.config.vocab_size, model.config.hidden_size
    rounded = lambda *shape: torch.randn(*shape).to(torch.bfloat16).double()
    output, embeddings = nn.Linear(hidden, vocab, bias=False), nn.Embedding(vocab, hidden)
    output.weight.data, embeddings.weight.data = rounded(vocab, hidden), rounded(vocab, hidden)
    features, tokens = rounded(1, TOKENS, model.fc.in_features), torch.randint(vocab, (1, TOKENS))
    trainer = OnlineDominoModel(
        model, output, embeddings, MASK, BLOCK, attention_backend="eager", shift_label=model.shift_label
    )
    anchors, first = torch.tensor([ANCHORS]), 0 if model.shift_label else 1
    with patch.object(trainer, "_sample_anchor_positions", lambda *given: (anchors, torch.ones_like(anchors) > 0)):
        _, _, states = trainer._forward_draft_blocks(tokens, features, torch.ones(1, TOKENS))
    wanted = tokens[0][anchors[..., None] + (1 - first) + torch.arange(BLOCK)]
    states, before = trainer._build_domino_head_inputs(tokens, anchors, wanted, states)
    logits = trainer._apply_domino_head(output(states), states, before, wanted)[0, :, first:]
    return dict(
        features=features[0].to(torch.bfloat16), tokens=tokens[0], anchors=anchors[0], logits=logits.float(),
        drafted=logits.argmax(-1), embeddings=embeddings.weight.to(torch.bfloat16),
        output=output.weight.to(torch.bfloat16),
    )  # fmt: skip


def main() -> None:
    """Write all kinds."""
    write_all(__doc__, {name: Kind(partial(new_model, name), run, saved_model, mapped=False) for name in KINDS})


if __name__ == "__main__":
    main()
