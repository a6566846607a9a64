"""Samples after chosen prefixes against the target's exact distribution of every token that is drawn."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specdec.auditing.bins import LIKELIEST, Comparison, compare, corrected
from specdec.auditing.control import WrongRule
from specdec.auditing.readings import Readings
from specdec.generation.generators import SpeculativeGenerator
from specdec.report.stats import RoundStats
from specdec.report.terminal import authors
from specdec.requests.request import Request, build_request

AT_ONCE = 1 << 24  # numbers of logits that are held


@dataclass(frozen=True, slots=True)
class TokenTest:
    """The test of one token of the samples after one prefix.

    prefix, token: which prefix, and which new token after it, from 1.
    compared: drawn against expected.
    impossible: draws of tokens that the target gives no probability, which rounding at a boundary does not explain.
    drafted: of these tokens, accepted drafts.
    """

    prefix: int
    token: int
    compared: Comparison
    impossible: int
    drafted: int

    def fails(self, level: float) -> bool:
        """Whether the drawn tokens are not the target's, at `level` for this test alone."""
        return self.impossible > 0 or self.compared.p_value < level

    def as_dict(self, level: float) -> dict:
        """All of it, ready for JSON."""
        one = self.compared
        return {
            "part": "sampled", "prefix": self.prefix, "token": self.token, "rows": one.rows,
            "statistic": one.statistic, "freedom": one.freedom, "rounding": one.rounding, "p_value": one.p_value,
            "variation": one.variation, "detectable": one.detectable(level), "impossible": self.impossible,
            "drafted": self.drafted, "verdict": "failed" if self.fails(level) else "passed",
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class SampledAudit:
    """Samples of `tokens` tokens, `samples` of them after each prefix, at `level` over all tests together.

    control: the same tests of a rule that is wrong by `wrong_by` (None: nothing could vary, so it did not run).
    drafted: tokens proposed on the way.
    """

    samples: int
    level: float
    tests: tuple[TokenTest, ...]
    control: tuple[TokenTest, ...]
    wrong_by: float | None
    drafted: int

    @property
    def level_of_each(self) -> float:
        """The level of one test."""
        return corrected(self.level, [test.compared for test in self.tests])

    @property
    def failed(self) -> tuple[TokenTest, ...]:
        """The tests that failed."""
        return tuple(test for test in self.tests if test.fails(self.level_of_each))

    @property
    def control_failed(self) -> bool:
        """Whether the wrong rule was found, as it must be."""
        return any(test.fails(self.level_of_each) for test in self.control)

    @property
    def p_value(self) -> float:
        """The smallest of all, times their number."""
        smallest = min((test.compared.p_value for test in self.tests), default=1.0)
        return min(1.0, smallest * self.level / self.level_of_each)

    @property
    def verdict(self) -> str:
        """ "failed", "passed", or "inconclusive": the control was not found, or nothing was ever drafted."""
        if self.failed:
            return "failed"
        return "passed" if self.control_failed and self.drafted else "inconclusive"


@dataclass(frozen=True, slots=True)
class Samples:
    """Which samples to draw: `number` of them of `tokens` tokens, in batches, with `options` of `generate`.

    done: called with how many have been drawn since."""

    number: int
    tokens: int
    batch: int
    options: Mapping[str, Any]
    done: Callable[[int], None]


def audit_sampled(generator: SpeculativeGenerator, with_rule: Callable[[WrongRule], SpeculativeGenerator],
                  readings: Readings, prefixes: Sequence[Tensor], samples: Samples, level: float,
                  seed: int) -> SampledAudit:  # fmt: skip
    """Draw texts after each of `prefixes [n]`, and compare every token with the target's distribution.

    with_rule: the same generator with another rule, for the control."""
    tests, drafted = _run(generator, readings, prefixes, samples, seed)
    least = corrected(level, [test.compared for test in tests])
    found = [v for test in tests if (v := test.compared.detectable(least)) is not None]
    control, wrong_by = list[TokenTest](), max(found, default=None)
    if wrong_by is not None:
        control, _ = _run(with_rule(WrongRule(wrong_by)), readings, prefixes, samples, seed + 1)
    return SampledAudit(samples.number, level, tuple(tests), tuple(control), wrong_by, drafted)


def _run(generator: SpeculativeGenerator, readings: Readings, prefixes: Sequence[Tensor], samples: Samples,
         seed: int) -> tuple[list[TokenTest], int]:  # fmt: skip
    """The tests of all prefixes and tokens, and how many tokens were drafted."""
    tests, drafted, tokens = [], 0, samples.tokens
    for number, prefix in enumerate(prefixes):
        drawn, lengths, stats = _draw(generator, prefix, samples, seed)
        mask = torch.ones_like(prefix[None])
        request = build_request(
            generator.target, prefix[None], mask, max_new_tokens=tokens, do_sample=True, seed=0, **samples.options
        )
        count, texts = _numbered(drawn[:, : tokens - 1])
        of_texts = drawn.new_zeros(count, tokens - 1).index_copy(0, texts, drawn[:, : tokens - 1])
        bins, expected, impossible = _expected(readings, request, prefix, of_texts, texts, drawn)
        written = [authors(row, tokens) for row in stats]
        drafted += sum(sum(row.proposed) for row in stats)
        for place in range(tokens):
            there = lengths > place
            if not bool(there.any()):
                break
            before, same = _numbered(drawn[there, :place])
            first = torch.zeros(before, dtype=torch.int64).scatter_(0, same, texts[there])
            compared = compare(bins[there, place], same, expected[:, first, place])
            accepted = sum(row[place] for row in written if len(row) > place)
            tests.append(TokenTest(number, place + 1, compared, int(impossible[there, place].sum()), accepted))
    return tests, drafted


def _numbered(texts: Tensor) -> tuple[int, Tensor]:
    """How many different `texts [n, m]` there are, and the number of each row's."""
    if texts.shape[1] == 0:
        return 1, torch.zeros(len(texts), dtype=torch.int64)
    different, number = torch.unique(texts, dim=0, return_inverse=True)
    return len(different), number


def _draw(generator: SpeculativeGenerator, prefix: Tensor, samples: Samples,
          seed: int) -> tuple[Tensor, Tensor, list[RoundStats]]:  # fmt: skip
    """New tokens `[N, tokens]` on the host, their numbers `[N]`, and each row's rounds.

    Calls have seeds of their own, rows of a call noise of their own."""
    drawn, lengths, stats = [], [], list[RoundStats]()
    for call, start in enumerate(range(0, samples.number, samples.batch)):
        ids = prefix.expand(min(samples.batch, samples.number - start), -1)
        settings = {"max_new_tokens": samples.tokens, "do_sample": True, "seed": seed + 7919 * call}
        out = generator.generate(ids, torch.ones_like(ids), **settings | dict(samples.options))
        new = out.sequences[:, len(prefix) :].cpu()
        drawn.append(torch.nn.functional.pad(new, (0, samples.tokens - new.shape[1])))
        lengths.append(out.lengths)
        stats += out.stats.rows
        samples.done(len(ids))
    return torch.cat(drawn), torch.cat(lengths), stats


def _expected(readings: Readings, request: Request, prefix: Tensor, of_texts: Tensor, texts: Tensor,
              drawn: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The bin of each drawn token `[N, T]`, the expected shares of bins `[2, U, T, K]`, and which draws are impossible.

    of_texts [U, T - 1]: the new tokens that the draws follow; texts [N]: which of them each row has."""
    tokens, bins, impossible = drawn.shape[1], torch.zeros_like(drawn), torch.zeros_like(drawn, dtype=torch.bool)
    whole = torch.cat([prefix.cpu().expand(len(of_texts), -1), of_texts], 1).to(prefix.device)
    expected = []
    for chosen in torch.arange(len(whole)).split(max(1, AT_ONCE // (tokens * readings.vocab_size))):
        logits = readings.both(whole[chosen.to(whole.device)], tokens)  # [2, u, T, V]
        flat = logits.flatten(0, 2)
        prefixes = [text[None, : len(prefix) + t] for _ in range(2) for text in whole[chosen] for t in range(tokens)]
        scores = request.processors(flat, [0] * len(flat), prefixes.__getitem__)
        p = scores.double().softmax(-1).view(logits.shape)
        likeliest = p[0].topk(min(LIKELIEST, p.shape[-1]), -1).indices
        shares = p.gather(-1, likeliest.expand(2, *likeliest.shape))
        expected.append(torch.cat([shares, (1 - shares.sum(-1, keepdim=True)).clamp(min=0)], -1).cpu())
        mine = ((texts >= chosen[0]) & (texts <= chosen[-1])).nonzero()[:, 0]
        if not len(mine):
            continue
        rows, said = (texts[mine] - chosen[0]).to(p.device), drawn[mine].to(p.device)
        hit = likeliest[rows] == said[..., None]
        bins[mine] = torch.where(hit.any(-1), hit.long().argmax(-1), likeliest.shape[-1]).cpu()
        impossible[mine] = _impossible(logits[:, rows], p[:, rows], said).cpu()
    return bins, torch.cat(expected, 1), impossible


def _impossible(logits: Tensor, p: Tensor, said: Tensor) -> Tensor:
    """Which tokens `said [n, T]` have no probability in either reading of `[2, n, T, V]`, by more than twice the noise
    from those that have."""
    noise = (logits[0] - logits[1]).abs().nan_to_num(0.0, 0.0).amax(-1)
    lowest = torch.where(p[0] > 0, logits[0], float("inf")).amin(-1)
    of_said = logits[0].gather(-1, said[..., None])[..., 0]
    none = (p.gather(-1, said[None, ..., None].expand(2, *said.shape, 1)) == 0).all(0)[..., 0]
    return none & (lowest - of_said > 2 * noise)
