"""A random target of the golden drafters' sizes."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from specdec.model.runner import ModelRunner


@pytest.fixture(scope="session")
def runner():
    """A target of 8 layers, hidden size 16 and 48 tokens, in float32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48, hidden_size=16, intermediate_size=32, num_hidden_layers=8, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=64,
    )  # fmt: skip
    return ModelRunner(LlamaForCausalLM(config).eval(), mode="eager")
