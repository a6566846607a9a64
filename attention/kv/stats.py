"""How full the cache is."""

from collections import Counter
from dataclasses import dataclass

from attention.kv.page_table import PageTable


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Pages by their state, and what is wasted: each page is free, reusable or owned.

    total: pages of the cache
    free: pages that hold nothing
    reusable: pages that no sequence owns and whose tokens a new sequence may take over; the next to be taken after
        the free ones
    owned: pages that sequences own, each counted once
    shared: those of the owned pages that several sequences own
    wasted_tail: tokens for which owned pages have room that none of their owners uses
    bytes_per_page: bytes of keys, values and scales of all layers

    Raises ValueError for counts that do not add up.

    >>> CacheStats(total=8, free=5, reusable=1, owned=2, shared=0, wasted_tail=3, bytes_per_page=4096).bytes_in_use
    12288
    """

    total: int
    free: int
    reusable: int
    owned: int
    shared: int
    wasted_tail: int
    bytes_per_page: int

    def __post_init__(self):
        if self.free + self.reusable + self.owned != self.total or not self.shared <= self.owned:
            raise ValueError(f"free, reusable and owned pages must add up to the total, shared ones be owned: {self}")

    @property
    def bytes_in_use(self) -> int:
        """Bytes of the pages that hold something: owned or reusable."""
        return (self.owned + self.reusable) * self.bytes_per_page

    @classmethod
    def of_table(cls, table: PageTable, bytes_per_page: int) -> "CacheStats":
        """The state of `table`, whose pages have `bytes_per_page`.

        >>> table = PageTable(num_pages=4, page_size=16)
        >>> table.append([table.add()], [20])
        []
        >>> stats = CacheStats.of_table(table, bytes_per_page=1024)
        >>> stats.free, stats.owned, stats.wasted_tail
        (2, 2, 12)
        """
        owners: Counter[int] = Counter()
        used: Counter[int] = Counter()  # tokens of each page that the owner with the most of them holds
        for sequence in table.sequences:
            size, held = table.page_size, table.held_places(sequence)
            owners.update(page for _, page in held)
            for i, page in held:
                used[page] = max(used[page], min(size, table.length(sequence) - i * size))
        return cls(
            total=table.num_pages,
            free=table.blank_pages,
            reusable=table.reusable_pages,
            owned=len(owners),
            shared=sum(count > 1 for count in owners.values()),
            wasted_tail=len(owners) * table.page_size - used.total(),
            bytes_per_page=bytes_per_page,
        )
