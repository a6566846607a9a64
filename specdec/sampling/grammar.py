"""Grammars: a matcher, which follows one text token by token, wrapped as a logits processor for any text.

Verifying a draft needs the allowed tokens after many texts with a common beginning. For each, the processor rolls the
matcher back to the common beginning and feeds it the rest."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class Matcher(Protocol):
    """The state of a grammar after the tokens accepted since the end of the prompt."""

    def accept(self, token: int) -> bool:
        """Accept a token; returns False, with the state unchanged, if the grammar forbids it."""

    def rollback(self, count: int) -> None:
        """Undo the last `count` accepted tokens."""

    def ended(self) -> bool:
        """Whether the last accepted token ended the text."""

    def allowed(self, size: int) -> Tensor:
        """`[size]` bool on the CPU: which tokens may come next."""


class GrammarProcessor:
    """Sets the scores of tokens that a grammar forbids to -inf; `start()` makes a new `Matcher` for a row.

    Works with the generators here and as a logits processor of transformers' `generate`. The grammar applies to the
    text after the prompt.

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
        """The processor of one row, whose prompt has `width` tokens."""
        return _Text(self._start(), width)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Process `scores [B, V]` after `input_ids [B, L]`, as transformers calls a processor.

        Texts that do not continue those of the last call start new matchers."""
        length, prompts = input_ids.shape[1], self._prompts
        continues = prompts is not None and prompts.shape[1] < length <= self._longest + 1
        if prompts is None or not continues or not torch.equal(input_ids[:, : prompts.shape[1]], prompts):
            self._prompts, self._longest = input_ids.clone(), length
            self._texts = [self.for_row(row, length) for row in range(len(input_ids))]
        self._longest = max(self._longest, length)
        one_by_one = zip(self._texts, input_ids.split(1), scores.split(1), strict=True)
        return torch.cat([text(ids, of_row) for text, ids, of_row in one_by_one])


class _Text:
    """The processor of one text: a matcher and the tokens it has accepted."""

    def __init__(self, matcher: Matcher, width: int):
        self._matcher, self._width = matcher, width
        self._read: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Process `scores [1, V]` after `input_ids [1, L]`.

        After the end of a text nothing is forbidden, after a text that breaks the grammar everything is."""
        matcher, text = self._matcher, input_ids[0, self._width :].tolist()
        shorter = min(len(self._read), len(text))
        common = next((i for i in range(shorter) if self._read[i] != text[i]), shorter)
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
    """The processor of an `xgrammar.CompiledGrammar`, such as `compiler.compile_json_schema(…)`.

    The tokenizer info that the grammar was compiled with must name the call's end-of-text tokens as stop tokens."""
    return GrammarProcessor(lambda: _XGrammar(grammar))


class _XGrammar:
    """xgrammar's matcher as a `Matcher`."""

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
    """The processor of a grammar of llguidance.

    `tokenizer` is an `LLTokenizer` (`llguidance.hf.from_tokenizer(…)`), `grammar` a string such as
    `LLMatcher.grammar_from_json_schema(…)` returns. Raises ValueError for a grammar that llguidance cannot read."""
    return GrammarProcessor(lambda: _LLGuidance(tokenizer, grammar))


class _LLGuidance:
    """llguidance's matcher as a `Matcher`.

    End tokens are tracked here, because llguidance refuses an end token that it allowed where nothing else can come.
    Others go through `try_consume_tokens`, since `consume_token` never recovers from a refused token."""

    def __init__(self, tokenizer, grammar: str):
        import llguidance

        self._matcher, self._ends = llguidance.LLMatcher(tokenizer, grammar), set(tokenizer.eos_tokens)
        self._ended = False
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
    """The first `size` bits of bytes `words [n]` as bool; missing bits are False."""
    bits = (words[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).bool().flatten()[:size]
    return torch.nn.functional.pad(bits, (0, size - len(bits)))
