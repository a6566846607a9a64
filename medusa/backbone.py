"""The hidden states that a model's output layer reads, without computing the logits of every position."""

import torch
from torch import Tensor


class Backbone:
    """A transformers causal language model as the function from tokens to what its output layer reads.

    A few tokens are run both ways when it is made; ValueError, naming the architecture, where the base model's last hidden state is not what
    the output layer gets.
    """

    def __init__(self, model):
        self.model, self.lm_head = model, model.get_output_embeddings()
        seen = []
        hook = self.lm_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        tokens = torch.arange(3, device=model.device)[None] % self.lm_head.weight.shape[0]
        was_training = model.training
        try:
            with torch.no_grad():
                model.eval()
                model(input_ids=tokens, use_cache=False)
                states = self(tokens)
        finally:
            hook.remove()
            model.train(was_training)
        if seen[0].shape != states.shape or not torch.allclose(seen[0], states, rtol=1e-3, atol=1e-3):
            raise ValueError(f"{type(model).__name__} changes its last hidden state before the output layer, so heads cannot be trained on it")

    def __call__(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """`tokens [B, S]` -> hidden states `[B, S, H]`, with gradients where the caller has not switched them off."""
        return self.model.base_model(input_ids=tokens, attention_mask=attention_mask, use_cache=False, return_dict=True).last_hidden_state
