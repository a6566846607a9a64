"""Heads over a block's states: what a drafted token says about the next one, and whether the target will accept it.

The Markov head adds logits to those of a place, given the token before: one row of a table of low rank, which makes
conditional distributions out of one pass (DSpark, arXiv 2607.05147). DFlash2's selector does the same among the most
likely tokens of a place. Domino's head (arXiv 2605.29707) follows all tokens of the block before a place."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from specdec.drafters.block.config import BlockConfig


def products(weight: Tensor, said: Tensor, among: Tensor | None = None) -> Tensor:
    """`said [..., r]` times `weight [V, r]`, `[..., V]`.

    among `[A, M]`: the rows for which it is wanted (None: all), of `said [A, n, r]` -> `[A, n, M]`."""
    return functional.linear(said, weight) if among is None else said @ weight[among].transpose(1, 2)


def numbered(said: Tensor) -> tuple[Tensor, Tensor]:
    """`said [..., r]` as a matrix `[X, r]`, and the row of each vector, `[...]`."""
    return said.flatten(0, -2), torch.arange(said[..., 0].numel(), device=said.device).view(said.shape[:-1])


class MarkovHead(nn.Module):
    """Logits of a place given the token before it: W2 W1[token], "gated" by the place's state, or with a state of its
    own that has seen all tokens before ("rnn").

    W1 has a row for each token of the target, W2 one for each that is drafted; r: the rank."""

    def __init__(self, config: BlockConfig):
        super().__init__()
        self.kind, rank, hidden = config.markov, config.markov_rank, config.hidden_size
        self.markov_w1 = nn.Embedding(config.target_vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, config.draft_vocab_size, bias=False)
        if self.kind == "gated":
            self.gate_proj = nn.Linear(hidden + rank, rank)
        if self.kind == "rnn":
            self.joint_proj = nn.Linear(2 * rank + hidden, 3 * rank)

    def start(self, hidden: Tensor) -> Tensor:
        """The state before a block `[..., r]`, for places of `hidden [..., h]`."""
        return hidden.new_zeros(*hidden.shape[:-1], self.markov_w1.weight.shape[1])

    def said(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """What `tokens [...]` before places of `hidden [..., h]` say, `[..., r]`, to a head without a state."""
        said = self.markov_w1(tokens)
        return said if self.kind == "vanilla" else self._gate(said, hidden) * said

    def vectors(self, tokens: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """What `said` gives, as rows of a matrix `[X, r]` and the row of each token, `[...]` int64."""
        if self.kind == "vanilla":
            return self.markov_w1.weight, tokens
        return numbered(self.said(tokens, hidden))

    @property
    def weight(self) -> Tensor:
        """`[V_draft, r]`: what `added` multiplies by."""
        return self.markov_w2.weight

    def added(self, said: Tensor, among: Tensor | None = None) -> Tensor:
        """What is added to logits, `[..., V_draft]`, where `said [..., r]`.

        among `[A, M]`: the draft tokens for which it is wanted (None: all), of `said [A, n, r]` -> `[A, n, M]`."""
        return products(self.weight, said, among)

    def read(self, tokens: Tensor, hidden: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """What an "rnn" says, `[..., r]`, after `tokens [...]` before places of `hidden [..., h]`, and its state then.

        state [..., r]: before these tokens."""
        read = torch.cat([state, self.markov_w1(tokens), hidden], -1)
        gate, new, out = self.joint_proj(read).chunk(3, -1)
        gate = torch.sigmoid(gate)
        return torch.tanh(out), gate * state + (1 - gate) * torch.tanh(new)

    def _gate(self, said: Tensor, hidden: Tensor) -> Tensor:
        return torch.sigmoid(self.gate_proj(torch.cat([hidden, said], -1)))


class SelectorHead(nn.Module):
    """Logits of a place given the token before it, among the place's candidates: (P[token] * W h) . S[candidate].

    P and S are codebooks with a row for each token, h is the place's state (DFlash2)."""

    def __init__(self, config: BlockConfig):
        super().__init__()
        self.count, shape = config.candidates, (config.target_vocab_size, config.markov_rank)
        self.predecessor_codebook, self.successor_codebook = (nn.Parameter(torch.zeros(shape)) for _ in range(2))
        self.hidden_projection = nn.Linear(config.hidden_size, config.markov_rank, bias=False)

    def only_candidates(self, logits: Tensor) -> Tensor:
        """`logits [..., V]` with -inf for all but the candidates, the most likely tokens."""
        values, tokens = logits.topk(self.count, -1)
        return torch.full_like(logits, float("-inf")).scatter(-1, tokens, values)

    def said(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """See `MarkovHead.said`."""
        return functional.embedding(tokens, self.predecessor_codebook) * self.hidden_projection(hidden)

    def vectors(self, tokens: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """See `MarkovHead.vectors`."""
        return numbered(self.said(tokens, hidden))

    @property
    def weight(self) -> Tensor:
        """See `MarkovHead.weight`."""
        return self.successor_codebook

    def added(self, said: Tensor, among: Tensor | None = None) -> Tensor:
        """See `MarkovHead.added`; for tokens that are no candidates too, whose logits are -inf."""
        return products(self.weight, said, among)


class PrefixGRU(nn.Module):
    """One step of a GRU without biases, with the names of `torch.nn.GRU` (Cho et al. 2014)."""

    def __init__(self, size: int, state_size: int):
        super().__init__()
        most = state_size**-0.5
        make = lambda width: nn.Parameter(torch.empty(3 * state_size, width).uniform_(-most, most))
        self.weight_ih_l0, self.weight_hh_l0 = make(size), make(state_size)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        """The state after `x [..., h]`, where it was `state [..., s]` before."""
        read, held = functional.linear(x, self.weight_ih_l0), functional.linear(state, self.weight_hh_l0)
        (reset, update, new), (held_reset, held_update, held_new) = read.chunk(3, -1), held.chunk(3, -1)
        reset, update = torch.sigmoid(reset + held_reset), torch.sigmoid(update + held_update)
        return (1 - update) * torch.tanh(new + reset * held_new) + update * state


class DominoHead(nn.Module):
    """Logits of a place given all tokens of the block before it, the last accepted one first: W2 silu(W1 [x; state]).

    x is the place's state, `state` that of a GRU which has read the tokens' embeddings (arXiv 2605.29707)."""

    def __init__(self, config: BlockConfig):
        super().__init__()
        hidden, self._size, rank = config.hidden_size, config.memory_size, config.markov_rank
        self.prefix_gru = PrefixGRU(hidden, self._size)
        last = nn.Linear(rank, config.draft_vocab_size, bias=False)
        self.embed_proj = nn.Sequential(nn.Linear(hidden + self._size, rank, bias=False), nn.SiLU(), last)

    def start(self, hidden: Tensor) -> Tensor:
        """The state before a block `[..., s]`, for places of `hidden [..., h]`."""
        return hidden.new_zeros(*hidden.shape[:-1], self._size)

    def read(self, embedded: Tensor, hidden: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """See `MarkovHead.read`; of the tokens it reads what is `embedded [..., h]`."""
        state, (narrow, activation, _) = self.prefix_gru(embedded, state), self.embed_proj
        return activation(narrow(torch.cat([hidden, state], -1))), state

    def added(self, said: Tensor, among: Tensor | None = None) -> Tensor:
        """See `MarkovHead.added`."""
        return products(cast(nn.Linear, self.embed_proj[2]).weight, said, among)


class ConfidenceHead(nn.Module):
    """The logit of the probability that the target accepts the token of a place, from tokens before it alone."""

    def __init__(self, config: BlockConfig):
        super().__init__()
        self.proj = nn.Linear(config.hidden_size + (config.markov_rank if config.confidence == "markov" else 0), 1)

    def forward(self, read: Tensor) -> Tensor:
        """`[..., h]` or `[..., h + r]` -> `[...]`."""
        return self.proj(read)[..., 0]
