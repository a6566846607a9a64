"""`audit`: does a target with a drafter and an acceptance rule write the target's own text?"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from specdec.acceptance import AcceptanceRule
from specdec.auditing.bins import LIKELIEST
from specdec.auditing.greedy import audit_greedy
from specdec.auditing.readings import Readings
from specdec.auditing.result import AuditResult
from specdec.auditing.sampled import Samples, audit_sampled
from specdec.drafters import Drafter
from specdec.engine.progress import progress_bar
from specdec.engine.prompts import Prompt, prompt_ids
from specdec.generation.generators import SpeculativeGenerator
from specdec.trees.tree import TokenTree

PARTS = ("greedy", "sampled")
RESERVED = ("do_sample", "num_return_sequences", "streamer", "shapes", "output_scores", "output_logits", "max_length")


def audit(target: Any, drafter: Drafter, prompts: Sequence[Prompt], rule: AcceptanceRule | None = None,
          greedy_rule: AcceptanceRule | None = None, tree: TokenTree | str | None = None, *, tokenizer: Any = None,
          kv_dtype: str | None = None, mode: str | None = None, parts: Sequence[str] = PARTS, max_new_tokens: int = 64,
          samples: int = 2000, tokens: int = 4, level: float = 1e-4, batch: int = 64, seed: int = 0,
          progress: bool = False, **options: Any) -> AuditResult:  # fmt: skip
    """Audit whether decoding with `drafter` is lossless, by the rounds that generators run.

    target, drafter, tree, kv_dtype, mode: those of `SpeculativeGenerator`.
    prompts: token ids, or with a `tokenizer` texts and chats; samples are drawn at the end of each.
    rule, greedy_rule: acceptance rules of sampled and of greedy decoding (None: those that generators take).
    parts: "greedy": texts of `max_new_tokens` against transformers' own `generate` and plain decoding here. Where they
        part, the verdict is a near-tie or a bug, by `specdec.auditing.greedy.CRITERION`. "sampled": `samples` texts of
        `tokens` tokens after each prompt against the target's exact distribution after temperature, top-k and so on,
        over its 64 likeliest tokens, by rank, and the rest: chi-square tests of each token, given the ones before it,
        at `level` for all together (Bonferroni). A wrong rule runs with the same numbers and must be found.
    batch: rows that are decoded together.
    options: of `generate`, such as temperature and top_p.

    Raises ValueError for numbers and parts that cannot be used, and TypeError for options that an audit sets itself.

    >>> import specdec
    >>> pair = specdec.load_tiny_pair()
    >>> drafter = specdec.ModelDrafter(pair.draft, num_tokens=4)
    >>> found = specdec.audit(pair.target, drafter, ["import os\\n"], tokenizer=pair.tokenizer, mode="eager",
    ...                       max_new_tokens=8, samples=300, tokens=1)
    >>> found.verdict, found.status
    ('passed', 0)
    """
    _check(parts, level, max_new_tokens=max_new_tokens, samples=samples, tokens=tokens, batch=batch)
    if drafter is None:
        raise ValueError("an audit needs a drafter, got None")
    given = sorted(set(options) & set(RESERVED))
    if given:
        raise TypeError(f"audit sets {', '.join(given)} itself")
    greedy = SpeculativeGenerator(target, drafter, greedy_rule, kv_dtype, tree, mode)
    make: Callable[[Any], SpeculativeGenerator] = lambda rule: SpeculativeGenerator(
        greedy.target, drafter, rule, tree=tree
    )
    readings = Readings(greedy.target.model, greedy.target.kv_dtype)
    ids: list[Tensor] = [prompt_ids(prompt, tokenizer)[0].to(greedy.target.device) for prompt in prompts]
    if not ids:
        raise ValueError("an audit needs at least one prompt, got none")
    of_greedy = of_sampled = None
    steps = {"greedy": len(ids), "sampled": 2 * samples * len(ids)}
    with progress_bar(sum(steps[part] for part in parts), progress) as update, torch.inference_mode():
        done = lambda count: update(count, count)
        if "greedy" in parts:
            of_greedy = audit_greedy(greedy, readings, ids, max_new_tokens, batch, options, done)
        if "sampled" in parts:
            wanted = Samples(samples, tokens, batch, options, done)
            of_sampled = audit_sampled(make(rule), make, readings, ids, wanted, level, seed)
    return AuditResult(of_greedy, of_sampled)


def _check(parts: Sequence[str], level: float, **counts: int) -> None:
    for name, value in counts.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    if counts["samples"] < LIKELIEST:
        raise ValueError(f"samples must be at least {LIKELIEST}, got {counts['samples']}")
    if not 0 < level < 1 or not math.isfinite(level):
        raise ValueError(f"level must lie in (0, 1), got {level}")
    unknown = [part for part in parts if part not in PARTS]
    if unknown or not parts or isinstance(parts, str):
        raise ValueError(f"parts must be some of {', '.join(PARTS)}, got {parts!r}")
