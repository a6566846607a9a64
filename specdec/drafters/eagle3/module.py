"""The network of an EAGLE-3 drafter (Li et al. 2025, arXiv 2503.01840), of EAGLE-3.1 (arXiv 2605.09992) and P-EAGLE.

The target's states of some layers, fused to one feature g_i of token i, and the embedding of token i + 1 go through one
decoder layer or a few; logits of token i + 2 follow, and the layer's output is the feature of token i + 1 until the
target gives its own. The network owns no cache: `attend` of its caller says what a token sees, so that what trains is
what decodes."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from specdec.drafters.eagle3.config import Eagle3Config
from specdec.drafters.network.gradients import working_dtype
from specdec.drafters.network.parts import (
    Attend,
    Attention,
    Borrowed,
    GatedMLP,
    RMSNorm,
    linear,
    over_target,
    require_draft_tokens,
)
from specdec.drafters.network.rotation import Angles
from specdec.model.fusion.replacements import norms_side_by_side

READINGS = (
    "target_layers",
    "norm_before_residual",
    "norm_output",
    "deeper_norm",
    "rms_norm_eps",
    "rotation",
    "windows",
)
"""Fields of a config that may be wrong though all weights have their places."""


class DraftLayer(nn.Module):
    """A decoder layer; the first one also reads embeddings."""

    def __init__(self, config: Eagle3Config, index: int):
        super().__init__()
        norm = lambda size: RMSNorm(size, config.rms_norm_eps)
        self.first, self.norm_before_residual = index == 0, config.norm_before_residual
        self.input_layernorm = norm(config.hidden_size if index else config.embedded_size)
        if self.first:
            self.hidden_norm = norm(config.hidden_size)
        read = config.hidden_size + (config.embedded_size if self.first else 0)
        self.self_attn, self.mlp = Attention(config, index, read), GatedMLP(config)
        self.post_attention_layernorm = norm(config.hidden_size)

    def forward(self, embedded: Tensor, hidden: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """`embedded [T, e]`, `hidden [T, h]`, cosine and sine `[T, R]` -> `[T, h]`."""
        residual = hidden
        if not self.first:
            read = self.input_layernorm(hidden)
        elif self.norm_before_residual:
            residual = self.hidden_norm(hidden)
            read = torch.cat([self.input_layernorm(embedded), residual], -1)
        else:
            read = norms_side_by_side(self.input_layernorm, embedded, self.hidden_norm, hidden)
        hidden = residual + self.self_attn(read, cos, sin, attend)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Eagle3Model(nn.Module):
    """An EAGLE-3 drafter's network. T: packed tokens; e, h, F as in `Eagle3Config`.

    Parameters have the names of the speculators format. `draft_tokens [V_draft]` int64 holds the target's id of each
    token that it can draft, None where these are all tokens in their order.

    Where the config says so, `borrow(embeddings, output)` has to follow with the target's modules.
    Raises ValueError for draft tokens that are none, and for a missing or superfluous map."""

    draft_tokens: Tensor | None

    def __init__(self, config: Eagle3Config, draft_tokens: Tensor | None = None):
        super().__init__()
        self.config, eps, h = config, config.rms_norm_eps, config.hidden_size
        require_draft_tokens(config.draft_vocab_size, config.target_vocab_size, draft_tokens)
        self.register_buffer("draft_tokens", draft_tokens)
        if config.own_embeddings:
            self.embed_tokens = nn.Embedding(config.target_vocab_size, config.embedded_size)
        if config.feature_norm == "each":
            norms = [RMSNorm(config.target_hidden_size, eps) for _ in config.target_layers]
            self.fc_norm = nn.ModuleList(norms)
        if config.feature_norm == "whole":
            self.input_norm = RMSNorm(config.feature_size, eps)
        self.fc = nn.Linear(config.feature_size, h, bias=config.fusion_bias)
        self.layers = nn.ModuleList(DraftLayer(config, index) for index in range(config.num_layers))
        self.norm = RMSNorm(h, eps)
        if config.output == "own":
            self.lm_head = nn.Linear(h, config.draft_vocab_size, bias=False)
        if config.parallel:
            self.mask_hidden = nn.Parameter(torch.zeros(1, 1, config.feature_size))
        self._borrowed, self._angles = Borrowed(), Angles(config.rotation)
        self.about = ""  # where it is from and how its file was read, for people
        self.spare = dict[str, Tensor]()  # weights of its file that another reading takes in place of some of these

    def borrow(self, embeddings: nn.Module | None = None, output: nn.Module | None = None) -> None:
        """Read the target's `embeddings` and `output` layer, where the config says that they are the target's."""
        self._borrowed = Borrowed(embeddings, output)

    def read_as(self, **fields: Any) -> "Eagle3Model":
        """A network over the same weights with other values of `READINGS` in its config.

        Raises ValueError for other fields, and for another `deeper_norm` where the file has one norm a layer."""
        if unknown := fields.keys() - set(READINGS):
            raise ValueError(f"what can be read otherwise is {', '.join(READINGS)}, got {', '.join(sorted(unknown))}")
        config, held, spare = replace(self.config, **fields), self.state_dict(), self.spare
        if config.deeper_norm != self.config.deeper_norm:
            if len(spare) != config.num_layers - 1:
                raise ValueError(f"deeper_norm cannot be {config.deeper_norm}: the file has one such norm a layer")
            held, spare = held | spare, {name: held[name] for name in spare}
        if len(config.target_layers) != len(self.config.target_layers):
            raise ValueError(
                f"it reads {len(self.config.target_layers)} layers, got target_layers {config.target_layers}"
            )
        with torch.device("meta"):
            other = Eagle3Model(config, self.draft_tokens)
        other.load_state_dict(held, assign=True)
        other._borrowed, other.spare = self._borrowed, spare
        other.about = "\n".join(
            [self.about, *(f"{name} {value}: not as its format says" for name, value in fields.items())]
        )
        return other.train(self.training)

    def fuse(self, features: Tensor) -> Tensor:
        """The target's states `[T, F]` -> `[T, h]`."""
        features = features.to(working_dtype(self.fc.weight))
        if self.config.feature_norm == "each":
            parts = features.chunk(len(self.fc_norm), -1)
            features = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], -1)
        elif self.config.feature_norm == "whole":
            features = self.input_norm(features)
        return self.fc(features)

    def embed(self, tokens: Tensor) -> Tensor:
        """`tokens [T]` -> `[T, e]`."""
        return functional.embedding(tokens, self._table("embeddings")).to(working_dtype(self.fc.weight))

    def mask_steps(self, count: int) -> tuple[Tensor, Tensor]:
        """What `count` parallel steps of P-EAGLE read: tokens `[count]`, and features `[count, F]` to fuse.

        Raises ValueError for a drafter of one token a step."""
        if self.config.mask_token is None:
            raise ValueError("only a drafter with a mask_token drafts in parallel, got mask_token None")
        tokens = torch.full((count,), self.config.mask_token, device=self.mask_hidden.device)
        return tokens, self.mask_hidden[0].expand(count, -1)

    def forward(self, embedded: Tensor, hidden: Tensor, positions: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
        """`embedded [T, e]` of the tokens after those of `hidden [T, h]` at `positions [T]` -> two `[T, h]`.

        The first goes to `logits`, the second is the `hidden` of the next step. Positions may have any offset."""
        cos, sin = self._angles(positions, hidden.dtype)
        for layer in self.layers:
            hidden = layer(embedded, hidden, cos, sin, attend)
        output = self.norm(hidden)
        return output, output if self.config.norm_output else hidden

    def logits(self, output: Tensor) -> Tensor:
        """`output [T, h]` -> logits `[T, V_draft]`."""
        if self.config.output == "own" and self.lm_head.weight.dtype == output.dtype:
            return self.lm_head(output)
        return linear(output, self.output_weight)

    def target_logits(self, output: Tensor) -> Tensor:
        """`output [T, h]` -> logits over the target's tokens `[T, V_target]`, -inf for those that are never drafted."""
        return over_target(self.logits(output), self.draft_tokens, self.config.target_vocab_size)

    @property
    def output_weight(self) -> Tensor:
        """The output layer's weight `[V_draft, h]`, its own or another's."""
        return self._table("output")

    def _table(self, what: str) -> Tensor:
        """The weight of the "embeddings" `[V, e]` or the "output" layer `[V_draft, h]`."""
        if what == "output" and self.config.output == "own":
            return self.lm_head.weight
        if what == "output" and self.config.output == "embeddings":
            what = "embeddings"
        if what == "embeddings" and self.config.own_embeddings:
            return self.embed_tokens.weight
        return self._borrowed.table(what)
