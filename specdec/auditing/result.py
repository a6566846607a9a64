"""What an audit found: a verdict, a table, and all of it for JSON."""

from collections.abc import Iterator
from dataclasses import dataclass

from specdec.auditing.bins import POWER
from specdec.auditing.greedy import CRITERION, GreedyAudit
from specdec.auditing.sampled import SampledAudit
from specdec.report.terminal import table

STATUS = {"passed": 0, "failed": 1, "inconclusive": 3}  # 2: bad input


@dataclass(frozen=True, slots=True)
class AuditResult:
    """What `specdec.audit` found, in the parts that ran; `print` shows tables and the reasons of the verdict."""

    greedy: GreedyAudit | None
    sampled: SampledAudit | None

    @property
    def verdict(self) -> str:
        """ "passed", "failed", or "inconclusive" where something could not have been found."""
        verdicts = [part.verdict for part in (self.greedy, self.sampled) if part is not None]
        return max(verdicts, key=["passed", "inconclusive", "failed"].index)

    @property
    def status(self) -> int:
        """Of a process: 0 passed, 1 failed, 3 inconclusive."""
        return STATUS[self.verdict]

    def __str__(self) -> str:
        parts = []
        if self.greedy is not None:
            parts.append("\n".join(_greedy_lines(self.greedy)))
        if self.sampled is not None:
            parts.append("\n".join(_sampled_lines(self.sampled)))
        return "\n\n".join([*parts, f"audit: {self.verdict}"])

    def methods(self) -> list[dict]:
        """One object a part, for a result file."""
        found: list[dict] = []
        if (greedy := self.greedy) is not None:
            found.append({
                "name": "greedy", "prompts": greedy.prompts, "new_tokens": greedy.new_tokens,
                "identical": dict(greedy.identical), "drafted": greedy.drafted, "accepted": greedy.accepted,
                "criterion": CRITERION, "verdict": greedy.verdict,
            })  # fmt: skip
        if (sampled := self.sampled) is not None:
            found.append({
                "name": "sampled", "samples": sampled.samples, "level": sampled.level,
                "level_of_each": sampled.level_of_each, "p_value": sampled.p_value, "power": POWER,
                "wrong_by": sampled.wrong_by, "control_failed": sampled.control_failed, "drafted": sampled.drafted,
                "verdict": sampled.verdict,
            })  # fmt: skip
        return found

    def records(self) -> list[dict]:
        """One object a divergence and a test, those of the control with "part": "control"."""
        found = [] if self.greedy is None else [one.as_dict() for one in self.greedy.divergences]
        if self.sampled is not None:
            level = self.sampled.level_of_each
            found += [test.as_dict(level) for test in self.sampled.tests]
            found += [test.as_dict(level) | {"part": "control"} for test in self.sampled.control]
        return found

    def as_dict(self) -> dict:
        """All of it, ready for JSON."""
        return {"verdict": self.verdict, "methods": self.methods(), "records": self.records()}


def _greedy_lines(greedy: GreedyAudit) -> Iterator[str]:
    same = ", ".join(f"{count} as by {name}" for name, count in greedy.identical.items())
    yield (
        f"greedy: {greedy.verdict}. Of {greedy.prompts} texts ({greedy.new_tokens} tokens, {greedy.accepted} of "
        f"{greedy.drafted} drafted ones accepted) {same}"
    )
    if not greedy.drafted:
        yield "no token was drafted: other prompts, or longer texts, are needed"
    if not greedy.divergences:
        return
    pair = lambda two: "-" if two is None else f"{two[0]:.2g} / {two[1]:.2g}"
    lines = [
        [one.reference, str(one.prompt), str(one.position), *map(str, one.tokens), pair(one.judged.margins),
         pair(one.judged.behind[0]), pair(one.judged.behind[1]), f"{one.judged.noise:.2g}", one.verdict]
        for one in greedy.divergences
    ]  # fmt: skip
    header = ["differs from", "prompt", "token", "is", "should be", "margin of the best two", "behind the best",
              "that which should be", "noise", "verdict"]  # fmt: skip
    yield table(header, lines)
    yield CRITERION


def _sampled_lines(sampled: SampledAudit) -> Iterator[str]:
    least = sampled.level_of_each
    share = lambda x: "-" if x is None else f"{x:.3f}"
    lines = [
        [name, str(test.prefix), str(test.token), str(test.compared.rows), str(test.drafted),
         f"{test.compared.statistic:.1f}", str(test.compared.freedom), f"{test.compared.p_value:.2g}",
         share(test.compared.variation), share(test.compared.detectable(least)), str(test.impossible),
         "FAILED" if test.fails(least) else "passed" if test.compared.freedom else "nothing varies"]
        for name, tests in (("samples", sampled.tests), ("control", sampled.control)) for test in tests
    ]  # fmt: skip
    header = ["of", "prefix", "token", "rows", "drafted", "chi-square", "freedom", "p", "variation", "detectable",
              "impossible", "verdict"]  # fmt: skip
    yield (
        f"sampled: {sampled.verdict}. {sampled.samples} samples a prefix, level {sampled.level:g} over all tests "
        f"({least:.2g} each), p = {sampled.p_value:.2g} corrected"
    )
    yield table(header, lines)
    yield (
        "bins: after its own text a token is one of the target's 64 likeliest, by rank, or one of the rest. variation: "
        "total variation of the bins, noise of the draws included; detectable: one that is found with probability "
        f"{POWER:g} at least"
    )
    if sampled.wrong_by is None:
        yield "nothing could vary after these prefixes: no wrong rule can be found there"
    elif sampled.control_failed:
        yield f"the control, a rule that is wrong by {sampled.wrong_by:.3f}, was found, as it must be"
    else:
        yield f"the control, a rule that is wrong by {sampled.wrong_by:.3f}, was NOT found: more samples are needed"
    if not sampled.drafted:
        yield "no token was drafted after these prefixes: others are needed"
