"""The hidden states that a model's output layer reads, without computing the logits of every position; and others."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from attention.hf.hidden_states import Layers, blocks_name, hidden_layers, num_blocks
from specdec.model.output_layer import sizes_of


class Backbone:
    """A transformers causal language model as a function from tokens to the states that its output layer reads.

    A few tokens are run both ways at first. Raises ValueError, naming the architecture, where the base model's last
    hidden state is not what the output layer reads. `plain_logits`: the output layer's results are the model's logits,
    neither scaled nor capped afterwards."""

    def __init__(self, model):
        self.model, self.lm_head = model, model.get_output_embeddings()
        seen: list[Tensor] = []
        hook = self.lm_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        tokens = self._some_tokens(3)
        was_training = model.training
        try:
            with torch.no_grad():
                model.eval()
                logits = model(input_ids=tokens, use_cache=False).logits
                states = self(tokens)
        finally:
            hook.remove()
            model.train(was_training)
        if seen[0].shape != states.shape or not torch.allclose(seen[0], states, rtol=1e-3, atol=1e-3):
            raise ValueError(
                f"{type(model).__name__} changes its last hidden state before the output layer, so heads cannot be "
                "trained on it"
            )
        with torch.no_grad():
            self.plain_logits = torch.allclose(self.lm_head(states).float(), logits.float(), rtol=1e-2, atol=1e-2)

    def __call__(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        """`tokens [B, S]` -> hidden states `[B, S, H]`, with gradients unless the caller has switched them off.

        `documents [B, S]`, best on the CPU, numbers the texts packed into a row: positions start at 0 in each, and none
        attends to another. Negative numbers mark padding after the last text; attention is causal, so no mask is needed
        there."""
        positions = {}
        if documents is not None and bool(_begins(documents).any()):
            positions["position_ids"] = positions_of(documents).to(tokens.device, non_blocking=True)
        return self.model.base_model(input_ids=tokens, use_cache=False, return_dict=True, **positions).last_hidden_state

    def features(self, tokens: Tensor, layers: Layers, documents: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Features `[B, S, F]` of `layers`, as in `specdec.model.features.Features`, and what `self(…)` gives.

        Raises ValueError for a layer that the model does not have."""
        layers, blocks = hidden_layers(self.model, layers), num_blocks(self.model)
        with self._inputs_of({layer for layer in layers if layer != blocks}) as inputs:
            last = self(tokens, documents)
        return torch.cat([inputs.get(layer, last) for layer in layers], -1), last

    @contextmanager
    def _inputs_of(self, wanted: set[int]) -> Iterator[dict[int, Tensor]]:
        """The states that these decoder blocks read in the forward inside, by index.

        Index n + 1 of n blocks is what the last one gives, before the final norm."""
        inputs, hooks = dict[int, Tensor](), []

        def store_as(index: int):
            def store(_, given: tuple, named: dict) -> None:
                inputs[index] = given[0] if given else named["hidden_states"]

            return store

        def store_last(_, given: tuple, found: Tensor | tuple) -> None:
            inputs[num_blocks(self.model) + 1] = found[0] if isinstance(found, tuple) else found

        try:
            if wanted:
                names = [name for name, _ in self.model.named_modules()]
                blocks = [*self.model.get_submodule(blocks_name(self.model, names)).children()]
                before = sorted(layer for layer in wanted if layer < len(blocks))
                hooks = [blocks[i].register_forward_pre_hook(store_as(i), with_kwargs=True) for i in before]
                hooks += [blocks[-1].register_forward_hook(store_last)] if len(blocks) + 1 in wanted else []
            yield inputs
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def require_packing(self) -> None:
        """Raise ValueError, naming the architecture, unless packed texts get the states they have alone."""
        tokens, was_training = self._some_tokens(11), self.model.training
        self.model.eval()
        apart = torch.cat([self(part) for part in tokens.split([6, 5], 1)], 1)
        together = self(tokens, torch.tensor([[0] * 6 + [1] * 5]))
        self.model.train(was_training)
        low = apart.dtype in (torch.bfloat16, torch.float16)
        if (apart - together).norm() > (0.05 if low else 1e-3) * apart.norm():
            name = type(self.model).__name__
            raise ValueError(f"{name} lets packed texts see each other; train it with packing=False")

    def _some_tokens(self, count: int) -> Tensor:
        return torch.arange(count, device=self.model.device)[None] % sizes_of(self.lm_head)[0]


def frozen_backbone(model, distances: Sequence[str]) -> Backbone:
    """The backbone of `model`, whose weights get no gradients from now on.

    distances: names of losses that compare with its distributions. Raises ValueError where there are some and the model
    scales or caps its logits after the output layer, and for what `Backbone` refuses."""
    backbone = Backbone(model)
    if distances and not backbone.plain_logits:
        raise ValueError(
            f"{type(model).__name__} scales or caps its logits after the output layer, so the loss "
            f"{', '.join(map(repr, distances))} would compare with another distribution; 'ce' does not need it"
        )
    model.requires_grad_(False).eval()
    return backbone


def _begins(documents: Tensor) -> Tensor:
    """Where a text begins after another, bool `[B, S]`."""
    begins = torch.zeros_like(documents, dtype=torch.bool)
    begins[:, 1:] = (documents[:, 1:] != documents[:, :-1]) & (documents[:, 1:] >= 0)
    return begins


def positions_of(documents: Tensor) -> Tensor:
    """Positions 0, 1, 2 … within each text of `documents [B, S]`, `[B, S]`.

    >>> positions_of(torch.tensor([[0, 0, 0, 1, 1, -1]])).tolist()
    [[0, 1, 2, 0, 1, 2]]
    """
    begins = _begins(documents)
    places = torch.arange(begins.shape[1], device=begins.device).expand(begins.shape)
    return places - torch.where(begins, places, 0).cummax(1).values


def packed_ends(documents: Tensor) -> tuple[Tensor, int]:
    """Where the texts of `documents [B, S]` and the paddings end, int32 `[D + 1]` from 0 on, and the longest length.

    Rows follow on each other, as `cu_seqlens` of `attention.flash_attention` has them.

    >>> packed_ends(torch.tensor([[0, 0, 0, 1], [0, 0, -1, -1]]))
    (tensor([0, 3, 4, 6, 8], dtype=torch.int32), 3)
    """
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    starts = begins.flatten().nonzero()[:, 0]
    ends = torch.cat([starts, starts.new_tensor([documents.numel()])])
    return ends.int(), int(ends.diff().max())
