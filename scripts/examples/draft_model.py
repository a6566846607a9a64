"""Speculative decoding with a draft model: the target's own greedy text, in fewer rounds.

Run it: `python -m scripts.examples.draft_model`.
"""

import torch

import specdec


def main() -> None:
    """Decode two prompts with and without the draft: the texts are equal."""
    torch.set_num_threads(1)  # the shipped models are too small to gain from more
    pair = specdec.load_tiny_pair()  # or any two transformers causal LMs of one vocabulary
    plain = specdec.AutoregressiveGenerator(pair.target)
    speculative = specdec.SpeculativeGenerator(plain.target, specdec.ModelDrafter(pair.draft, num_tokens=4))

    batch = pair.tokenizer(pair.prompts["code"][:2], return_tensors="pt", padding=True)
    given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "max_new_tokens": 48}
    expected, out = plain.generate(**given), speculative.generate(**given)

    assert out.sequences.equal(expected.sequences)  # a draft changes the speed, never the text
    print(pair.tokenizer.decode(out.sequences[0], skip_special_tokens=True))
    pooled = out.stats.pooled
    print(f"acceptance rate {pooled.acceptance_rate:.2f}, {pooled.tokens_per_round:.2f} tokens per round")


if __name__ == "__main__":
    main()
