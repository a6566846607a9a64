"""What a round reads of its rows, their last tokens, and keeps of them, the features of accepted nodes."""

import torch
from torch import Tensor

from attention.dispatch import resolve


def recent(tokens: Tensor, lengths: Tensor, count: int, impl: str | None = None) -> Tensor:
    """`[A, count]`: the last ones of `tokens [A, L]`, of which the first `lengths [A]` are valid."""
    if resolve(impl, tokens.device) == "triton":
        from specdec.requests.kept_kernel import launch_recent

        return launch_recent(tokens, lengths, count)
    place = lengths[:, None] - 1 if count == 1 else lengths[:, None] + torch.arange(-count, 0, device=lengths.device)
    return tokens.gather(1, place.clamp(min=0))


def shifted(kept: Tensor, features: Tensor, path: Tensor, counts: Tensor) -> Tensor:
    """`kept [A, K, W]` without its first ones, for which those of accepted nodes come; see `Rows.keep_features`."""
    place = counts[:, None] + 1 + torch.arange(kept.shape[1], device=counts.device)
    wide = lambda index: index[..., None].expand(-1, -1, features.shape[2])
    accepted = features.gather(1, wide(torch.nn.functional.pad(path, (1, 0))))
    return torch.cat([kept, accepted], 1).gather(1, wide(place))


def keep_accepted(kept: Tensor, features: Tensor, path: Tensor, counts: Tensor, alive: Tensor,
                  impl: str | None = None) -> None:  # fmt: skip
    """`shifted` in place for rows that are `alive [A]`; others stay."""
    if resolve(impl, kept.device) == "triton":
        from specdec.requests.kept_kernel import launch_keep

        launch_keep(kept, features, path, counts, alive)
        return
    kept.copy_(torch.where(alive[:, None, None], shifted(kept, features, path, counts), kept))
