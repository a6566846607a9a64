"""The network of a block drafter: DFlash and DFlash2 (z-lab), DSpark (arXiv 2607.05147), Domino (arXiv 2605.29707).

The target's states of some layers, fused to one vector a token, become keys and values of every layer: the context,
kept for good. A block, the embeddings of the last accepted token (the anchor, whose states do not exist yet) and of
mask tokens, goes through the layers once, seeing the context and itself; each place predicts a token. The network owns
no cache: its callers say where keys and values go and what a place sees, so that what trains is what decodes."""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from specdec.drafters.block.config import BlockConfig
from specdec.drafters.block.convolution import BlockConvolution, around
from specdec.drafters.block.heads import ConfidenceHead, DominoHead, MarkovHead, SelectorHead
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

Keep = Callable[[int, Tensor, Tensor], None]
"""`keep(layer, k [T, G, D], v [T, G, D])`: takes the keys, rotated, and the values of context tokens."""


class BlockLayer(nn.Module):
    """A decoder layer; where the config has them, convolutions come before and after attention and MLP."""

    def __init__(self, config: BlockConfig, index: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn, self.mlp = Attention(config, index), GatedMLP(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention_conv, self.mlp_conv = (BlockConvolution(config) if config.conv_taps else None for _ in range(2))

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """`hidden [T, h]` of whole blocks, cosine and sine `[T, R]` -> `[T, h]`."""
        attention = lambda x: self.self_attn(x, cos, sin, attend)
        hidden = hidden + around(self.attention_conv, self.input_layernorm(hidden), attention)
        return hidden + around(self.mlp_conv, self.post_attention_layernorm(hidden), self.mlp)


class BlockModel(nn.Module):
    """A block drafter's network. T: packed tokens; h, F, B as in `BlockConfig`.

    Parameters have the names of the speculators format. `draft_tokens [V_draft]` int64 holds the target's id of each
    token that it can draft, None where these are all tokens in their order.

    Where the config says so, `borrow(embeddings, output)` has to follow with the target's modules.
    Raises ValueError for draft tokens that are none, and for a missing or superfluous map."""

    draft_tokens: Tensor | None

    def __init__(self, config: BlockConfig, draft_tokens: Tensor | None = None):
        super().__init__()
        self.config, eps, h = config, config.rms_norm_eps, config.hidden_size
        require_draft_tokens(config.draft_vocab_size, config.target_vocab_size, draft_tokens)
        self.register_buffer("draft_tokens", draft_tokens)
        if config.own_embeddings:
            self.embed_tokens = nn.Embedding(config.target_vocab_size, h)
        self.fc, self.hidden_norm = nn.Linear(config.feature_size, h, bias=False), RMSNorm(h, eps)
        self.layers = nn.ModuleList(BlockLayer(config, index) for index in range(config.num_layers))
        self.norm = RMSNorm(h, eps)
        if config.output == "own":
            self.lm_head = nn.Linear(h, config.draft_vocab_size, bias=False)
        self.markov_head = None if config.markov in ("none", "selector", "domino") else MarkovHead(config)
        if config.markov == "selector":
            self.candidate_selector = SelectorHead(config)
        self.domino_head = DominoHead(config) if config.markov == "domino" else None
        self.confidence_head = None if config.confidence == "none" else ConfidenceHead(config)
        self._borrowed, self._angles = Borrowed(), Angles(config.rotation)
        self.about = ""  # where it is from and how its file was read, for people

    def borrow(self, embeddings: nn.Module | None = None, output: nn.Module | None = None) -> None:
        """Read the target's `embeddings` and `output` layer, where the config says that they are the target's."""
        self._borrowed = Borrowed(embeddings, output)

    @property
    def head(self) -> MarkovHead | SelectorHead | None:
        """What makes a slot's logits follow the token before, and no others; None: they do not."""
        if self.recurrent is not None:
            return None
        return self.candidate_selector if self.config.markov == "selector" else self.markov_head

    @property
    def recurrent(self) -> MarkovHead | DominoHead | None:
        """The head if it follows all tokens before, not only one."""
        return self.markov_head if self.config.markov == "rnn" else self.domino_head

    def fuse(self, features: Tensor) -> Tensor:
        """The target's states `[T, F]` -> one vector a token, `[T, h]`."""
        return self.hidden_norm(self.fc(features.to(self.fc.weight.dtype)))

    def keep_context(self, fused: Tensor, positions: Tensor, keep: Keep) -> None:
        """Give `keep` each layer's keys and values of context tokens, `fused [T, h]`, at `positions [T]`."""
        cos, sin = self._angles(positions, fused.dtype)
        for layer in self.layers:
            attention = cast(BlockLayer, layer).self_attn
            keep(attention.index, *attention.keys_and_values(fused, cos, sin))

    def block_tokens(self, anchors: Tensor) -> Tensor:
        """The tokens of blocks after `anchors [A]`, `[A, B]`."""
        masks = anchors.new_full((1, self.config.block_size - 1), self.config.mask_token)
        return torch.cat([anchors[:, None], masks.expand(len(anchors), -1)], 1)

    def embed(self, tokens: Tensor) -> Tensor:
        """`tokens [T]` -> `[T, h]`."""
        own = self.config.own_embeddings
        table = self.embed_tokens.weight if own else self._borrowed.table("embeddings")
        embedded = functional.embedding(tokens, table).to(self.fc.weight.dtype)
        return embedded if self.config.embedding_scale == 1.0 else embedded * self.config.embedding_scale

    def forward(self, embedded: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """`embedded [T, h]` of the tokens of blocks at `positions [T]` -> states for `logits`, `[T, h]`."""
        hidden, (cos, sin) = embedded, self._angles(positions, embedded.dtype)
        for layer in self.layers:
            hidden = layer(hidden, cos, sin, attend)
        return self.norm(hidden)

    @property
    def output_weight(self) -> Tensor:
        """The output layer's weight `[V_draft, h]`, its own or the target's."""
        return self.lm_head.weight if self.config.output == "own" else self._borrowed.table("output")

    def logits(self, hidden: Tensor, weight: Tensor | None = None) -> Tensor:
        """`hidden [..., h]` of places -> their logits by themselves `[..., V_draft]`, whatever tokens come before.

        They are -inf for tokens that a selector does not consider.

        weight: `output_weight`, for callers that have it in the dtype of `hidden` already."""
        config = self.config
        if weight is None and config.output == "own" and self.lm_head.weight.dtype == hidden.dtype:
            logits = self.lm_head(hidden)
        else:
            logits = linear(hidden, self.output_weight if weight is None else weight)
        if config.output_scale != 1.0:
            logits = logits * config.output_scale
        logits = logits if config.softcap is None else config.softcap * torch.tanh(logits / config.softcap)
        return logits if config.markov != "selector" else self.candidate_selector.only_candidates(logits)

    def slots(self, places: Tensor) -> Tensor:
        """The states of the K places that predict, `[..., K, h]`, of all `places [..., B, h]` of blocks."""
        return places[..., self.config.block_size - self.config.num_slots :, :]

    def memory(self, places: Tensor, anchors: Tensor) -> Tensor | None:
        """The recurrent head's state before the first slot `[A, r]`, of blocks' `places [A, B, h]` and `anchors [A]`.

        None for a head without one. Where the anchor's own place predicts nothing, an "rnn" has passed it, after the
        anchor; so the anchor comes twice, as in training."""
        head = self.recurrent
        if head is None:
            return None
        state = head.start(places[:, 0])
        twice = isinstance(head, MarkovHead) and not self.config.from_anchor
        return head.read(anchors, places[:, 0], state)[1] if twice else state

    def follow(self, slot: int, logits: Tensor, tokens: Tensor, hidden: Tensor, memory: Tensor,
               among: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The logits of a slot after `tokens [..., n]`, and the recurrent head's state after them `[..., n, r]`.

        logits [..., 1 or n, V_draft]: by themselves; hidden [..., n, h]: of the slot; memory [..., n, r]: the states
        before the tokens; among: see `MarkovHead.added`. Returns `logits` where the head adds nothing."""
        head = self.recurrent
        assert head is not None
        read = tokens if isinstance(head, MarkovHead) else self.embed(tokens)
        said, memory = head.read(read, hidden, memory)
        return (logits if slot < self.config.plain_slots else logits + head.added(said, among)), memory

    def said(self, places: Tensor, before: Tensor) -> Tensor | None:
        """What the tokens before the first k slots of blocks say, `[A, k, r]`, for the head's `added` (None: no head).

        places [A, B, h]: of the blocks; before [A, k]: the token before each slot, the anchor first. Of slots to which
        the head adds nothing it is 0."""
        head, hidden = self.recurrent, self.slots(places)[:, : before.shape[1]]
        if head is None:
            return None if self.head is None else self.head.said(before, hidden)
        read = before if isinstance(head, MarkovHead) else self.embed(before)
        memory, said = self.memory(places, before[:, 0]), list[Tensor]()
        assert memory is not None
        for slot, (tokens, states) in enumerate(zip(read.unbind(1), hidden.unbind(1), strict=True)):
            one, memory = head.read(tokens, states, memory)
            said.append(one if slot >= self.config.plain_slots else torch.zeros_like(one))
        return torch.stack(said, 1)

    def over_target(self, logits: Tensor) -> Tensor:
        """`logits [..., V_draft]` over the target's tokens `[..., V_target]`, -inf for those that are never drafted."""
        return over_target(logits, self.draft_tokens, self.config.target_vocab_size)

    def accepted(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """The logit of the probability that the tokens of places of `hidden [..., h]` are accepted, `[...]`.

        tokens [...]: those before the places. Raises ValueError for a drafter without such a head."""
        if self.confidence_head is None:
            raise ValueError("this drafter has no confidence head, its config says confidence 'none'")
        return self.confidence_head(self.read_by_confidence(hidden, tokens))

    def read_by_confidence(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """What the confidence head reads of the arguments of `accepted`, `[..., h]` or `[..., h + r]`."""
        if self.config.confidence == "hidden":
            return hidden
        assert self.markov_head is not None
        return torch.cat([hidden, self.markov_head.markov_w1(tokens)], -1)
