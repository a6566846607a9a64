"""Which tokens of its sequence a query sees in a cache that keeps a long text short.

Source: Xiao et al. 2024 (StreamingLLM), whose first tokens take the attention that nothing else needs."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KeyWindow:
    """A query sees the last `size` tokens, itself included, and the first `sinks` ones of its sequence.

    Raises ValueError for a size below 1 and negative sinks.

    >>> [key for key in range(9) if KeyWindow(3, sinks=2).holds(8, key)]
    [0, 1, 6, 7, 8]
    """

    size: int
    sinks: int = 0

    def __post_init__(self):
        numbers = self.size, self.sinks
        if any(type(number) is not int for number in numbers) or self.size < 1 or self.sinks < 0:
            raise ValueError(f"a window must be at least 1 and sinks at least 0, got {self.size!r} and {self.sinks!r}")

    def holds(self, query: int, key: int) -> bool:
        """Whether the token at position `query` sees that at `key`, which does not come after it."""
        return query - key < self.size or key < self.sinks

    @classmethod
    def of(cls, window: int | None, sinks: int) -> "KeyWindow | None":
        """None without a window. Raises ValueError for sinks without one."""
        if window is None and sinks:
            raise ValueError(f"sinks are seen beside a window, got sinks {sinks!r} and window None")
        return None if window is None else cls(window, sinks)
