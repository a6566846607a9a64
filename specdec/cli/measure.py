"""Methods side by side: every prompt by every method one after the other, and what the times say."""

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specdec.planning.costs import Costs
from specdec.report.intervals import geometric_mean, median
from specdec.report.stats import GenerationStats, RoundStats, pool
from specdec.report.terminal import table

PLAIN, OURS, ALL = "transformers generate", "specdec autoregressive", "all"
Method = Callable[[Tensor, int, int, dict], tuple[Tensor, GenerationStats | None]]


@dataclass(frozen=True, slots=True)
class Run:
    """One prompt decoded by one method; transformers' methods have no `stats`."""

    method: str
    kind: str
    temperature: float
    prompt: int
    repeat: int
    new_tokens: tuple[int, ...]
    seconds: float
    stats: GenerationStats | None

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second of the whole call, prefill included."""
        return len(self.new_tokens) / self.seconds

    @property
    def call(self) -> tuple:
        """What the methods have in common that ran side by side."""
        return self.kind, self.temperature, self.prompt, self.repeat


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt `ids [1, S]`, the `number`-th of its kind."""

    kind: str
    number: int
    ids: Tensor


def theirs(model, **more: Any) -> Method:
    """transformers' own `generate`, with `more` arguments (such as an assistant model)."""

    def run(ids: Tensor, count: int, seed: int, sampling: dict) -> tuple[Tensor, None]:
        torch.manual_seed(seed)
        mask = torch.ones_like(ids)
        return model.generate(ids, attention_mask=mask, max_new_tokens=count, **sampling, **more)[0], None

    return run


def ours(generator: Any) -> Method:
    """A generator of this library."""

    def run(ids: Tensor, count: int, seed: int, sampling: dict) -> tuple[Tensor, GenerationStats]:
        out = generator.generate(ids, max_new_tokens=count, seed=seed, **sampling)
        return out.sequences[0], out.stats

    return run


