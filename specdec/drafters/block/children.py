"""The likeliest children of a level's nodes among some tokens, where their logits are a sum (`slots.Factors`)."""

import torch
from torch import Tensor

from attention.dispatch import resolve
from specdec.drafters.block.heads import products
from specdec.drafters.block.slots import Factors
from specdec.sampling.draws import MAX_TOP, top_log_probs

MOST_COLUMNS, LOW = 1024, (torch.float32, torch.bfloat16, torch.float16)  # tokens that one program compares


def likeliest_among(factors: Factors, among: Tensor, count: int, impl: str | None = None) -> tuple[Tensor, Tensor]:
    """Log-probabilities among the tokens `among [A, M]` of each node's `count` likeliest, and their columns of `among`.

    Both are `[A, n, count]`; the first of equal ones come first, and rows of logits with NaN give NaN. The kernel adds
    up in float32 and rounds nothing before the end; PyTorch rounds both terms and the sum to their dtype."""

    def fallback_reason() -> str | None:
        dtypes = {factors.own.dtype, factors.vectors.dtype, factors.weight.dtype}
        if not dtypes <= {*LOW}:
            return f"it adds up in float32, got {dtypes}"
        if among.shape[1] > MOST_COLUMNS or count > MAX_TOP:
            return f"it takes up to {MOST_COLUMNS} tokens and {MAX_TOP} children, got {among.shape[1]} and {count}"
        return None

    if resolve(impl, among.device, fallback_reason) == "triton":
        from specdec.drafters.block.children_kernel import launch_children

        return launch_children(factors, among, count)
    own = factors.own.gather(1, among)[:, None]
    return top_log_probs(own + products(factors.weight, factors.vectors[factors.chosen], among), count)
