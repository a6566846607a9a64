"""The paged cache that a runner owns: made when calls need it, as large as they need it, or of a fixed size."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from attention.kv.cache import PagedKVCache
from attention.kv.page_format import PageFormat
from attention.kv.window import KeyWindow
from specdec.cuda_graph import round_up

MIN_PAGES = 16  # in a cache that graphs read


class OwnCache:
    """Holds the cache of a runner, or none yet.

    fixed_pages: its size (None: whatever calls need).
    drop_graphs: called before the cache is replaced, which graphs read where it lies.
    sees: which tokens a query sees there (None: what the model says).
    devices: of each layer, for a model on several (None: `device`).
    """

    def __init__(self, format: PageFormat, device: torch.device, drop_graphs: Callable[[], None],
                 fixed_pages: int | None = None, sees: KeyWindow | None = None,
                 devices: Sequence[torch.device] | None = None):  # fmt: skip
        self.format, self._device, self._drop_graphs, self._fixed_pages = format, device, drop_graphs, fixed_pages
        self.held: PagedKVCache | None = None
        self.sees, self._devices = sees, devices
        self._rollback, self._cells = 0, None  # type: tuple[int, int | None]

    @property
    def cache(self) -> PagedKVCache:
        """The cache. Raises RuntimeError before `reserve`."""
        if self.held is None:
            raise RuntimeError("the cache does not exist yet: call ModelRunner.reserve with the lengths it has to hold")
        return self.held

    def share(self, cache: PagedKVCache) -> None:
        """Hold another runner's cache."""
        if self.held is not cache:
            self._drop_graphs()
            self.held = cache

    def reserve(self, lengths: Sequence[int], spare: bool) -> None:
        """Make room for sequences of these lengths, by a larger cache if the present one holds no sequence.

        spare: whether to leave some room, since replacing the cache costs all graphs."""
        pages, cache = sum(-(-length // self.format.page_size) for length in lengths), self.held
        if cache is not None and (pages <= cache.free_pages or cache.sequences or self._fixed_pages is not None):
            return
        if spare:
            pages = round_up(pages, MIN_PAGES)
        self._replace(max(pages, 1) if self._fixed_pages is None else self._fixed_pages)

    def require_rollback(self, tokens: int) -> None:
        """See `ModelRunner.require_rollback`."""
        self._rollback = max(self._rollback, tokens)
        if self.held is not None and self.held.states is not None:
            self.held.states.require_rollback(self._rollback)

    def allocate(self, num_pages: int | None, cells: int | None = None) -> None:
        """See `ModelRunner.allocate`."""
        self._require_empty()
        self._fixed_pages, self._cells = num_pages, cells
        self._replace(num_pages)

    def change_page_size(self, tokens: int) -> None:
        """Hold pages of so many tokens from now on. Raises RuntimeError while the present cache holds sequences."""
        if tokens != self.format.page_size:
            self._require_empty()
            self.format = replace(self.format, page_size=tokens)
            self._replace(self._fixed_pages)

    def _require_empty(self) -> None:
        if self.held is not None and self.held.sequences:
            raise RuntimeError(f"the cache holds {len(self.held.sequences)} sequences and cannot be replaced")

    def _replace(self, num_pages: int | None) -> None:
        self.held = None  # frees the old memory before the new is allocated
        self._drop_graphs()
        if num_pages is not None:
            format = self.format
            self.held = PagedKVCache.for_layout(
                format.layout, num_pages, format.page_size, self._devices, dtype=format.dtype, device=self._device,
                kv_dtype=format.kv_dtype, sees=self.sees, cells=self._cells,
            )  # fmt: skip
            if self.held.states is not None:
                self.held.states.on_move = self._drop_graphs
            self.require_rollback(self._rollback)