def run_all(methods: Mapping[str, Method], prompts: Sequence[Prompt], temperatures: Sequence[float], count: int,
            repeats: int = 1, seed: int = 0) -> list[Run]:  # fmt: skip
    """Every prompt through every method, one after the other, so that a slow moment of the machine affects all alike.

    A warm-up of the first prompt at each temperature does not count."""
    from tqdm import tqdm

    jobs = [(t, prompt, repeat) for repeat in range(repeats) for t in temperatures for prompt in prompts]
    for temperature in temperatures:
        _run(methods, prompts[0], temperature, 0, min(16, count), seed)
    runs = []
    for number, (temperature, prompt, repeat) in enumerate(tqdm(jobs, desc="prompts", file=sys.stderr)):
        runs += _run(methods, prompt, temperature, repeat, count, seed + number % (len(jobs) // repeats))
    return runs


def _run(methods: Mapping[str, Method], prompt: Prompt, temperature: float, repeat: int, count: int,
         seed: int) -> list[Run]:  # fmt: skip
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    wait = torch.cuda.synchronize if prompt.ids.is_cuda else lambda: None
    runs = []
    for method, decode in methods.items():
        wait()
        began = time.perf_counter()
        sequence, stats = decode(prompt.ids, count, seed, sampling)
        wait()
        seconds, new = time.perf_counter() - began, tuple(sequence[prompt.ids.shape[1] :].tolist())
        runs.append(Run(method, prompt.kind, temperature, prompt.number, repeat, new, seconds, stats))
    return runs


def chosen(runs: Sequence[Run], method: str, kind: str, temperature: float) -> list[Run]:
    """The runs of one line of the table."""
    return [r for r in runs if r.method == method and r.temperature == temperature and kind in (r.kind, ALL)]


def pooled(runs: Sequence[Run], method: str, kind: str, temperature: float) -> RoundStats:
    """All rounds of those runs as one; no rounds for transformers' methods."""
    return pool([r.stats.pooled for r in chosen(runs, method, kind, temperature) if r.stats])


def rows_of(runs: Sequence[Run], method: str, temperature: float) -> list[RoundStats]:
    """The rounds of every request of a method."""
    return [row for r in chosen(runs, method, ALL, temperature) if r.stats for row in r.stats.rows]


def summarise(runs: Sequence[Run], baseline: str = OURS) -> list[dict]:
    """The table's lines: for each temperature, kind of prompts and method all tokens over all seconds, and speedups."""
    methods, kinds, temperatures = (list(dict.fromkeys(getattr(r, name) for r in runs)) for name in
                                    ("method", "kind", "temperature"))  # fmt: skip
    kinds = [*kinds, ALL] if len(kinds) > 1 else [ALL]
    return [_summary(runs, m, k, t, baseline) for t in temperatures for k in kinds for m in methods]


def _summary(runs: Sequence[Run], method: str, kind: str, temperature: float, baseline: str) -> dict:
    mine = chosen(runs, method, kind, temperature)
    of = {(r.method, *r.call): r for r in runs}
    partners = [of[(baseline, *r.call)] for r in mine]
    plain = PLAIN if (PLAIN, *mine[0].call) in of else baseline
    ratios = [r.tokens_per_second / partner.tokens_per_second for r, partner in zip(mine, partners, strict=True)]
    found = pooled(runs, method, kind, temperature)
    own = [of[(OURS, *r.call)] for r in mine]
    seconds = [[r.stats.pooled.round_seconds for r in group if r.stats] for group in (mine, own)]
    rounds, steps = ([x for x in group if x is not None] for group in seconds)  # None: a text of one round
    middle = median(ratios)
    by_prompt: dict[tuple, list[float]] = {}
    for r, ratio in zip(mine, ratios, strict=True):
        by_prompt.setdefault((r.kind, r.prompt), []).append(ratio)
    over_prompts = geometric_mean([statistics.geometric_mean(each) for each in by_prompt.values()])
    same = all(r.new_tokens == of[(plain, *r.call)].new_tokens for r in mine)
    return {
        "name": method,
        "kind": kind,
        "temperature": temperature,
        "tokens_per_second": throughput(mine),
        "tokens_per_round": found.tokens_per_round,
        "acceptance_rate": found.acceptance_rate,
        "overhead": statistics.median(rounds) / statistics.median(steps) if rounds and steps else None,
        "speedup": throughput(mine) / throughput(partners),
        "speedup_median": middle.value,
        "speedup_quartiles": [middle.low, middle.high],
        "speedup_interval": None if over_prompts is None else [over_prompts.low, over_prompts.high],
        "identical": None if temperature else same,
        "prompts": len(mine),
    }


def throughput(runs: Sequence[Run]) -> float:
    """New tokens a second, all tokens over all seconds."""
    return sum(len(r.new_tokens) for r in runs) / sum(r.seconds for r in runs)


def records(runs: Sequence[Run]) -> list[dict]:
    """One object per run, for a result file."""
    out = []
    for r in runs:
        stats = r.stats.pooled if r.stats else None
        out.append({
            "method": r.method, "kind": r.kind, "prompt": r.prompt, "temperature": r.temperature, "repeat": r.repeat,
            "new_tokens": len(r.new_tokens), "seconds": round(r.seconds, 6), "rounds": stats and stats.rounds,
            "tokens_per_round": stats and stats.tokens_per_round, "acceptance_rate": stats and stats.acceptance_rate,
        })  # fmt: skip
    return out


def table_of(rows: Sequence[dict], baseline: str = OURS) -> str:
    """The lines of `summarise` as text."""
    header = ["method", "prompts", "temp", "tok/s", "tokens per round", "acceptance rate", "overhead",
              f"speedup over {baseline}", "its quartiles", "identical to target greedy"]  # fmt: skip
    number = lambda value: "-" if value is None else f"{value:.2f}"
    names = {True: "yes", False: "NO", None: "-"}
    lines = [
        [r["name"], r["kind"], f"{r['temperature']:g}", f"{r['tokens_per_second']:.1f}"]
        + [number(r[name]) for name in ("tokens_per_round", "acceptance_rate", "overhead", "speedup")]
        + ["{:.2f} … {:.2f}".format(*r["speedup_quartiles"]), names[r["identical"]]]
        for r in rows
    ]
    return table(header, lines)


def expected_speedup(stats: RoundStats, costs: Costs) -> float | None:
    """The speedup that the parts of a round allow: tokens a round over the costs of drafting and verifying it.

    Drafting is what a draft model's steps cost, one per level, and nothing for other drafters."""
    if not stats.rounds or stats.tokens_per_round is None:
        return None
    sizes, depths = (statistics.fmean(values) for values in (stats.proposed, stats.depths))
    return stats.tokens_per_round / (depths * costs.draft + costs.verify_at(max(1, round(sizes) + 1)))
