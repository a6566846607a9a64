"""A drafter of your own (python -m scripts.examples.own_drafter): what followed the last token the time before."""

import torch

import specdec


class LastTimeDrafter:
    """Proposes chains of `max_tokens` tokens. It keeps no state, so it is its own session in a call."""

    shapes, max_tokens = "own", 4

    def validate(self, target):
        """Fits every target."""

    def start(self, context, max_tokens):  # noqa: D102
        self.context = context
        return self

    def propose(self, rows, tree=None):
        """The root is the last token, which also fills up a guess that is too short."""
        tokens = [self._guess(self.context.tokens[row, : self.context.lengths[row]].tolist()) for row in rows]
        return specdec.Draft(specdec.TokenTree.chain(self.max_tokens), torch.tensor(tokens))

    def _guess(self, text):
        before = next((i for i in reversed(range(len(text) - 1)) if text[i] == text[-1]), len(text))
        followed = text[before + 1 : before + 1 + self.max_tokens]
        return [text[-1], *followed, *[text[-1]] * (self.max_tokens - len(followed))]

    def commit(self, rows, paths): ...  # noqa: D102, nothing to remember

    def release(self, rows): ...  # noqa: D102


if __name__ == "__main__":
    torch.set_num_threads(1)  # the shipped models are too small to gain from more
    pair = specdec.load_tiny_pair()
    ids = pair.tokenizer(pair.prompts["data"][0], return_tensors="pt").input_ids
    out = specdec.SpeculativeGenerator(pair.target, LastTimeDrafter()).generate(ids, max_new_tokens=48)
    print(f"{out.stats.pooled.tokens_per_round:.2f} tokens per round")
