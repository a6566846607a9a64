"""The engine: submit, step, results."""

import operator
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count

import torch
from torch import Tensor

from attention.gpu import on
from attention.kv.page_format import pages_within
from specdec.acceptance import AcceptanceRule, greedy, lossless
from specdec.drafters import Drafter, require_drafter
from specdec.drafters.base import runners_of
from specdec.engine.group import Group, kind_of
from specdec.engine.handle import Callback, Handle
from specdec.engine.memory import CacheMemory
from specdec.engine.prefixes import SharedPrefixes, weights_now
from specdec.engine.scheduler import Scheduler
from specdec.model.runner import ModelRunner
from specdec.planning.policy import DRAFTERS_OWN, PLAIN, FixedPolicy
from specdec.requests.request import Request, build_request
from specdec.requests.rows import Row
from specdec.rounds.round import take_turns

CPU_MEMORY, GPU_SHARE = 2 << 30, 0.85  # bytes; of what is free
Prompt = Tensor | Sequence[int] | str


class Engine:
    """Decodes many requests, which come and go between rounds, with one drafter for all of them.

    Every step runs one forward of the target over the next round of all requests that decode and over chunks of the
    prompts of those that have been admitted since. Requests have settings, seeds and stops of their own; the text of
    each is the one that it would get alone. Where memory runs out, the request that was admitted last makes room and
    is computed again later. `rule` is that of `SpeculativeGenerator`.

    memory: bytes for all caches together (None: 0.85 of what is free on a GPU, 2 GiB on a CPU).
    max_tokens_per_step: of rounds and prompts together.
    max_rows: requests that run at the same time.

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
                 kv_dtype: str | None = None):  # fmt: skip
        self.target = target if isinstance(target, ModelRunner) else ModelRunner(target, kv_dtype=kv_dtype)
        if drafter is not None:
            require_drafter(drafter)
            drafter.validate(self.target)
        self.drafter, self.tokenizer, self._rule = drafter, tokenizer, rule
        traits = drafter.traits if drafter is not None else None
        self._room = 1 + (max(traits.max_tokens, traits.target_tokens) if traits is not None else 0)
        drafts = [runner for runner in runners_of(drafter) if not _shares_weights(runner, self.target)]
        if memory is None:
            free = torch.cuda.mem_get_info(self.target.device)[0] if self.target.device.type == "cuda" else None
            memory = CPU_MEMORY if free is None else int(GPU_SHARE * free)
        pages = pages_within(memory, *(runner.page_format for runner in (self.target, *drafts)))
        self._memory = CacheMemory(self.target, drafts, pages, self._room)
        self._scheduler = Scheduler(self._memory, max_tokens_per_step, max_rows, self._room)
        self._prefixes = SharedPrefixes(self.target)
        self._groups: dict[Hashable, Group] = {}
        self._handles: dict[Hashable, Handle] = {}  # at work
        self._arrivals, self._closed, self._stepping = 0, False, False
        self._weights: list[tuple] = []

    def submit(self, prompt: Prompt, id: Hashable | None = None, seed: int | None = None,
               callback: Callback | None = None, priority: int = 0, **options) -> Handle:  # fmt: skip
        """Queue a request; `options` are those of `SpeculativeGenerator.generate`.

        prompt: token ids, `[n]`, `[1, n]` or a list, or a text.
        id: names it; none that is at work.
        callback: called with the handle and its new tokens after each of its rounds; an exception ends the request. It
            may submit and cancel requests, its own too.
        priority: larger ones come first.

        Raises ValueError or TypeError, naming the value, for settings out of range, a prompt that the memory cannot
        hold and after `close`; the engine goes on."""
        if self._closed:
            raise ValueError("the engine is closed: it takes no further requests")
        request = self._request(prompt, seed, options)
        name = self._unused_id() if id is None else id
        if name in self._handles:
            raise ValueError(f"a request with id {name!r} is at work already")
        for cache in self._memory.caches:
            if cache.pages_for(request.limits[0] + self._room) > cache.num_pages:
                raise ValueError(
                    f"a prompt of {len(request.prompts[0])} tokens and {request.max_new_tokens} new ones do not fit "
                    f"into {cache.num_pages} pages of {cache.page_size} tokens: give the engine more memory"
                )
        handle = Handle(name, request, operator.index(priority), self._arrivals, self.tokenizer, callback)
        self._arrivals += 1
        self._handles[name] = handle
        self._scheduler.submit(handle)
        return handle

    def _unused_id(self) -> int:
        return next(number for number in count(self._arrivals) if number not in self._handles)

    def _request(self, prompt: Prompt, seed: int | None, options: dict) -> Request:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("a prompt given as text needs Engine(tokenizer=…)")
            prompt = self.tokenizer(prompt, return_tensors="pt").input_ids
        ids = torch.as_tensor(prompt, device=self.target.device)
        ids = ids[None] if ids.ndim == 1 else ids
        if ids.ndim != 2 or len(ids) != 1:
            raise ValueError(f"a prompt is [n] or [1, n] token ids, got {list(ids.shape)}")
        request = build_request(self.target, ids, torch.ones_like(ids), seed=seed, tokenizer=self.tokenizer, **options)
        if len(request.prompts) > 1:
            raise ValueError(f"a request is one text: submit it {len(request.prompts)} times")
        if request.processors.memory:
            raise ValueError(f"{', '.join(request.processors.memory)} remembers earlier calls and cannot run here")
        return request

    @property
    def idle(self) -> bool:
        """Whether no request waits or runs."""
        return not self._scheduler.waiting and not self._scheduler.running

    def cancel(self, handle: Handle) -> None:
        """End a request; its tokens stay."""
        if not handle.finished:
            self._finish(handle, "cancelled")

    def step(self) -> list[Handle]:
        """Run one step -> the requests that it finished. Raises RuntimeError when a callback calls it."""
        before = [*self._scheduler.running, *self._scheduler.waiting]
        if not self._scheduler.running:
            self._look_at_weights()
        with self.target.lock, on(self.target.device), torch.inference_mode(), self._alone():
            step = self._scheduler.step(self._admit, self._preempt, self._left)
            rounds = [_row(handle) for handle in step.rounds]
            turns = [turn for group in self._groups.values() for turn in group.turns(group.mine(rounds))]
            chunks = [self._chunk(handle, tokens) for handle, tokens in step.prompts]
            if turns:
                take_turns(turns, chunks, failed=self._failed)
            elif chunks:
                self._run_prompts(chunks)
            for handle in step.rounds:
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

    def run(self, requests: Iterable[dict] | None = None) -> Iterator[Handle]:
        """Submit `requests`, arguments of `submit` each, and run to the end -> the handles as they finish."""
        for request in requests or ():
            self.submit(**request)
        while not self.idle:
            yield from self.step()

    def stats(self) -> dict[str, int]:
        """Requests that wait and run, blocks that are kept for reuse, and prompt tokens that these have saved."""
        queues = {"waiting": len(self._scheduler.waiting), "running": len(self._scheduler.running)}
        return queues | {"blocks": self._prefixes.blocks, "saved_tokens": self._prefixes.saved}

    def close(self) -> None:
        """Cancel all that is at work, and give the caches' memory back."""
        for handle in [*self._scheduler.running, *self._scheduler.waiting]:
            self.cancel(handle)
        self._prefixes.flush()
        self._memory.release()
        self._closed = True

    def _look_at_weights(self) -> None:
        """Take up what has been done to the models; blocks that other weights have computed are forgotten."""
        self.target.refresh()
        now = [weights_now(runner.model) for runner in self._memory.runners]
        if now != self._weights:
            self._prefixes.flush()
        self._weights = now

    def _admit(self, handle: Handle) -> Row | None:
        if self._comes(handle):
            return None
        kind = kind_of(handle)
        if kind not in self._groups:
            rule = self._rule or (lossless if handle.request.do_sample else greedy)
            traits = self.drafter.traits if self.drafter is not None else None
            policy = FixedPolicy(PLAIN, 0) if traits is None else FixedPolicy(DRAFTERS_OWN, traits.max_tokens)
            group = Group(self.target, self.drafter, rule, policy, handle.request, self._room)
            group.call.emit = partial(self._enter, group)
            self._groups[kind] = group
            self._memory.groups.append(group)
        row = self._groups[kind].admit(handle)
        self._prefixes.take(handle, self._groups[kind], row)
        return row

    def _preempt(self, handle: Handle) -> None:
        group, row = self._group(handle), _row(handle)
        self._prefixes.enter(handle, group, row)
        group.remove([row])
        handle.preemptions += 1

    def _enter(self, group: Group, rows: Sequence[Row]) -> None:
        for row in rows:
            self._prefixes.enter(group.handle(row), group, row)

    def _comes(self, handle: Handle) -> bool:
        """Whether a request that runs is about to compute the next block of this one's text."""
        known, keys = self._prefixes.known(handle), self._prefixes.keys(handle)
        if known == len(keys):
            return False
        fresh = [one for one in self._scheduler.running if one.row is not None and not one.row.new_tokens]
        return any(keys[known : known + 1] == self._prefixes.keys(one)[known : known + 1] for one in fresh)

    def _left(self, row: Row) -> int:
        """Tokens of its text, without the last one, that the target's cache lacks."""
        return row.length - 1 - self.target.cache.length(row.sequence)

    def _chunk(self, handle: Handle, number: int) -> tuple[int, Tensor]:
        row, rows = _row(handle), self._group(handle).call.rows
        done = self.target.cache.length(row.sequence)
        return row.sequence, rows.tokens[row.slot, done : done + number]

    def _run_prompts(self, chunks: Sequence[tuple[int, Tensor]]) -> None:
        counts = [len(tokens) for _, tokens in chunks]
        keep = torch.tensor([sum(counts) - 1], device=self.target.device)
        self.target.forward([s for s, _ in chunks], torch.cat([tokens for _, tokens in chunks]), counts, keep=keep)

    def _group(self, handle: Handle) -> Group:
        return self._groups[kind_of(handle)]

    def _failed(self, rows: Sequence[Row], error: Exception) -> None:
        for row in rows:
            handle = next(group for group in self._groups.values() if row in group.call.rows.members).handle(row)
            handle.error = error

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
        if handle.row is not None:
            self._group(handle).remove([handle.row])
        self._scheduler.remove(handle)
        self._prefixes.forget(handle)
        handle.reason = reason
        del self._handles[handle.id]
        group = self._groups.get(kind_of(handle))
        if group is not None and not group.call.rows.members:  # its rows and session hold memory
            self._memory.groups.remove(self._groups.pop(kind_of(handle)))


def _row(handle: Handle) -> Row:
    assert handle.row is not None
    return handle.row


def _shares_weights(runner: ModelRunner, target: ModelRunner) -> bool:
    """Whether a drafter's runner runs layers of the target, in the target's cache."""
    return next(runner.model.parameters()) is next(target.model.parameters())
