"""The texts at the nodes of a draft, as processors see them."""

from dataclasses import dataclass

import torch
from torch import Tensor

NONE = -1  # where there is no token


@dataclass(frozen=True, slots=True)
class Prefixes:
    """The texts at n nodes of A rows.

    tokens [A, L], lengths [A]: the rows' own texts, valid up to `lengths`
    paths [A, n, D]: the drafted tokens down to each node
    depths [A or 1, n or 1]: how many of these are valid
    """

    tokens: Tensor
    lengths: Tensor
    paths: Tensor
    depths: Tensor

    @classmethod
    def of(cls, tokens: Tensor, lengths: Tensor, paths: Tensor, depths: Tensor | None) -> "Prefixes":
        """See the class; where `depths` is None, whole paths are valid."""
        whole = torch.full((1, 1), paths.shape[2], device=paths.device) if depths is None else depths
        return cls(tokens, lengths, paths, whole)

    def behind(self, front: Tensor) -> "Prefixes":
        """The same behind the tokens `front [F, A]`, which are -1 before the first one."""
        if not len(front):
            return self
        tokens = torch.cat([front.t(), self.tokens], 1)
        return Prefixes(tokens, self.lengths + len(front), self.paths, self.depths)

    def near(self, count: int) -> tuple[Tensor, Tensor]:
        """`[A, n, count + D]`: the last `count` tokens of each row's own text, then its paths; and `[A, n, count]`: the
        last ones at each node. -1 where there is none."""
        step = torch.arange(count, device=self.tokens.device)
        place = self.lengths[:, None] - count + step
        recent = torch.where(place < 0, NONE, self.tokens.gather(1, place.clamp(min=0)))
        rows, nodes, _ = self.paths.shape
        near = torch.cat([recent[:, None].expand(-1, nodes, -1), self.paths], 2)
        return near, near.gather(2, (self.depths[..., None] + step).expand(rows, nodes, -1))

    def times(self, start: Tensor, vocab_size: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """How often tokens occur in the texts from `start [A]` on.

        Pairs of tokens `[A, n, m]` and numbers `[A, n or 1, m]` in `dtype`, first for the rows' own texts alone, then
        for tokens of the paths in all.

        Every token of a text is in one of them; some that are not valid occur too, with their right number."""
        place = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        valid = (place >= start[:, None]) & (place < self.lengths[:, None]) & (self.tokens >= 0)
        text, (rows, nodes, deepest) = self.tokens.clamp(min=0), self.paths.shape
        counts = torch.zeros(rows, vocab_size, dtype=dtype, device=text.device).scatter_add_(1, text, valid.to(dtype))
        found = [(text[:, None].expand(-1, nodes, -1), counts.gather(1, text)[:, None])]
        if deepest:
            step = torch.arange(deepest, device=text.device)
            drafted = (step < self.depths[..., None]) & (self.lengths[:, None, None] + step >= start[:, None, None])
            equal = (self.paths[..., None] == self.paths[..., None, :]) & drafted[..., None, :]
            before = counts.gather(1, self.paths.flatten(1)).view(self.paths.shape)
            found.append((self.paths, before + equal.sum(-1)))
        return found
