"""Tiny random models of the families that the library runs, that it refuses, and that transformers' release decides
about.
"""

import torch
import transformers as tf

VOCAB = 97
_COMMON = dict(vocab_size=VOCAB, bos_token_id=0, eos_token_id=2, pad_token_id=1)
_OLD = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=160)
_LLAMA_LIKE = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=160,
)

CONFIGS = {
    "llama": lambda: tf.LlamaConfig(**_COMMON, **_LLAMA_LIKE),
    "qwen3": lambda: tf.Qwen3Config(**_COMMON, **_LLAMA_LIKE, head_dim=16),
    "mistral": lambda: tf.MistralConfig(**_COMMON, **_LLAMA_LIKE, sliding_window=9),
    "mixtral": lambda: tf.MixtralConfig(
        **_COMMON, **_LLAMA_LIKE, num_local_experts=4, num_experts_per_tok=2, sliding_window=None
    ),
    "gemma2": lambda: tf.Gemma2Config(
        **_COMMON, **_LLAMA_LIKE, head_dim=16, sliding_window=9, query_pre_attn_scalar=16, attn_logit_softcapping=2.0
    ),
    "gemma3": lambda: tf.Gemma3TextConfig(
        **_COMMON,
        **_LLAMA_LIKE,
        head_dim=16,
        sliding_window=9,
        query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "phi3": lambda: tf.Phi3Config(**_COMMON, **_LLAMA_LIKE),
    "gpt_neox": lambda: tf.GPTNeoXConfig(**_COMMON, **_OLD, intermediate_size=64),
    "gpt2": lambda: tf.GPT2Config(**_COMMON, n_embd=32, n_layer=3, n_head=4, n_positions=160),
    "opt": lambda: tf.OPTConfig(**_COMMON, **_OLD, ffn_dim=64, word_embed_proj_dim=32),
    "gpt_oss": lambda: tf.GptOssConfig(
        **_COMMON,
        **_LLAMA_LIKE,
        head_dim=16,
        sliding_window=9,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
}

# the output layer has a bias, which Medusa heads carry on
OUTPUT_BIAS = {
    "phi": lambda: tf.PhiConfig(**_COMMON, **_LLAMA_LIKE, partial_rotary_factor=0.5),
}

REFUSED = {
    "bloom": lambda: tf.BloomConfig(**_COMMON, hidden_size=32, n_layer=2, n_head=4),
    "falcon": lambda: tf.FalconConfig(
        **_COMMON, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=False
    ),
}

_GATED_DELTA = dict(
    layer_types=["linear_attention", "full_attention", "linear_attention"],
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_conv_kernel_dim=4,
)
_SHORT_CONVOLUTION = dict(conv_L_cache=3, layer_types=["conv", "full_attention", "conv"])
_MAMBA2 = dict(mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=2, mamba_d_state=8, mamba_chunk_size=16, mamba_expand=2)
_FEW_EXPERTS = dict(num_experts=4, num_experts_per_tok=2)

# layers with a recurrent state: the gated delta rule, short convolutions, Mamba-2, Mamba-1, Kimi's delta attention
RECURRENT = {
    "qwen3_next": lambda: tf.Qwen3NextConfig(
        **_COMMON,
        **_LLAMA_LIKE,
        **_GATED_DELTA,
        **_FEW_EXPERTS,
        head_dim=16,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    ),
    "qwen3_5": lambda: tf.Qwen3_5TextConfig(**_COMMON, **_LLAMA_LIKE, **_GATED_DELTA, head_dim=16),
    "qwen3_5_moe": lambda: tf.Qwen3_5MoeTextConfig(
        **_COMMON,
        **_LLAMA_LIKE,
        **_GATED_DELTA,
        **_FEW_EXPERTS,
        head_dim=16,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    ),
    "olmo_hybrid": lambda: tf.OlmoHybridConfig(**_COMMON, **_LLAMA_LIKE, **_GATED_DELTA),
    "lfm2": lambda: tf.Lfm2Config(**_COMMON, **_LLAMA_LIKE, **_SHORT_CONVOLUTION, block_auto_adjust_ff_dim=False),
    "lfm2_moe": lambda: tf.Lfm2MoeConfig(
        **_COMMON, **_LLAMA_LIKE, **_SHORT_CONVOLUTION, **_FEW_EXPERTS, moe_intermediate_size=16, num_dense_layers=1
    ),
    "mamba2": lambda: tf.Mamba2Config(
        **_COMMON,
        hidden_size=32,
        num_hidden_layers=2,
        num_heads=8,
        head_dim=8,
        state_size=8,
        n_groups=2,
        chunk_size=16,
        expand=2,
    ),
    "bamba": lambda: tf.BambaConfig(**_COMMON, **_LLAMA_LIKE, **_MAMBA2, attn_layer_indices=[1]),
    "granitemoehybrid": lambda: tf.GraniteMoeHybridConfig(
        **_COMMON,
        **_LLAMA_LIKE,
        **_MAMBA2,
        layer_types=["mamba", "attention", "mamba"],
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=32,
    ),
    "nemotron_h": lambda: tf.NemotronHConfig(
        **_COMMON,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=160,
        layers_block_type=["mamba", "attention", "mamba", "moe"],
        mamba_num_heads=8,
        mamba_head_dim=8,
        n_groups=2,
        ssm_state_size=8,
        chunk_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        moe_shared_expert_intermediate_size=16,
    ),
    "falcon_h1": lambda: tf.FalconH1Config(**_COMMON, **_LLAMA_LIKE, **_MAMBA2, mamba_d_ssm=64),
    "zamba2": lambda: tf.Zamba2Config(
        **_COMMON,
        **_LLAMA_LIKE | dict(num_key_value_heads=4),
        layers_block_type=["mamba", "hybrid", "mamba"],
        mamba_d_state=8,
        mamba_ngroups=2,
        n_mamba_heads=8,
        mamba_headdim=8,
        chunk_size=16,
        mamba_expand=2,
        num_mem_blocks=1,
        adapter_rank=8,
    ),
    "jamba": lambda: tf.JambaConfig(
        **_COMMON,
        **_LLAMA_LIKE,
        **_FEW_EXPERTS,
        attn_layer_period=3,
        attn_layer_offset=1,
        mamba_d_state=8,
        mamba_dt_rank=4,
    ),
    "mamba": lambda: tf.MambaConfig(**_COMMON, hidden_size=32, num_hidden_layers=2, state_size=8, time_step_rank=4),
    "falcon_mamba": lambda: tf.FalconMambaConfig(
        **_COMMON, hidden_size=32, num_hidden_layers=2, state_size=8, time_step_rank=4
    ),
    "zamba": lambda: tf.ZambaConfig(
        **_COMMON,
        **_LLAMA_LIKE | dict(num_key_value_heads=4, num_hidden_layers=6),
        attention_head_dim=16,
        mamba_d_state=8,
        mamba_dt_rank=4,
        n_mamba_heads=2,
        attn_layer_period=2,
        attn_layer_offset=1,
    ),
    "kimi_linear": lambda: tf.KimiLinearConfig(
        **_COMMON,
        **_LLAMA_LIKE | dict(num_key_value_heads=4),
        **_FEW_EXPERTS,
        layer_types=_GATED_DELTA["layer_types"],
        linear_num_heads=4,
        linear_head_dim=8,
        linear_conv_kernel_dim=4,
        q_lora_rank=None,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
    ),
}

# layers differ in their kv heads and head dims, and the last ones attend to keys and values of earlier ones
UNEVEN = {
    "gemma4": lambda: tf.Gemma4TextConfig(
        **_COMMON,
        **_LLAMA_LIKE | dict(num_hidden_layers=2),
        head_dim=16,  # of sliding layers; full ones have 512
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        sliding_window=9,
        hidden_size_per_layer_input=0,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "gemma4, shared": lambda: tf.Gemma4TextConfig(
        **_COMMON,
        **_LLAMA_LIKE | dict(num_hidden_layers=4),
        head_dim=16,
        global_head_dim=32,
        sliding_window=9,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCAB,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
    ),
    "mimo_v2_flash": lambda: tf.MiMoV2FlashConfig(
        **_COMMON,
        **_LLAMA_LIKE,
        head_dim=12,
        v_head_dim=8,
        sliding_window=9,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
    ),
}

# multi-head latent attention: keys and values of all heads are made of one latent
_LATENT = _LLAMA_LIKE | dict(
    num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=10
)
_EXPERTS = dict(
    n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, n_shared_experts=1, n_group=1, topk_group=1
)
LATENT = {
    "deepseek_v2": lambda: tf.DeepseekV2Config(**_COMMON, **_LATENT, **_EXPERTS),
    "deepseek_v3": lambda: tf.DeepseekV3Config(**_COMMON, **_LATENT, **_EXPERTS, first_k_dense_replace=1),
    "glm4_moe_lite": lambda: tf.Glm4MoeLiteConfig(**_COMMON, **_LATENT, **_EXPERTS),
    "minicpm3": lambda: tf.MiniCPM3Config(**_COMMON, **_LATENT),
    "youtu": lambda: tf.YoutuConfig(**_COMMON, **_LATENT),
}

# of the same kinds, in newer releases of transformers only: names of their configurations, and settings
_NEWER = {
    "lfm3": ("Lfm3Config", _SHORT_CONVOLUTION),
    "lara_mini": ("LaraMiniConfig", _GATED_DELTA),
    "bailing_hybrid": (
        "BailingHybridConfig",
        _FEW_EXPERTS
        | dict(
            layer_types=_GATED_DELTA["layer_types"],
            num_key_value_heads=4,
            moe_intermediate_size=16,
            q_lora_rank=None,
            kv_lora_rank=16,
            qk_nope_head_dim=8,
            qk_rope_head_dim=8,
            v_head_dim=8,
            n_group=1,
            topk_group=1,
        ),
    ),
}
RECURRENT |= {
    family: lambda name=name, settings=settings: getattr(tf, name)(**_COMMON, **_LLAMA_LIKE | settings)
    for family, (name, settings) in _NEWER.items()
    if hasattr(tf, name)
}

# they call transformers' attention interface in some releases alone (GPT-J: from 5.24 on), which only a probe can tell
PROBED = {
    "gptj": lambda: tf.GPTJConfig(**_COMMON, n_embd=32, n_layer=2, n_head=4, n_positions=160, rotary_dim=8),
}


def build(name: str, seed: int = 0, spread: float = 4.0):
    """A random model whose logits are spread out by `spread`, so that greedy choices are far from ties."""
    torch.manual_seed(seed)
    makers = CONFIGS | UNEVEN | LATENT | RECURRENT | OUTPUT_BIAS | REFUSED | PROBED
    model = tf.AutoModelForCausalLM.from_config(makers[name]()).eval()
    spread_out(model, spread)
    return model


@torch.no_grad()
def spread_out(model, spread: float) -> None:
    """Make a new model's logits larger."""
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.mul_(spread)
    bias = getattr(model.get_output_embeddings(), "bias", None)
    if bias is not None:  # zero in a new model
        bias.normal_(std=0.1 * spread)


def noisy_copy(name: str, noise: float = 0.05, seed: int = 7):
    """A draft that agrees with `build(name)` now and then: its weights plus noise."""
    draft = build(name)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.std() * noise)
    return draft


def ragged_prompts(batch: int, seed: int = 0, longest: int = 21):
    """Left-padded `(input_ids, attention_mask)` of different lengths; lengths 1 and `longest` are among them."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [longest, 1, *torch.randint(2, longest, (batch,), generator=generator).tolist()][:batch]
    ids = torch.randint(3, VOCAB, (batch, longest), generator=generator)
    mask = (torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]).long()
    return torch.where(mask == 1, ids, 1), mask
