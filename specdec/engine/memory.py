"""The caches of an engine, each of one size for its whole life, and the pages that rows need in them."""

from collections.abc import Callable, Sequence

import torch

from attention.kv.cache import PagedKVCache
from specdec.engine.group import Group
from specdec.model.runner import ModelRunner
from specdec.requests.request import Request
from specdec.requests.rows import Row

CPU_MEMORY, GPU_SHARE = 2 << 30, 0.85  # bytes; of what is free


class CacheMemory:
    """The target's cache and those of draft models, with the same number of pages each.

    room: tokens that a round may add to a row in the target's cache.
    """

    def __init__(self, target: ModelRunner, drafts: Sequence[ModelRunner], num_pages: int, room: int):
        self.runners, self._room = [target, *drafts], room
        for runner in self.runners:
            runner.allocate(num_pages)
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
        for cache in self.caches:
            if cache.pages_for(request.limits[0] + self._room) > cache.num_pages:
                raise ValueError(
                    f"a prompt of {len(request.prompts[0])} tokens and {request.max_new_tokens} new ones do not fit "
                    f"into {cache.num_pages} pages of {cache.page_size} tokens: give the engine more memory"
                )

    def weights_changed(self) -> bool:
        """Whether the weights of any of the models are others than at the last call, or were written to."""
        before, self._weights = self._weights, [weights_now(runner.model) for runner in self.runners]
        return before != self._weights

    def free(self) -> list[int]:
        """See `scheduler.Memory`."""
        return [cache.free_pages for cache in self.caches]

    def for_round(self, row: Row) -> list[int]:
        """See `scheduler.Memory`."""
        table = self.runners[0].cache.table
        own = max(0, table.pages_for(row.reach + self._room) - len(table.pages(row.sequence)))
        if len(self.runners) == 1:
            return [own]
        wanted = [own, *[0] * (len(self.runners) - 1)]
        for state in self.holding(row).states:
            if state.runner in self.runners[1:]:
                wanted[self.runners.index(state.runner)] += max(0, state.pages_wanted(row))
        return wanted

    def for_text(self, tokens: int) -> list[int]:
        """See `scheduler.Memory`."""
        return [cache.pages_for(tokens + self._room) for cache in self.caches]


def weights_now(model) -> tuple:
    """What changes with a model's weights: their addresses, and how often each was written to in place."""
    return tuple((weight.data_ptr(), weight._version) for weight in model.parameters())


def memory_within(device: torch.device) -> int:
    """Bytes for caches where the user names none."""
    return int(GPU_SHARE * torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else CPU_MEMORY
