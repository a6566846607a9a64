"""Heads over a block's states: what a drafted token says about the next one, and whether the target will accept it.

The Markov head adds logits to those of a place, given the token before: one row of a table of low rank, which makes
conditional distributions out of one pass (DSpark, arXiv 2607.05147). DFlash2's selector does the same among the most
likely tokens of a place."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from specdec.drafters.block.config import BlockConfig


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

    @property
    def first_order(self) -> bool:
        """Whether what it says depends on the token before alone, not on those before that."""
        return self.kind != "rnn"

    def start(self, hidden: Tensor) -> Tensor:
        """The state before a block `[..., r]`, for places of `hidden [..., h]`."""
        return hidden.new_zeros(*hidden.shape[:-1], self.markov_w1.weight.shape[1])

    def said(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """What `tokens [...]` before places of `hidden [..., h]` say, `[..., r]`, to a head without a state."""
        said = self.markov_w1(tokens)
        return said if self.kind == "vanilla" else self._gate(said, hidden) * said

    def added(self, said: Tensor, among: Tensor | None = None) -> Tensor:
        """What is added to logits, `[..., V_draft]`, where `said [..., r]`.

        among `[A, M]`: the draft tokens for which it is wanted (None: all), of `said [A, n, r]` -> `[A, n, M]`."""
        if among is None:
            return self.markov_w2(said)
        return said @ self.markov_w2.weight[among].transpose(1, 2)

    def forward(self, tokens: Tensor, hidden: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """`tokens [...]` before places of `hidden [..., h]`, and the state before them `[..., r]`.

        Returns what it adds to the places' logits `[..., V_draft]`, and the state after them; only "rnn" changes it."""
        said, state = self.follow(tokens, hidden, state)
        return self.added(said), state

    def follow(self, tokens: Tensor, hidden: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """The arguments of `forward` -> what `added` takes, `[..., r]`, and the state after the places."""
        if self.first_order:
            return self.said(tokens, hidden), state
        read = torch.cat([state, self.markov_w1(tokens), hidden], -1)
        gate, new, out = self.joint_proj(read).chunk(3, -1)
        gate = torch.sigmoid(gate)
        return torch.tanh(out), gate * state + (1 - gate) * torch.tanh(new)

    def _gate(self, said: Tensor, hidden: Tensor) -> Tensor:
        return torch.sigmoid(self.gate_proj(torch.cat([hidden, said], -1)))


class SelectorHead(nn.Module):
    """Logits of a place given the token before it, among the place's candidates: (P[token] * W h) . S[candidate].

    P and S are codebooks with a row for each token, h is the place's state (DFlash2)."""

    first_order = True

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

    def added(self, said: Tensor, among: Tensor | None = None) -> Tensor:
        """See `MarkovHead.added`; for tokens that are no candidates too, whose logits are -inf."""
        if among is None:
            return functional.linear(said, self.successor_codebook)
        return said @ self.successor_codebook[among].transpose(1, 2)


class ConfidenceHead(nn.Module):
    """The logit of the probability that the target accepts the token of a place, from tokens before it alone."""

    def __init__(self, config: BlockConfig):
        super().__init__()
        self.proj = nn.Linear(config.hidden_size + (config.markov_rank if config.confidence == "markov" else 0), 1)

    def forward(self, read: Tensor) -> Tensor:
        """`[..., h]` or `[..., h + r]` -> `[...]`."""
        return self.proj(read)[..., 0]
