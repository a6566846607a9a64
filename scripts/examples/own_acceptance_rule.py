"""An acceptance rule of your own: a function of the draft, the target's scores and the round's random numbers.

Run it: `python -m scripts.examples.own_acceptance_rule`.
"""

import torch

import specdec
from specdec.acceptance.base import deepest


class AmongTheBest:
    """Keep a drafted token if it is among the target's `count` likeliest; the next token is the likeliest one."""

    lossless = False  # it changes the target's distribution; results say so

    def __init__(self, count: int):
        self.count = count

    def __call__(self, draft: specdec.Draft, scores: torch.Tensor, noise) -> specdec.Acceptance:
        """`scores [B, N, V]` are the target's logits after each node; node 0 is the last accepted token."""
        best = scores.topk(self.count).indices  # [B, N, count]
        at_parent = best.gather(1, draft.tables.parent.expand_as(draft.tokens)[..., None].expand_as(best))
        kept = deepest(draft, (at_parent == draft.tokens[..., None]).any(-1))  # [B], the last node of the path
        return specdec.Acceptance.at(draft, kept, best[..., 0].gather(1, kept[:, None])[:, 0])


def main() -> None:
    """A looser rule keeps more of each draft, and writes another text."""
    pair = specdec.load_tiny_pair()
    ids = pair.tokenizer(pair.prompts["code"][0], return_tensors="pt").input_ids
    for count in (1, 8):
        drafter = specdec.ModelDrafter(pair.draft)
        generator = specdec.SpeculativeGenerator(pair.target, drafter, rule=AmongTheBest(count))
        out = generator.generate(ids, max_new_tokens=48, do_sample=True, seed=0)
        print(f"among the best {count}: {out.stats.pooled.tokens_per_round:.2f} tokens per round")


if __name__ == "__main__":
    main()
