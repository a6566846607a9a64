"""Medusa heads: drafting from the target's own hidden state, on a tree of candidates.

Run it: `python -m scripts.examples.medusa_heads`.
"""

import torch

import medusa
import specdec
from medusa.tiny_heads import load_tiny_heads


def main() -> None:
    """Sample with the shipped heads, exactly and with Medusa's own lossy acceptance."""
    torch.set_num_threads(1)  # the shipped models are too small to gain from more
    pair = specdec.load_tiny_pair()
    heads, tree = load_tiny_heads()  # your own: medusa.MedusaHeads.from_pretrained(folder), medusa.load_tree(folder)
    print(f"{heads.config.num_heads} heads draft a tree of {tree.size} nodes and depth {tree.max_depth}")

    ids = pair.tokenizer(pair.prompts["code"][0], return_tensors="pt").input_ids
    sampling = {"do_sample": True, "temperature": 0.7, "max_new_tokens": 48, "seed": 0}
    for name, rule in (("exact", None), ("typical", specdec.Typical())):
        out = medusa.MedusaGenerator(pair.target, heads, tree, rule=rule).generate(ids, **sampling)
        print(f"{name}: {out.stats.pooled.tokens_per_round:.2f} tokens per round, lossless: {out.stats.lossless}")


if __name__ == "__main__":
    main()
