"""The methods that `scripts.bench_serving` compares, each a server over the same target."""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import specdec
from scripts.generate_bench.models import TINY, Models, needs_draft
from scripts.generate_bench.speeds import NotAvailable
from scripts.serving_bench.drive import Server
from scripts.serving_bench.peer import BatchServer
from scripts.serving_bench.servers import StaticServer, make_engine
from scripts.serving_bench.workload import Request

PEER, PLAIN, DRAFT, TOTAL, PARTIAL, HEADS, LOOKUP = (
    "generate_batch", "plain", "draft", "total", "partial", "heads", "lookup",
)  # fmt: skip
STATIC = "static-"  # and the size of a batch
PARTIAL_ACCEPTANCE = 0.6
DRAFTED = (DRAFT, TOTAL, PARTIAL, HEADS, LOOKUP)
TITLES = {
    PEER: "transformers generate_batch", PLAIN: "engine, no draft", DRAFT: "engine, draft model",
    TOTAL: "engine, synthetic chain, all accepted",
    PARTIAL: f"engine, synthetic chain, {PARTIAL_ACCEPTANCE:g} accepted",
    HEADS: "engine, Medusa heads", LOOKUP: "engine, prompt lookup",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Bench:
    """What all experiments share: the models, the options and where models run."""

    models: Models
    options: argparse.Namespace


def title_of(method: str) -> str:
    """What tables and plots call it."""
    return f"static batches of {method.removeprefix(STATIC)}" if method.startswith(STATIC) else TITLES[method]


def check_method(method: str) -> str:
    """The method's name; raises ValueError for an unknown one."""
    if method in TITLES or method.removeprefix(STATIC).isdigit() and int(method.removeprefix(STATIC)) > 0:
        return method
    raise ValueError(f"methods are {', '.join(TITLES)} and {STATIC}N, got {method!r}")


def note_of(method: str) -> str | None:
    """What about a method is synthetic, or else needs to be said."""
    synthetic = "synthetic: the draft is the target's own first layers, which are always right"
    notes = {
        PEER: "its manager, with each request's own length",
        TOTAL: synthetic,
        PARTIAL: f"{synthetic}; each drafted token is made wrong with probability {1 - PARTIAL_ACCEPTANCE:g}",
    }
    return "tokens are handed over at the end of a batch" if method.startswith(STATIC) else notes.get(method)


def drafter_of(method: str, models: Models, target: specdec.ModelRunner, options):
    """The drafter of an engine, None for `PLAIN`. Raises NotAvailable where the models have none."""
    if method == PLAIN:
        return None
    if method == LOOKUP:
        return specdec.PromptLookupDrafter(options.length, candidates=1)  # a chain: nodes cost time under load
    if method == HEADS:
        if options.model != TINY:
            raise NotAvailable("needs the shipped pair, for whose target there are heads")
        from medusa.tiny_heads import tiny_drafter

        return tiny_drafter(target)
    if method in (TOTAL, PARTIAL) and options.model is not None:
        raise NotAvailable("needs a --shape, whose draft is exact")
    draft = needs_draft(models)
    if method == PARTIAL:
        return specdec.SyntheticDrafter(draft, PARTIAL_ACCEPTANCE, options.length)
    return specdec.ModelDrafter(draft, options.length)


def engine_options(pairs: Sequence[str]) -> dict:
    """Further arguments of `specdec.Engine` from NAME=VALUE, with values in JSON or else plain text.

    >>> engine_options(["rule=null", "kind=own"])
    {'rule': None, 'kind': 'own'}
    """
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--engine and --drafted take NAME=VALUE, got {pair!r}")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def opener(method: str, bench: Bench, requests: Sequence[Request], rows: int) -> Callable[[], Server]:
    """A function that opens the server of a method, for these requests, `rows` of them at the same time."""
    models, options = bench.models, bench.options
    if method == PEER:
        return partial(BatchServer, models.target, requests, options.tokens_per_step)
    runner = partial(specdec.ModelRunner, models.target, mode=options.mode)
    if method.startswith(STATIC):
        batch = int(method.removeprefix(STATIC))
        return lambda: StaticServer(specdec.AutoregressiveGenerator(runner()), batch)

    def open_engine() -> Server:
        target = runner()
        drafter = drafter_of(method, models, target, options)
        further = engine_options([*options.engine, *(options.drafted if method != PLAIN else ())])
        return make_engine(target, drafter, requests, rows, options.tokens_per_step, options.memory, further)

    return open_engine
