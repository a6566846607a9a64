"""A drafter of your own (python -m scripts.examples.own_drafter): what followed the last token the time before."""

import torch

import specdec


class LastTimeDrafter:
    """Proposes chains of four tokens."""

    traits = specdec.DrafterTraits(max_tokens=4)

    def validate(self, target):
        """Fits every target."""

    def start(self, rows, max_tokens):
        """It keeps nothing between rounds, so all there is to a session is `propose`."""
        return specdec.StatelessSession(self.propose)

    def propose(self, batch, tree=None):
        """Node 0 is the last accepted token, which also fills up a guess that is too short."""
        tokens, lengths = batch.text()
        guesses = [self._guess(row[:n].tolist()) for row, (n,) in zip(tokens, lengths.tolist(), strict=True)]
        return specdec.Draft(specdec.TokenTree.chain(4), torch.tensor(guesses, device=tokens.device))

    def _guess(self, text):
        before = next((i for i in reversed(range(len(text) - 1)) if text[i] == text[-1]), len(text))
        followed = text[before + 1 : before + 5]
        return [text[-1], *followed, *[text[-1]] * (4 - len(followed))]


if __name__ == "__main__":
    torch.set_num_threads(1)  # the shipped models are too small to gain from more
    pair = specdec.load_tiny_pair()
    ids = pair.tokenizer(pair.prompts["data"][0], return_tensors="pt").input_ids
    out = specdec.SpeculativeGenerator(pair.target, LastTimeDrafter()).generate(ids, max_new_tokens=48)
    print(f"{out.stats.pooled.tokens_per_round:.2f} tokens per round")
