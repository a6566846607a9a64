"""The caches of an engine, each of one size for its whole life, and the pages that rows need in them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from attention.hf.split import local_part
from attention.kv.cache import PagedKVCache
from attention.kv.layout import Layer, LayerLayout
from attention.kv.page_format import PageFormat, pages_within
from attention.kv.state_pool import bytes_of
from specdec.engine.group import Group
from specdec.model.round_runner import RoundRunner
from specdec.model.runner import ModelRunner
from specdec.requests.request import Request
from specdec.requests.rows import Row

CPU_MEMORY, GPU_SHARE = 2 << 30, 0.85  # bytes; of what is free


class CacheMemory:
    """The target's cache and those of draft models, with the same number of pages each.

    Where the target keeps recurrent states, the number of rows that have one is counted after the pages of all caches.

    room: tokens that a round may add to a row in the target's cache.
    draft_room: the same of caches of draft models, whose trees grow wider than what they propose.
    step: tokens of a step, of which all may belong to one prompt.
    """

    def __init__(self, target: ModelRunner, drafts: Sequence[RoundRunner], sizes: "CacheSizes", room: int,
                 draft_room: int, step: int):  # fmt: skip
        self.runners: list[RoundRunner] = [target, *drafts]
        self._target, self._room, self._draft_room, self._step = target, room, draft_room, step
        for runner in self.runners:
            runner.allocate(sizes.pages, sizes.cells if runner is target else None)
        self.holding: Callable[[Row], Group]  # gives the group of a row; set by the engine
        self._weights: list[tuple] = []

    @property
    def caches(self) -> list[PagedKVCache]:
        """The target's, then the draft models'."""
        return [runner.cache for runner in self.runners]

    def release(self) -> None:
        """Give the caches back: calls of generators make theirs as they need them."""
        for runner in self.runners:
            runner.allocate(None)

    def require_fit(self, request: Request) -> None:
        """Raise ValueError for a request that would not fit if it ran alone."""
        if request.images is not None and self._target.window is not None and len(request.prompts[0]) > self._step:
            raise ValueError(
                f"a prompt with images runs whole, and this one of {len(request.prompts[0])} tokens is longer than a "
                f"step of {self._step} of a model with windows: raise max_tokens_per_step"
            )
        wanted = self.for_text(request.limits[0])[: len(self.caches)]  # a single row's states always fit
        for cache, pages in zip(self.caches, wanted, strict=True):
            if pages > cache.num_pages:
                raise ValueError(
                    f"a prompt of {len(request.prompts[0])} tokens and {request.max_new_tokens} new ones do not fit "
                    f"into {cache.num_pages} pages of {cache.page_size} tokens: give the engine more memory"
                )

    def weights_changed(self) -> bool:
        """Whether the weights of any of the models are others than at the last call, or were written to.

        Draft models take over the target's mode first, which may move their weights once."""
        for runner in self.runners[1:]:
            runner.match_mode(self._target)
        before, self._weights = self._weights, [weights_now(runner.model) for runner in self.runners]
        return before != self._weights

    def free(self) -> list[int]:
        """See `scheduler.Memory`."""
        pages, states = [cache.free_pages for cache in self.caches], self.caches[0].states
        return pages if states is None else [*pages, states.free_cells or 0]

    def for_round(self, row: Row) -> list[int]:
        """See `scheduler.Memory`."""
        table = self.runners[0].cache.table
        places = len(table.pages(row.sequence))
        own = table.pages_for(row.reach + self._room) - places
        if self.runners[0].window is not None:
            own = min(own, self._at_once(row.ahead) - places + table.freed_pages(row.sequence))
        wanted, states = [max(0, own), *[0] * (len(self.runners) - 1)], self.caches[0].states
        if states is not None:
            wanted.append(0 if states.held(row.sequence) else 1)
        if len(self.runners) == 1:
            return wanted
        for state in self.holding(row).states:
            if state.runner in self.runners[1:]:
                wanted[self.runners.index(state.runner)] += max(0, state.pages_wanted(row))
        return wanted

    def for_text(self, tokens: int) -> list[int]:
        """See `scheduler.Memory`."""
        target, *drafts = self.caches
        most = min(target.pages_for(tokens + self._room), self._at_once())
        pages = [most, *(cache.pages_for(tokens + self._draft_room) for cache in drafts)]
        return pages if target.states is None else [*pages, 1]

    def _at_once(self, ahead: int = 0) -> int:
        """The most pages of the target's cache that a row owns at any time; `ahead`: tokens of rounds in flight.

        Where every layer has a window these are the pages of the window, which may begin inside a page, of a step's
        prompt, of a round, and of the last one that was read."""
        cache, window = self.caches[0], self.runners[0].window
        if window is None:
            return cache.num_pages
        return cache.pages_for(max(window, cache.page_size) + self._step + 2 * self._room + ahead) + 1

    @property
    def windowed(self) -> bool:
        """Whether some model reads a window only, in every layer."""
        return any(runner.window is not None for runner in self.runners)

    def free_fronts(self, rows: Iterable[Row]) -> None:
        """Give back what no later round of `rows` reads, of the models that read a window only.

        Drafts do not count as text, in flight or not, and draft models may run the end of a text once more."""
        for row in rows:
            group = self.holding(row)
            held = [(self.runners[0], row.sequence, settled(self.runners[0], row.sequence, row))]
            for state in group.states:
                sequence = state.prefix_sequence(row)
                if sequence is not None and state.runner in self.runners[1:]:
                    known = min(settled(state.runner, sequence, row), row.length - group.runs_again)
                    held.append((state.runner, sequence, max(0, known)))
            for runner, sequence, committed in held:
                if runner.window is not None:
                    runner.cache.free_front(sequence, committed, runner.window)


