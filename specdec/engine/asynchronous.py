"""Coroutines that wait for an engine, which one task steps in a thread while anything is at work."""

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from specdec.engine.handle import Handle
from specdec.engine.prompts import Prompt

if TYPE_CHECKING:
    from specdec.engine.engine import Engine


class AsyncSteps:
    """Steps an engine for coroutines of one event loop; what they submit and cancel is done between two steps."""

    def __init__(self, engine: "Engine"):
        self._engine = engine
        self._task: asyncio.Task | None = None
        self._orders: list[tuple[Callable[[], Any], asyncio.Future]] = []
        self._waiting: list[tuple[Callable[[], bool], asyncio.Future]] = []
        self._submitted: set[Handle] = set()  # by coroutines, and at work

    async def generate(self, prompt: Prompt, options: dict) -> Handle:
        """See `Engine.generate_async`."""
        submitted = self._submit(prompt, options)
        try:
            handle = await submitted
            await self._until(lambda: handle.finished)
            return handle
        finally:
            self._let_go(submitted)

    async def stream(self, prompt: Prompt, options: dict) -> AsyncIterator[list[int]]:
        """See `Engine.stream_async`."""
        submitted, seen = self._submit(prompt, options), 0
        try:
            handle = await submitted
            while True:
                await self._until(partial(_has_more, handle, seen))
                finished, tokens = handle.finished, handle.tokens[seen:]  # in this order: more may come meanwhile
                if tokens:
                    seen += len(tokens)
                    yield tokens
                elif finished:
                    break
            if handle.error is not None:
                raise handle.error
        finally:
            self._let_go(submitted)

    def _submit(self, prompt: Prompt, options: dict) -> asyncio.Future:
        def submit() -> Handle:
            handle = self._engine.submit(prompt, **options)
            self._submitted.add(handle)
            return handle

        return self._order(submit)

    def _let_go(self, submitted: asyncio.Future) -> None:
        """Cancel the request of a coroutine that waits no longer, unless it has finished."""
        if not submitted.done():
            submitted.cancel()
        elif not submitted.cancelled() and submitted.exception() is None and not submitted.result().finished:
            self._order(lambda: self._engine.cancel(submitted.result()))

    def _order(self, call: Callable[[], Any]) -> asyncio.Future:
        """Have `call` made between two steps -> its result."""
        loop = asyncio.get_running_loop()
        if (ranks := self._engine.target.ranks).several:
            raise ValueError(
                f"coroutines may come in another order on each of the {ranks.count} ranks over which the target's "
                "weights are split: use submit and step"
            )
        if self._task is not None and self._task.get_loop() is not loop:
            if not self._task.done() and not self._task.get_loop().is_closed():
                raise RuntimeError("the engine is at work for another event loop")
            self._orders, self._waiting = [], []
        self._orders.append((call, future := loop.create_future()))
        if self._task is None or self._task.done() or self._task.get_loop() is not loop:
            self._task = loop.create_task(self._steps())
        return future

    async def _until(self, ready: Callable[[], bool]) -> None:
        """Wait for the end of a step after which `ready` holds."""
        if not ready():
            self._waiting.append((ready, future := asyncio.get_running_loop().create_future()))
            await future

    async def _steps(self) -> None:
        """Step while anything is at work. What ends a step is raised by all coroutines that wait."""
        try:
            while True:
                self._make_calls()
                self._wake()
                if self._engine.idle and not self._orders:
                    return
                step = asyncio.ensure_future(asyncio.to_thread(self._engine.step))
                try:
                    await asyncio.shield(step)
                except asyncio.CancelledError:
                    await asyncio.wait([step])  # a thread cannot be stopped in the middle of a step
                    raise
        except BaseException as error:
            for _, future in (*self._orders, *self._waiting):
                if not future.done():
                    future.set_exception(error) if isinstance(error, Exception) else future.cancel()
            self._orders, self._waiting = [], []
            for handle in self._submitted:  # nobody steps for them any more
                self._engine.cancel(handle)
            self._submitted.clear()
            if not isinstance(error, Exception):
                raise

    def _make_calls(self) -> None:
        orders, self._orders = self._orders, []
        for call, future in orders:
            if future.cancelled():
                continue
            try:
                future.set_result(call())
            except Exception as error:
                future.set_exception(error)

    def _wake(self) -> None:
        """Let those go on whose condition holds by now."""
        self._submitted = {handle for handle in self._submitted if not handle.finished}
        done = [future for ready, future in self._waiting if ready()]
        self._waiting = [(ready, future) for ready, future in self._waiting if future not in done]
        for future in done:
            if not future.done():
                future.set_result(None)


def _has_more(handle: Handle, seen: int) -> bool:
    return handle.finished or len(handle.record.new_tokens) > seen
