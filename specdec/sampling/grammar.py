"""Grammars: a matcher that follows one text token by token, made a logits processor that may be asked about any text.

Drafts ask about many texts that begin alike. The processor takes back what the matcher has read beyond the common
beginning and lets it read the rest, so the matcher must be able to roll back; everything else is the matcher's own
work."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class Matcher(Protocol):
    """The state of a grammar behind the tokens that it has accepted since the end of the prompt."""

    def accept(self, token: int) -> bool:
        """Read a token; False, and nothing has happened, where the grammar forbids it."""

    def rollback(self, count: int) -> None:
        """Take back the last `count` tokens that were accepted."""

    def ended(self) -> bool:
        """Whether the last token was one that ends the text."""

    def allowed(self, size: int) -> Tensor:
        """`[size]` bool on the CPU: which tokens may come next."""


class GrammarProcessor:
    """Tokens that a grammar forbids get -inf; `start()` gives a `Matcher` that has read nothing, one for each row of a
    batch.

    For the generators here, where each call starts anew, and as a logits processor of transformers' `generate`. What
    stands in the prompt is not part of the grammar's text.

    >>> class Digits:  # one to three times the token 7, then the end token 2
    ...     def __init__(self): self.text = []
    ...     def accept(self, token):
    ...         fits = bool(self.allowed(8)[token])
    ...         self.text += [token] * fits
    ...         return fits
    ...     def rollback(self, count): del self.text[len(self.text) - count :]
    ...     def ended(self): return self.text[-1:] == [2]
    ...     def allowed(self, size):
    ...         mask = torch.zeros(size, dtype=torch.bool)
    ...         mask[7], mask[2] = len(self.text) < 3, len(self.text) > 0
    ...         return mask
    >>> text = GrammarProcessor(Digits).for_row(0, width=2)
    >>> allowed = lambda *ids: text(torch.tensor([ids]), torch.zeros(1, 8)).isfinite().nonzero()[:, 1].tolist()
    >>> [allowed(5, 6), allowed(5, 6, 7), allowed(5, 6, 7, 7, 7), allowed(5, 6)]
    [[7], [2, 7], [2], [7]]
    """

    def __init__(self, start: Callable[[], Matcher]):
        self._start = start
        self._prompts: Tensor | None = None
        self._texts: list[_Text] = []
        self._longest = 0

    def for_row(self, row: int, width: int) -> "_Text":
        """The processor of one text, whose prompt has `width` tokens."""
        return _Text(self._start(), width)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`input_ids [B, L]` and `scores [B, V]` of a batch, as transformers calls a processor; texts that do not go on
        from the last call are new.
        """
        length, prompts = input_ids.shape[1], self._prompts
        known = (
            prompts is not None
            and prompts.shape[1] < length <= self._longest + 1
            and torch.equal(input_ids[:, : prompts.shape[1]], prompts)
        )
        if not known:
            self._prompts, self._longest = input_ids.clone(), length
            self._texts = [self.for_row(row, length) for row in range(len(input_ids))]
        self._longest = max(self._longest, length)
        return torch.cat(
            [text(input_ids[row : row + 1], scores[row : row + 1]) for row, text in enumerate(self._texts)]
        )


class _Text:
    """The processor of one text: a matcher and what it has read."""

    def __init__(self, matcher: Matcher, width: int):
        self._matcher, self._width, self._read = matcher, width, []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`input_ids [1, L]`, `scores [1, V]`. Nothing is forbidden behind the end of a text, and everything behind a
        text that breaks the grammar.
        """
        matcher, text = self._matcher, input_ids[0, self._width :].tolist()
        common = next(
            (i for i, (a, b) in enumerate(zip(self._read, text, strict=False)) if a != b),
            min(len(self._read), len(text)),
        )
        if common < len(self._read):
            matcher.rollback(len(self._read) - common)
            del self._read[common:]
        for token in text[common:]:
            if matcher.ended():
                return scores
            if not matcher.accept(token):
                return torch.full_like(scores, float("-inf"))
            self._read.append(token)
        if matcher.ended():
            return scores
        return scores.masked_fill(~matcher.allowed(scores.shape[1]).to(scores.device), float("-inf"))


def xgrammar_processor(grammar) -> GrammarProcessor:
    """The processor of an `xgrammar.CompiledGrammar` (`GrammarCompiler(tokenizer_info).compile_json_schema(…)`, say).

    Its stop tokens are those of the tokenizer info; they should be the end-of-text tokens of the call.
    """
    return GrammarProcessor(lambda: _XGrammar(grammar))


class _XGrammar:
    """A `Matcher` around xgrammar's."""

    def __init__(self, grammar):
        import xgrammar

        self._matcher = xgrammar.GrammarMatcher(grammar)
        self._bits = xgrammar.allocate_token_bitmask(1, grammar.tokenizer_info.vocab_size)

    def accept(self, token: int) -> bool:
        return self._matcher.accept_token(token)

    def rollback(self, count: int) -> None:
        self._matcher.rollback(count)

    def ended(self) -> bool:
        return self._matcher.is_terminated()

    def allowed(self, size: int) -> Tensor:
        self._matcher.fill_next_token_bitmask(self._bits)
        return _unpacked(self._bits[0].view(torch.uint8), size)


def llguidance_processor(tokenizer, grammar: str) -> GrammarProcessor:
    """The processor of a grammar of llguidance: `tokenizer` is its `LLTokenizer` (`llguidance.hf.from_tokenizer(…)`),
    `grammar` what `LLMatcher.grammar_from_json_schema(…)` and its kin give. Raises ValueError for a grammar that
    llguidance cannot read."""
    return GrammarProcessor(lambda: _LLGuidance(tokenizer, grammar))


class _LLGuidance:
    """A `Matcher` around llguidance's, which a token refused by `consume_token` would end for good, and which refuses
    an end token that it has offered where nothing else can come: the end of a text is kept here."""

    def __init__(self, tokenizer, grammar: str):
        import llguidance

        self._matcher, self._ends, self._ended = (
            llguidance.LLMatcher(tokenizer, grammar),
            set(tokenizer.eos_tokens),
            False,
        )
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ValueError(f"llguidance: {self._matcher.get_error()}")

    def accept(self, token: int) -> bool:
        if token in self._ends:
            self._ended = self._matcher.is_accepting()
            return self._ended
        return self._matcher.try_consume_tokens([token]) == 1

    def rollback(self, count: int) -> None:
        count, self._ended = count - self._ended, False
        if count:
            self._matcher.rollback(count)
        self._check()

    def ended(self) -> bool:
        return self._ended

    def allowed(self, size: int) -> Tensor:
        mask = _unpacked(torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8), size)
        self._check()
        return mask


def _unpacked(words: Tensor, size: int) -> Tensor:
    """The first `size` bits of bytes `words [n]` as bool; those that are not there are False."""
    bits = (words[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).bool().flatten()[:size]
    return torch.nn.functional.pad(bits, (0, size - len(bits)))