def settled(runner: RoundRunner, sequence: int, row: Row) -> int:
    """Tokens of a row that `sequence` holds in `runner`'s cache and no round can move: all up to the last round read.

    Drafts are not among them, nor what rounds in flight may add."""
    return min(runner.cache.length(sequence), row.length_before - 1)


def weights_now(model) -> tuple:
    """What changes with a model's weights: their addresses, and how often each was written to in place."""
    return tuple((local_part(weight).data_ptr(), weight._version) for weight in model.parameters())


@dataclass(frozen=True, slots=True)
class CacheSizes:
    """pages: of each cache; cells: rows that may have recurrent states of the target (None: it keeps none)."""

    pages: int
    cells: int | None = None


def cache_sizes(target: ModelRunner, drafts: Sequence[RoundRunner], memory: int | None, rows: int, room: int,
                draft_room: int) -> CacheSizes:  # fmt: skip
    """What fits into `memory`, see `num_pages`: recurrent states for up to `rows` in half of it, pages in the rest.

    room, draft_room: tokens that a round may add to a row in the target's cache, and in one of a draft model."""
    per_row: dict[torch.device, int] = {}
    for runner, rollback in ((target, room), *((draft, draft_room) for draft in drafts)):
        if runner.recurrent and isinstance(runner, ModelRunner):
            runner.require_rollback(rollback)
            layers = zip(runner.page_format.layout.recurrent, runner.adapter.state_devices, strict=True)
            for layer, device in layers:
                per_row[device] = per_row.get(device, 0) + bytes_of(layer, runner.dtype, rollback)
    if not per_row:
        return CacheSizes(num_pages(target, drafts, memory))
    least = lambda number: min(target.ranks.all_of(number))
    if memory is None:
        shares = [least(memory_within(device)) // 2 // taken for device, taken in per_row.items()]
    else:
        shares = [least(memory) // 2 // sum(per_row.values())]
    cells = min(rows, *shares)
    if cells < 1:
        raise ValueError(
            f"a row's recurrent states take {sum(per_row.values())} bytes and may take half of the memory, got {memory}"
        )
    taken = {device: (cells + 1) * one for device, one in per_row.items()}
    return CacheSizes(num_pages(target, drafts, memory, taken), cells if target.recurrent else None)


def num_pages(target: ModelRunner, drafts: Sequence[RoundRunner], memory: int | None,
              taken: Mapping[torch.device, int] | None = None) -> int:  # fmt: skip
    """Pages of each runner's cache: those of all caches fit into `memory` bytes (None: those of each device there).

    taken: bytes of them that recurrent states take, on each device.

    The first rank of a target that is split over ranks decides with all others, by the least memory. Raises ValueError
    where not a page of each fits."""
    runners, taken = list[RoundRunner]([target, *drafts]), taken or {}
    least = lambda number: min(target.ranks.all_of(number))
    if memory is not None:
        return pages_within(least(memory) - sum(taken.values()), *(runner.page_format for runner in runners))
    formats: dict[torch.device, list[PageFormat]] = {}
    for runner in runners:
        for device, form in page_formats(runner).items():
            formats.setdefault(device, []).append(form)
    room = [(least(memory_within(device)) - taken.get(device, 0), held) for device, held in formats.items()]
    return min(pages_within(memory, *held) for memory, held in room)


def page_formats(runner: RoundRunner) -> dict[torch.device, PageFormat]:
    """What a page of a runner's cache holds on each device that has layers of its model."""
    layout = runner.page_format.layout
    devices = runner.adapter.devices if isinstance(runner, ModelRunner) else [runner.device] * len(layout.layers)
    held: dict[torch.device, list[Layer]] = {}
    for number, layer in layout.keeping:
        held.setdefault(devices[number], []).append(layer)
    return {device: replace(runner.page_format, layout=LayerLayout(tuple(own))) for device, own in held.items()}


def memory_within(device: torch.device) -> int:
    """Bytes for caches where the user names none."""
    return int(GPU_SHARE * torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else CPU_MEMORY
