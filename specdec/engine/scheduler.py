"""Which requests run in the next step, which tokens of their prompts, and who must make room: on the host alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from specdec.engine.handle import Handle
from specdec.requests.rows import Row


class Memory(Protocol):
    """The caches of an engine, as the scheduler asks for them; numbers of pages are of each cache."""

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
    preempted: requests that must make room before the step.
    """

    rounds: tuple[Handle, ...]
    prompts: tuple[tuple[Handle, int], ...]
    preempted: tuple[Handle, ...]


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
        self.waiting.append(handle)
        self.waiting.sort(key=lambda one: (-one.priority, one.arrival))

    def remove(self, handle: Handle) -> None:
        """Forget a request that has finished."""
        for queue in (self.waiting, self.running):
            if handle in queue:
                queue.remove(handle)

    def step(self, admit: Callable[[Handle], Row | None], left: Callable[[Row], int]) -> Step:
        """Choose what runs next.

        admit: gives a waiting request a row; None: it had better wait.
        left: how many tokens of a row's text its sequence lacks before its next round.
        """
        preempted = self._make_room()
        self._admit(admit)
        budget, rounds, prompts = self._max_tokens, list[Handle](), list[tuple[Handle, int]]()
        for handle in self.running:  # those that decode come first
            if left(_row(handle)) == 0 and (budget >= self._round_tokens or not rounds):
                rounds.append(handle)
                budget -= self._round_tokens
        for handle in self.running:
            lacking = left(_row(handle))
            if lacking and budget > 0:
                prompts.append((handle, min(lacking, budget)))
                budget -= prompts[-1][1]
        return Step(tuple(rounds), tuple(prompts), tuple(preempted))

    def _make_room(self) -> list[Handle]:
        """Take requests out of `running` until the next rounds of all others fit."""
        preempted = []
        while len(self.running) > 1 and not self._fit([self._memory.for_round(_row(one)) for one in self.running]):
            last = min(reversed(self.running), key=lambda one: one.priority)
            self.running.remove(last)
            self.submit(last)
            preempted.append(last)
        return preempted

    def _admit(self, admit: Callable[[Handle], Row | None]) -> None:
        """Give rows to waiting requests, in order, while their prompts fit beside all that runs."""
        for handle in list(self.waiting):
            if len(self.running) >= self._max_rows or handle.row is not None:
                return
            text = self._memory.for_text(len(handle.prompt) + len(handle.record.new_tokens))
            if not self._fit([text, *(self._memory.for_round(_row(one)) for one in self.running)]):
                return
            if admit(handle) is not None:
                self.waiting.remove(handle)
                self.running.append(handle)

    def _fit(self, wanted: Sequence[Sequence[int]]) -> bool:
        return all(
            sum(pages) <= free for pages, free in zip(zip(*wanted, strict=True), self._memory.free(), strict=True)
        )


def _row(handle: Handle) -> Row:
    assert handle.row is not None
    return handle.row
