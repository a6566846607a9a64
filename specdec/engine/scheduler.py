"""Which requests run in the next step, which tokens of their prompts, and who must make room: on the host alone."""

from bisect import insort
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from specdec.engine.handle import Handle
from specdec.requests.rows import Row


class Memory(Protocol):
    """The caches of an engine, as the scheduler asks for them; numbers of pages are of each cache.

    Where the target keeps recurrent states, the number of rows with one comes after them."""

    def free(self) -> Sequence[int]:
        """Pages that can be taken."""

    def for_round(self, row: Row) -> Sequence[int]:
        """Pages that the next round of a row may take, with what of its text its sequences lack."""

    def for_text(self, tokens: int) -> Sequence[int]:
        """Pages that a new row with a text of so many tokens may take until its first round ends."""


@dataclass(frozen=True, slots=True)
class Step:
    """What runs in one step.

    rounds: requests that take part in a round.
    prompts: requests whose prompt runs on, each with its number of tokens.
    """

    rounds: tuple[Handle, ...]
    prompts: tuple[tuple[Handle, int], ...]


class Scheduler:
    """Requests in two queues: those that wait, by priority and arrival, and those that run, in the order of admission.

    A running request keeps running: prompts fill up what its rounds leave of `max_tokens` in a step. If pages run
    out, the request of the lowest priority that was admitted last makes room, and waits at the head of its priority.
    """

    def __init__(self, memory: Memory, max_tokens: int, max_rows: int, round_tokens: int):
        if max_tokens < 1 or max_rows < 1:
            raise ValueError(f"max_tokens_per_step and max_rows must be at least 1, got {max_tokens} and {max_rows}")
        self._memory, self._max_tokens, self._max_rows = memory, max_tokens, max_rows
        self._round_tokens = round_tokens  # of one row in a round
        self.waiting: list[Handle] = []
        self.running: list[Handle] = []

    def submit(self, handle: Handle) -> None:
        """Let a request wait."""
        insort(self.waiting, handle, key=lambda one: (-one.priority, one.arrival))

    def remove(self, handle: Handle) -> None:
        """Forget a request that has finished."""
        for queue in (self.waiting, self.running):
            if handle in queue:
                queue.remove(handle)

    def step(self, admit: Callable[[Handle], Row | None], preempt: Callable[[Handle], None],
             left: Callable[[Row], int]) -> Step:  # fmt: skip
        """Choose what runs next.

        admit: gives a waiting request a row; None: it had better wait.
        preempt: takes the row, and all pages that no other row shares, away from a request that must make room.
        left: how many tokens of a row's text its sequence lacks before its next round.
        """
        self._admit(admit, *self._make_room(preempt))
        lacking = [left(_row(handle)) for handle in self.running]
        decoding = [handle for handle, tokens in zip(self.running, lacking, strict=True) if tokens == 0]
        rounds = decoding[: max(1, self._max_tokens // self._round_tokens)]  # they come first
        budget, prompts = self._max_tokens - len(rounds) * self._round_tokens, list[tuple[Handle, int]]()
        for handle, tokens in zip(self.running, lacking, strict=True):
            if tokens and budget > 0:
                prompts.append((handle, min(tokens, budget)))
                budget -= prompts[-1][1]
        return Step(tuple(rounds), tuple(prompts))

    def _make_room(self, preempt: Callable[[Handle], None]) -> tuple[list[Handle], list[int]]:
        """Let requests make room, one after the other, until the next rounds of all others fit.

        Returns those that made room, and the pages that these rounds want."""
        preempted = []
        wanted = {one: self._memory.for_round(_row(one)) for one in self.running}
        while len(self.running) > 1 and not self._fit(_total(wanted.values())):
            last = min(reversed(self.running), key=lambda one: one.priority)
            preempt(last)
            self.running.remove(last)
            self.submit(last)
            preempted.append(last)
            del wanted[last]
        return preempted, _total(wanted.values())

    def _admit(self, admit: Callable[[Handle], Row | None], preempted: Sequence[Handle], rounds: list[int]) -> None:
        """Give rows to waiting requests, in order, while their prompts fit beside the `rounds` of all that runs."""
        if len(self.running) >= self._max_rows:
            return
        for handle in list(self.waiting):
            if len(self.running) >= self._max_rows or handle in preempted:
                return
            text = self._memory.for_text(handle.length)
            if not self._fit(_total([text, rounds] if rounds else [text])):
                return
            row = admit(handle)
            if row is not None:
                self.waiting.remove(handle)
                self.running.append(handle)
                rounds = _total([rounds, self._memory.for_round(row)] if rounds else [self._memory.for_round(row)])

    def _fit(self, wanted: Sequence[int]) -> bool:
        return all(pages <= free for pages, free in zip(wanted, self._memory.free(), strict=True))


def _total(wanted: Iterable[Sequence[int]]) -> list[int]:
    """The pages of each cache that several requests want together."""
    return [sum(pages) for pages in zip(*wanted, strict=True)]


def _row(handle: Handle) -> Row:
    assert handle.row is not None
    return handle.row
