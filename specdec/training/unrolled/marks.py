"""After which tokens of a text the further steps run: fewer with each, as P-EAGLE drops them (arXiv 2602.01469)."""

import torch
from torch import Tensor

from specdec.training.data import Rows
from specdec.training.labels import IGNORED
from specdec.training.unrolled.settings import UnrolledSettings


def mark_depths(rows: Rows, labels: Tensor, settings: UnrolledSettings, step: int) -> Rows:
    """`rows` with the number of steps after each token marked, int64 `[B, S]`, drawn for the training's `step`.

    A token keeps its k-th step if it has all before; a step after its last label is left out.

    labels `[depth, B, S]`: of each step."""
    generator = torch.Generator().manual_seed(hash((settings.seed, step)) % 2**63)
    drawn = torch.rand(rows.tokens.shape, generator=generator)
    shares = torch.tensor([settings.kept(depth) for depth in range(len(labels))])
    kept = (drawn[None] < shares[:, None, None]).sum(0)  # shares never rise
    number = torch.arange(1, len(labels) + 1)[:, None, None]
    last = torch.where((labels != IGNORED) & (number <= kept), number, 0).amax(0)
    return Rows(rows.tokens, rows.labels, rows.documents, last)
