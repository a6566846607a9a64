"""The engine: submit, step, results."""

import operator
from collections.abc import AsyncIterator, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count

import torch
from transformers import GenerationConfig

from attention.gpu import on
from specdec.acceptance import AcceptanceRule
from specdec.drafters import Drafter, require_drafter
from specdec.drafters.base import runners_of
from specdec.engine.asynchronous import AsyncSteps
from specdec.engine.groups import Groups
from specdec.engine.handle import Callback, Handle
from specdec.engine.images import run_images
from specdec.engine.interrupt import interrupt_afterwards
from specdec.engine.memory import CacheMemory, cache_sizes
from specdec.engine.planner import Planner
from specdec.engine.prefixes import SharedPrefixes
from specdec.engine.prompts import Prompt
from specdec.engine.results import finished_requests, new_tokens
from specdec.engine.scheduler import Scheduler
from specdec.engine.submission import continued, request_of
from specdec.model.runner import ModelRunner
from specdec.requests.rows import Row
from specdec.trees.tree import TokenTree


class Engine:
    """Decodes many requests, which come and go between rounds, with one drafter for all of them.

    Every step runs one forward of the target over the next round of all requests that decode and over chunks of the
    prompts of those that have been admitted since. Requests have settings, seeds and stops of their own; the text of
    each is the one that it would get alone. Where memory runs out, the request that was admitted last makes room and
    is computed again later. `rule` is that of `SpeculativeGenerator`.

    memory: bytes for all caches together (None: 0.85 of what is free on each GPU, 2 GiB on a CPU).
    max_tokens_per_step: of rounds and prompts together, without the long drafts for few rows of a target whose weights
        are brought for each pass: up to 512 tokens in rounds of one kind of sampling.
    max_rows: requests that run at the same time.
    tree: what rounds draft: "auto" lets the load, each request's acceptance and measured times decide between rounds,
        down to nothing; None is the drafter's own shape, always. Only with a fixed shape does a seed repeat a sampled
        text; else `Handle.shapes` do.

    Raises ValueError for numbers out of range and a drafter for another target.

    >>> import specdec
    >>> pair = specdec.load_tiny_pair()
    >>> engine = specdec.Engine(pair.target, specdec.ModelDrafter(pair.draft, 4), tokenizer=pair.tokenizer)
    >>> handles = [engine.submit(text, max_new_tokens=8) for text in ("def add(a, b):", "import os")]
    >>> [len(handle.tokens) for handle in engine.run()]
    [8, 8]
    """

    def __init__(self, target, drafter: Drafter | None = None, rule: AcceptanceRule | None = None,
                 memory: int | None = None, max_tokens_per_step: int = 2048, max_rows: int = 256, tokenizer=None,
                 kv_dtype: str | None = None, tree: TokenTree | str | None = "auto"):  # fmt: skip
        self.target = target if isinstance(target, ModelRunner) else ModelRunner(target, kv_dtype=kv_dtype)
        if drafter is not None:
            require_drafter(drafter)
            drafter.validate(self.target)
        self.drafter, self.tokenizer = drafter, tokenizer
        self._planner = planner = Planner(self.target, drafter, None if drafter is None else tree)
        drafts = [runner for runner in runners_of(drafter) if not runner.borrows_cache]
        rooms = planner.room, planner.draft_room
        sizes = cache_sizes(self.target, drafts, memory, max_rows, *rooms)
        self._memory = CacheMemory(self.target, drafts, sizes, *rooms, max_tokens_per_step)
        self._scheduler = Scheduler(self._memory, max_tokens_per_step, max_rows, planner.usual_room)
        self._prefixes = SharedPrefixes(self.target, drafter)
        self._groups = Groups(self.target, drafter, rule, planner, self._prefixes)
        self._memory.holding = self._groups.holding
        self._handles: dict[Hashable, Handle] = {}  # at work
        self._arrivals, self._closed, self._stepping = 0, False, False
        self._coming = set[bytes]()  # keys of blocks that running requests are about to compute, for `_admit`
        self._async_steps = AsyncSteps(self)

    def submit(self, prompt: Prompt, generation_config: GenerationConfig | None = None, seed: int | None = None,
               callback: Callback | None = None, priority: int = 0, id: Hashable | None = None,
               logprobs: bool = False, **options) -> Handle:  # fmt: skip
        """Queue a request; `options` are those of `SpeculativeGenerator.generate`, one text's.

        prompt: token ids, `[n]`, `[1, n]` or a list; with the engine's tokenizer a text or a chat, a list of
            {"role": …, "content": …}. With images it is the processor's input_ids, and `options` the rest of what that
            gives; such a prompt runs whole in one step, and shares no prefix.
        generation_config: transformers' own; `options` come before it.
        callback: called with the handle and its new tokens after each of its rounds; an exception ends the request. It
            may submit and cancel requests, its own too.
        priority: larger ones come first.
        id: names it; none that is at work.
        logprobs: whether to keep `handle.logprobs`.

        Raises ValueError or TypeError, naming the value, for settings out of range, a prompt that the memory cannot
        hold and after `close`; the engine goes on."""
        if self._closed:
            raise ValueError("the engine is closed: it takes no further requests")
        options = {"generation_config": generation_config} | options
        request = request_of(self.target, self.tokenizer, prompt, logprobs, options | {"seed": seed})
        name = self._unused_id() if id is None else id
        if name in self._handles:
            raise ValueError(f"a request with id {name!r} is at work already")
        self._memory.require_fit(request)
        handle = Handle(name, request, operator.index(priority), self._arrivals, self.tokenizer, callback, options)
        self._arrivals += 1
        self._handles[name] = handle
        self._scheduler.submit(handle)
        return handle

    def fork(self, handle: Handle, count: int = 1, **options) -> list[Handle]:
        """Queue `count` further requests that go on from the text of `handle` so far; it goes on too.

        They have its settings, but for `options` (any of `submit`'s), the rest of its limit, and no seed or callback.
        The text so far is their prompt, of which full pages are shared; `tokens` are those after the fork. What tells
        prompt from new tokens (presence and frequency penalty, min_new_tokens) counts from there.

        Raises ValueError for a request that has come to its end, and several texts without do_sample."""
        prompt, settings = continued(handle, count, options)
        return [self.submit(prompt, **settings) for _ in range(count)]

    def _unused_id(self) -> int:
        return next(number for number in count(self._arrivals) if number not in self._handles)

    @property
    def idle(self) -> bool:
        """Whether no request waits or runs."""
        return not self._scheduler.waiting and not self._scheduler.running

    @property
    def at_work(self) -> list[Handle]:
        """The requests that wait or run, in the order of their arrival."""
        return list(self._handles.values())

    def cancel(self, handle: Handle, reason: str = "cancelled") -> None:
        """End a request, for `reason`; its tokens stay."""
        if not handle.finished:
            self._finish(handle, reason)

    def step(self) -> list[Handle]:
        """Run one step -> the requests that it finished. Ctrl-C raises KeyboardInterrupt at its end.

        What breaks a step is raised; the requests are then computed again. Raises RuntimeError in a callback."""
        before = [*self._scheduler.running, *self._scheduler.waiting]
        if self.target.ranks.several:
            self.target.ranks.require_same("the requests at work", [handle.arrival for handle in before])
        if not self._scheduler.running:
            self.target.refresh()
            if self._memory.weights_changed():
                self._prefixes.flush()
        with interrupt_afterwards(), self.target.lock, on(self.target.device), torch.inference_mode(), self._alone():
            try:
                if self._scheduler.waiting:
                    self._coming = {key for one in self._scheduler.running for key in self._to_compute(one)}
                step = self._scheduler.step(self._admit, self._preempt, self._left)
                texts, failed = run_images(self.target, self._groups, step.prompts)
                prompts = [(self._groups.holding(_row(one)), one, _row(one), count) for one, count in texts]
                chunks = [of.chunk(row, self._prefixes.cut(one, row, count)) for of, one, row, count in prompts]
                beside = len(texts) < len(step.prompts)
                read = self._groups.run([_row(handle) for handle in step.rounds], chunks, beside) | failed
                self._free_fronts([handle for handle, _ in step.prompts])
            except Exception:
                self._start_over()
                raise
            for handle in [one for one in self._scheduler.running if one.row in read]:
                self._settle(handle)
        return [handle for handle in before if handle.finished]

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if self._stepping:
            raise RuntimeError("a callback cannot run its engine: submit and cancel there, and step afterwards")
        self._stepping = True
        try:
            yield
        finally:
            self._stepping = False

    def run(self, requests: Iterable[dict] | None = None, progress: bool = False) -> Iterator[Handle]:
        """Submit `requests`, arguments of `submit` each, and run to the end -> the handles as they finish.

        progress: show a bar (tqdm).
        After Ctrl-C in a step come the requests that were at work, cut short (reason "interrupted"), then
        KeyboardInterrupt; the engine can be used again."""
        for request in requests or ():
            self.submit(**request)
        yield from finished_requests(self, progress)

    def stream(self, handle: Handle) -> Iterator[list[int]]:
        """The new tokens of a request, from its first one on, as they come; all requests go on meanwhile.

        Raises the error of a request that fails, and ValueError for another engine's."""
        if not handle.finished and self._handles.get(handle.id) is not handle:
            raise ValueError(f"request {handle.id!r} is not one of this engine")
        return new_tokens(self, handle)

    async def generate_async(self, prompt: Prompt, **options) -> Handle:
        """Submit a request, and wait for its end -> its handle; arguments, and what it raises, are those of `submit`.

        A task steps the engine in a thread, where callbacks run too, while anything is at work; meanwhile nothing else
        may use the engine but this method and `stream_async`. A coroutine that is cancelled cancels its request. What
        breaks a step is raised by all that wait."""
        return await self._async_steps.generate(prompt, options)

    def stream_async(self, prompt: Prompt, **options) -> AsyncIterator[list[int]]:
        """Submit a request -> its new tokens as they come; see `generate_async`. Raises the error that ends it."""
        return self._async_steps.stream(prompt, options)

    def stats(self) -> dict[str, int]:
        """Requests that wait and run, blocks that are kept for reuse, and prompt tokens that these have saved."""
        queues = {"waiting": len(self._scheduler.waiting), "running": len(self._scheduler.running)}
        return queues | {"blocks": self._prefixes.blocks, "saved_tokens": self._prefixes.saved}

    def explain(self) -> str:
        """Tables as of `SpeculativeGenerator.explain`, then why rounds ran on the host, and for how many requests."""
        return self._groups.explain()

    def forget_texts(self) -> None:
        """Begin anew, but for times of rounds: without prefixes, acceptance and answers. ValueError while not idle."""
        if self._handles:
            raise ValueError(f"{len(self._handles)} requests are at work: run them to their end first")
        self._prefixes.flush()
        self._planner.forget_texts()

    def close(self) -> None:
        """Cancel all that is at work, and give the caches' memory back."""
        for handle in self.at_work:
            self.cancel(handle)
        self._prefixes.flush()
        self._memory.release()
        self._closed = True

    def _admit(self, handle: Handle) -> Row | None:
        if self._comes(handle):
            return None
        row = self._groups.admit(handle)
        self._prefixes.take(handle, self._groups.holding(row), row)
        self._coming.update(self._prefixes.keys(handle))
        self._memory.free_fronts([row])
        return row

    def _free_fronts(self, prompts: Sequence[Handle]) -> None:
        """Give back pages that no later round reads; what `prompts` have computed there is kept for others first."""
        for handle in prompts:
            if handle.row is not None:
                self._prefixes.keep_states(handle, handle.row)
        if self._memory.windowed:
            for handle in prompts:
                self._prefixes.enter(handle, self._groups.holding(_row(handle)), _row(handle))
            rows = [_row(handle) for handle in self._scheduler.running]
            self._memory.free_fronts([row for row in rows if row.sequence >= 0])

    def _preempt(self, handle: Handle) -> None:
        self._prefixes.enter(handle, self._groups.holding(_row(handle)), _row(handle))
        self._groups.leave(handle)
        handle.preemptions += 1

    def _comes(self, handle: Handle) -> bool:
        """Whether a request that runs is about to compute the next block of this one's text."""
        known, keys = self._prefixes.known(handle), self._prefixes.keys(handle)
        return known < len(keys) and keys[known] in self._coming

    def _to_compute(self, handle: Handle) -> Sequence[bytes]:
        """The keys of a running request's text, until its first round."""
        return self._prefixes.keys(handle) if handle.row is not None and not handle.row.new_tokens else ()

    def _left(self, row: Row) -> int:
        """Tokens of its text, without the last one, that the target's cache lacks."""
        return max(0, row.length - 1 - self.target.cache.table.length(row.sequence))

    def _start_over(self) -> None:
        """After a step that broke, whose keys and values may be missing: compute the texts so far again."""
        self._groups.drop_rounds()
        for handle in list(self._scheduler.running):
            self._groups.leave(handle)
            self._scheduler.remove(handle)
            self._scheduler.submit(handle)

    def _settle(self, handle: Handle) -> None:
        """After a round: tell the user of the new tokens, and finish what has ended."""
        row = handle.row
        if row is None:
            return
        if handle.error is None and handle.callback is not None:
            try:
                handle.callback(handle, list(row.new_tokens))
            except Exception as error:
                handle.error = error
        if handle.finished:  # its callback has cancelled it
            return
        if handle.error is not None:
            self._finish(handle, "error")
        elif row.ended:
            last = handle.record.new_tokens[-1]
            reason = "end" if last in row.ends else "length" if row.length >= row.limit else "stop"
            self._finish(handle, reason)

    def _finish(self, handle: Handle, reason: str) -> None:
        self._groups.remove(handle)
        self._scheduler.remove(handle)
        self._prefixes.forget(handle)
        handle.reason = reason
        del self._handles[handle.id]


def _row(handle: Handle) -> Row:
    assert handle.row is not None
    return handle.row
