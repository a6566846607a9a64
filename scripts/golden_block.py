"""Tiny random block drafters, written and run by speculators' own classes, for the tests of our loader.

    python -m scripts.golden_block tests/specdec/drafters/block/golden

needs an environment of its own with speculators 0.9.0, torch and transformers 5.19. Each folder gets config.json and
model.safetensors as the library saves them, and `expected.safetensors`: what its forward in float64 makes of random
features and tokens, and the verifier's embeddings and output layer, which it reads. Weights are bfloat16, so that
float32 and float64 begin with the same numbers."""

from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor

from scripts.common.golden import SIZES, VERIFIER, Kind, write_all

TOKENS, BLOCK, ANCHORS = 14, 4, (1, 5, 10)
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=16)
MIXED = dict(layer_types=["full_attention", "sliding_attention"], sliding_window=3, use_sliding_window=True)
KINDS = {
    "dflash": ("dflash", "qwen3", MIXED, {}),
    "dflash_whole": ("dflash", "llama", dict(num_hidden_layers=1, rope_parameters=YARN), dict(draft_vocab_size=48)),
    "dflash_two_way": ("dflash", "qwen3", MIXED, dict(sliding_window_non_causal=True, sample_from_anchor=True)),
    "dspark": ("dspark", "qwen3", dict(attention_bias=True), dict(markov_rank=6)),
    "dspark_fill_in": (
        "dspark", "qwen3", MIXED,
        dict(markov_rank=6, markov_head_type="gated", sample_from_anchor=False, confidence_head_with_markov=False,
             draft_vocab_size=48),
    ),
    "dspark_rnn": ("dspark", "qwen3", {}, dict(markov_rank=6, markov_head_type="rnn", sample_from_anchor=False)),
    "dflash2": (
        "dflash2", "qwen3", MIXED,
        dict(draft_vocab_size=48, conv_group_size=4, selector_rank=6, selector_top_k=8),
    ),
    "dflash2_anchor": (
        "dflash2", "llama", {},
        dict(draft_vocab_size=48, conv_kernel_size=3, conv_group_size=8, selector_rank=6, selector_top_k=5,
             sample_from_anchor=True),
    ),
    "dspark_rnn_anchor": ("dspark", "llama", {}, dict(markov_rank=6, markov_head_type="rnn")),
}  # fmt: skip


def new_model(name: str):
    """The library's own model of a kind."""
    from speculators.config import SpeculatorsConfig, VerifierConfig
    from speculators.models.dflash import DFlashDraftModel, DFlashSpeculatorConfig
    from speculators.models.dflash2 import DFlash2DraftModel, DFlash2SpeculatorConfig
    from speculators.models.dspark import DSparkDraftModel, DSparkSpeculatorConfig
    from speculators.proposals.greedy import GreedyTokenProposalConfig
    from transformers import AutoConfig

    kind, layers, inner, outer = KINDS[name]
    of_layers = AutoConfig.for_model(layers, **SIZES | dict(num_hidden_layers=2) | inner)
    of_layers._attn_implementation = "eager"
    make_config, make_model = {
        "dflash": (DFlashSpeculatorConfig, DFlashDraftModel),
        "dflash2": (DFlash2SpeculatorConfig, DFlash2DraftModel),
        "dspark": (DSparkSpeculatorConfig, DSparkDraftModel),
    }[kind]
    config = make_config(
        transformer_layer_config=of_layers, aux_hidden_state_layer_ids=[2, 4, 5], block_size=BLOCK, mask_token_id=7,
        speculators_config=SpeculatorsConfig(
            algorithm=kind, proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=3)],
            default_proposal_method="greedy",
            verifier=VerifierConfig(name_or_path=VERIFIER, architectures=["LlamaForCausalLM"]),
        ),
        **dict(draft_vocab_size=20) | outer,
    )  # fmt: skip
    return make_model(config)


@torch.no_grad()
def run(model, seed: int) -> dict[str, Tensor]:
    """The inputs of its own forward, and what it hands to its loss: logits `[M, K, V_draft]` of the slots it scores.

    Where it has a head, `confidence [M, K]` too. Each slot follows the text's own tokens."""
    from speculators.models.dflash import core
    from speculators.models.dflash2 import core as dflash2_core
    from speculators.models.dflash2.model_definitions import CandidateSelector
    from speculators.models.dspark import core as dspark_core

    model.load_verifier_weights()
    model.double()
    torch.manual_seed(seed)
    features = torch.randn(1, TOKENS, model.fc.in_features).to(torch.bfloat16).double()
    last = torch.randn(1, TOKENS, model.config.transformer_layer_config.hidden_size).double()
    tokens, anchors = torch.randint(model.verifier_vocab_size, (1, TOKENS)), torch.tensor(ANCHORS)
    heard: list[Tensor | None] = []
    candidates: list[tuple[Tensor, ...]] = []  # of DFlash2: what its selector reads

    def score(unary, hidden, before, ids):
        candidates.append((unary, hidden, before))
        return CandidateSelector.score_candidates(model.candidate_selector, unary, hidden, before, ids)

    def select(**given):
        ids, scores = model.candidate_selector.select(*candidates[0])
        whole = torch.full_like(given["unary_logits"], float("-inf")).scatter(-1, ids, scores)
        return loss(whole, given["targets"], given["loss_mask"], given["block_size"])

    def loss(logits, targets, *given, **options):
        heard.extend([logits, given[0] if len(given) == 3 else None])
        return logits.sum(), {}

    chosen = anchors, torch.ones(len(anchors), dtype=torch.bool)
    with (
        patch.object(core, "select_anchors", lambda *given: chosen),
        patch.object(core, "compute_metrics", loss),
        patch.object(dspark_core, "compute_metrics", loss),
        patch.object(dflash2_core, "compute_metrics", select),
    ):
        if hasattr(model, "candidate_selector"):
            model.candidate_selector.score_candidates = score
        model(
            hidden_states=features, input_ids=tokens, loss_mask=torch.ones(1, TOKENS), max_anchors=len(anchors),
            verifier_last_hidden_states=last, document_ids=torch.zeros(1, TOKENS, dtype=torch.long),
        )  # fmt: skip
    first = 0 if model.config.sample_from_anchor else 1
    logits, confidence = (None if x is None else x.unflatten(1, (-1, BLOCK))[0, :, first:] for x in heard)
    assert logits is not None
    drafted = logits.argmax(-1)
    found = dict(features=features[0].to(torch.bfloat16), tokens=tokens[0], anchors=anchors, logits=logits.float(),
                 drafted=drafted if model.d2t is None else drafted + model.d2t[drafted],
                 embeddings=model.embed_tokens.weight.to(torch.bfloat16))  # fmt: skip
    if not model.use_draft_vocab:
        found["output"] = model.lm_head.weight.to(torch.bfloat16)
    return found if confidence is None else found | dict(confidence=confidence.float())


def main() -> None:
    """Write all kinds."""
    write_all(__doc__, {name: Kind(partial(new_model, name), run) for name in KINDS})


if __name__ == "__main__":
    main()
