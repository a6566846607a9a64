"""Whether sampled text is the target's own.

A token drawn from the target's p has a place in [0, 1): the p-mass of the tokens before it in some order, and a random
share of its own. Places are then independent and uniform, whatever the prefix (the randomised transform of Smith 1985),
which the Kolmogorov-Smirnov test checks. Tokens are ordered by q / p, those first that the draft overrates most: there
a wrong acceptance rule shows. The largest gap between the places' distribution and the uniform one is at most the total
variation between what was drawn and p, averaged over the prefixes."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

DOUBT = 0.001  # the p-value below which text is said not to be the target's own


def places_of(p: Tensor, q: Tensor, tokens: Tensor, generator: torch.Generator) -> Tensor:
    """Places `[N]` of `tokens [N]`, given the target's and the draft's log probabilities `p`, `q` `[N, V]`.

    >>> half = torch.tensor([[0.5, 0.5]]).log()
    >>> bool(places_of(half, torch.tensor([[0.1, 0.9]]).log(), torch.tensor([1]), torch.Generator()) < 0.5)
    True
    """
    chosen = tokens[:, None]
    gap = q - p
    own = gap.gather(1, chosen)
    ids = torch.arange(p.shape[1])
    before = (gap > own) | ((gap == own) & (ids < chosen))
    below = torch.where(before, p.exp(), 0.0).sum(1)
    return below + torch.rand(len(tokens), generator=generator, dtype=p.dtype) * p.gather(1, chosen)[:, 0].exp()


def kolmogorov(places: Sequence[float]) -> tuple[float, float]:
    """The largest gap between the distribution of `places` and the uniform one, and its p-value (asymptotic).

    >>> kolmogorov([0.05, 0.35, 0.65, 0.95])[1] > 0.9, kolmogorov([0.01] * 50)[1] < 1e-9
    (True, True)
    """
    ordered, count = sorted(places), len(places)
    gap = max(max((i + 1) / count - place, place - i / count) for i, place in enumerate(ordered))
    scaled = (math.sqrt(count) + 0.12 + 0.11 / math.sqrt(count)) * gap  # Stephens 1970
    if scaled < 0.3:
        return gap, 1.0
    tail = 2 * sum((-1) ** (k - 1) * math.exp(-2 * (k * scaled) ** 2) for k in range(1, 101))
    return gap, min(1.0, max(0.0, tail))


@torch.inference_mode()
def judge(target, draft, prompts: Sequence[list[int]], texts: Sequence[list[int]], seed: int = 0) -> dict:
    """What a method's sampled texts say: `tokens` tested, the `gap`, the `p_value`, and whether they are the `own`."""
    generator, places = torch.Generator().manual_seed(seed), []
    for prompt, text in zip(prompts, texts, strict=True):
        ids = torch.tensor([prompt + text])
        p, q = (model(ids, logits_to_keep=len(text) + 1).logits[0, :-1].double().log_softmax(-1)
                for model in (target, draft))  # fmt: skip
        places += places_of(p, q, torch.tensor(text), generator).tolist()
    gap, p_value = kolmogorov(places)
    return {"tokens": len(places), "gap": gap, "p_value": p_value, "own": p_value >= DOUBT}
