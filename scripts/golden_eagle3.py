"""Tiny random EAGLE-3 and P-EAGLE drafters, written and run by speculators' own classes, for the tests of our loader.

    python -m scripts.golden_eagle3 tests/specdec/drafters/eagle3/golden

needs an environment of its own with speculators 0.9.0, torch and transformers 5.19. Each folder gets config.json and
model.safetensors as the library saves them, and `expected.safetensors`: what its forward in float64 makes of random
features and tokens. Weights are bfloat16, so that float32 and float64 begin with the same numbers."""

from functools import partial

import torch
from torch import Tensor

from scripts.common.golden import SIZES, VERIFIER, Kind, write_all

TOKENS, STEPS, DEPTHS = 10, 3, 3
LLAMA3 = dict(rope_type="llama3", rope_theta=5e3, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=8)  # fmt: skip
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=16)
SLIDING = dict(sliding_window=4, use_sliding_window=True)
KINDS = {
    "plain": ("eagle3", "llama", {}, dict(draft_vocab_size=48)),
    "each_norm": ("eagle3", "llama", dict(rope_parameters=LLAMA3), dict(fc_norm=True, norm_output=True)),
    "whole_norm": (
        "eagle3", "qwen3", dict(attention_bias=True, layer_types=["sliding_attention"], **SLIDING),
        dict(norm_before_fc=True, norm_before_residual=True),
    ),
    "two_layers": ("eagle3", "llama", dict(num_hidden_layers=2, rope_parameters=YARN), dict(norm_before_residual=True)),
    "parallel": (
        "peagle", "qwen3",
        dict(num_hidden_layers=2, layer_types=["full_attention", "sliding_attention"], **SLIDING),
        dict(mask_token_id=7, fc_norm=True),
    ),
    "parallel_plain": ("peagle", "llama", {}, dict(mask_token_id=3, draft_vocab_size=48)),
}  # fmt: skip


def new_model(name: str):
    """The library's own model of a kind."""
    from speculators.config import SpeculatorsConfig, VerifierConfig
    from speculators.models.eagle3 import Eagle3SpeculatorConfig
    from speculators.models.eagle3.core import Eagle3DraftModel
    from speculators.models.peagle.config import PEagleSpeculatorConfig
    from speculators.models.peagle.core import PEagleDraftModel
    from speculators.proposals.greedy import GreedyTokenProposalConfig
    from transformers import AutoConfig

    kind, layers, inner, outer = KINDS[name]
    of_layers = AutoConfig.for_model(layers, **SIZES | dict(num_hidden_layers=1) | inner)
    of_layers._attn_implementation = "eager"
    classes = {
        "eagle3": (Eagle3SpeculatorConfig, Eagle3DraftModel),
        "peagle": (PEagleSpeculatorConfig, PEagleDraftModel),
    }
    make_config, make_model = classes[kind]
    config = make_config(
        transformer_layer_config=of_layers, eagle_aux_hidden_state_layer_ids=[2, 4, 5],
        speculators_config=SpeculatorsConfig(
            algorithm=kind, proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=STEPS)],
            default_proposal_method="greedy",
            verifier=VerifierConfig(name_or_path=VERIFIER, architectures=["LlamaForCausalLM"]),
        ),
        **dict(draft_vocab_size=20) | outer,
    )  # fmt: skip
    return make_model(config)


@torch.no_grad()
def run(kind: str, model, seed: int) -> dict[str, Tensor]:
    """The inputs of its own forward, its logits and the tokens of the target that they mean.

    eagle3: logits `[STEPS, TOKENS, V_draft]`; peagle: `[N, V_draft]`, with `anchors` and `depths` `[N]`."""
    features = torch.randn(1, TOKENS, model.fc.in_features).to(torch.bfloat16).double()
    tokens = torch.randint(model.verifier_vocab_size, (1, TOKENS))
    logits: list[Tensor] = []
    hook = model.lm_head.register_forward_hook(lambda module, inputs, output: logits.append(output[0]))
    given = dict(hidden_states=features, input_ids=tokens, document_ids=torch.zeros(1, TOKENS, dtype=torch.long))
    places = {}
    if kind == "eagle3":
        model(**given, ttt_steps=STEPS)
    else:
        places = run_parallel(model, given, seed)
    hook.remove()
    found = torch.stack(logits) if kind == "eagle3" else logits[0]
    drafted = found.argmax(-1)
    drafted = drafted if model.d2t is None else drafted + model.d2t[drafted]
    inputs = dict(features=features[0].to(torch.bfloat16), tokens=tokens[0])
    return inputs | places | dict(logits=found.float(), drafted=drafted)


def run_parallel(model, given: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Run a parallel drafter's forward -> where its slots are."""
    from speculators.losses import resolve_loss_config
    from speculators.models.peagle.data import generate_cod_sample_indices

    slots = dict(num_depths=DEPTHS, down_sample_ratio=1.0, down_sample_ratio_min=1.0)
    last = torch.randn(1, TOKENS, model.hidden_size, dtype=torch.float64)
    mask = torch.ones(1, TOKENS)
    torch.manual_seed(seed)
    model(**given, **slots, loss_mask=mask, verifier_last_hidden_states=last,
          loss_config=resolve_loss_config("kl_div", "eager"))  # fmt: skip
    torch.manual_seed(seed)
    anchors, depths = generate_cod_sample_indices(TOKENS, mask, **slots)
    return dict(anchors=anchors, depths=depths)


def main() -> None:
    """Write all kinds."""
    write_all(__doc__, {name: Kind(partial(new_model, name), partial(run, KINDS[name][0])) for name in KINDS})


if __name__ == "__main__":
    main()
