"""Our own ways to serve requests: an engine, and static batches."""

import time
from collections.abc import Sequence
from itertools import islice

import torch

import specdec
from scripts.serving_bench.drive import Delivery
from scripts.serving_bench.workload import Request
from specdec.drafters.base import runners_of
from specdec.report.stats import pool

SPARE = 64  # tokens that a round may need beyond a request's own


def pages_needed(requests: Sequence[Request], rows: int, page_size: int) -> int:
    """Pages that hold the `rows` largest of the requests at once, each with a token of its pass before it.

    >>> pages_needed([Request((1,) * 50, 13), Request((1,) * 600, 70), Request((1,), 2)], 2, 64)
    14
    """
    pages = (-(-(len(one.prompt) + 1 + one.new_tokens + SPARE) // page_size) for one in requests)
    return sum(islice(sorted(pages, reverse=True), rows))


class EngineServer:
    """`specdec.Engine`: tokens are noted when its callback brings them."""

    streams, has_steps = True, True

    def __init__(self, engine: specdec.Engine):
        self.engine = engine
        self._fresh: list[Delivery] = []
        self._stats: list = []
        self._preemptions, self._saved, self._most_rows = 0, 0, 0

    def submit(self, number: int, request: Request) -> None:
        """See `drive.Server`."""
        self.engine.submit(
            list(request.prompt), callback=self._take, id=number, do_sample=False, max_new_tokens=request.new_tokens
        )

    def _take(self, handle: specdec.engine.Handle, tokens: list[int]) -> None:
        self._fresh.append(Delivery(handle.id, time.perf_counter(), tokens, False))  # type: ignore[arg-type]

    def step(self, wait: float) -> list[Delivery]:
        """See `drive.Server`. Raises the error of a request that failed."""
        finished = self.engine.step()
        self._most_rows = max(self._most_rows, self.engine.stats()["running"] + len(finished))
        fresh, self._fresh = self._fresh, []
        for handle in finished:
            if handle.error is not None:
                raise handle.error
            self._stats.append(handle.stats)
            self._preemptions += handle.preemptions
            fresh.append(Delivery(handle.id, time.perf_counter(), (), True))  # type: ignore[arg-type]
        return fresh

    def counts(self) -> dict:
        """Acceptance, tokens a round, shapes that ran, preemptions, and prompt tokens that shared prefixes saved."""
        saved, stats = self.engine.stats()["saved_tokens"], pool(self._stats)
        found = {
            "acceptance_rate": stats.acceptance_rate, "tokens_per_round": stats.tokens_per_round,
            "preemptions": self._preemptions, "saved_tokens": saved - self._saved, "most_rows": self._most_rows,
            "shapes": sorted(set(stats.shapes)),
        }  # fmt: skip
        self._stats, self._preemptions, self._saved, self._most_rows = [], 0, saved, 0
        return found

    def close(self) -> None:
        """See `drive.Server`."""
        self.engine.close()


def make_engine(target: specdec.ModelRunner, drafter, requests: Sequence[Request], rows: int, tokens_per_step: int,
                memory: int | None, options: dict) -> EngineServer:  # fmt: skip
    """An engine with just the memory that its requests can take at once, and `memory` bytes at most."""
    runners = [target, *runners_of(drafter)]
    pages = 1 + pages_needed(requests, rows, target.page_size)
    needed = pages * sum(one.page_format.bytes for one in runners)
    engine = specdec.Engine(
        target, drafter, memory=needed if memory is None else min(memory, needed), max_rows=rows,
        max_tokens_per_step=tokens_per_step, **options,
    )  # fmt: skip
    return EngineServer(engine)


class StaticServer:
    """Batches of up to `batch` requests in the order of their arrival, each decoded to its longest text.

    A text is cut at its own length and handed over with the whole batch."""

    streams, has_steps = False, False

    def __init__(self, generator, batch: int):
        self._generator, self._batch = generator, batch
        self._waiting: list[tuple[int, Request]] = []
        self._steps = 0

    def submit(self, number: int, request: Request) -> None:
        """See `drive.Server`."""
        self._waiting.append((number, request))

    def step(self, wait: float) -> list[Delivery]:
        """Decode the next batch."""
        now, self._waiting = self._waiting[: self._batch], self._waiting[self._batch :]
        prompts, device = [one.prompt for _, one in now], self._generator.target.device
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        longest = max(one.new_tokens for _, one in now)
        out = self._generator.generate(ids, mask, max_new_tokens=longest, do_sample=False)
        self._steps += longest
        texts, at = out.sequences[:, width:].tolist(), time.perf_counter()
        cut = zip(now, texts, strict=True)
        return [Delivery(number, at, text[: one.new_tokens], True) for (number, one), text in cut]

    def counts(self) -> dict:
        """Steps of all batches."""
        steps, self._steps = self._steps, 0
        return {"steps": steps}

    def close(self) -> None:
        """See `drive.Server`."""
        self._generator = None
