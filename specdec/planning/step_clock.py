"""The time of a plain step, the unit of a round's overhead in statistics."""

import statistics
import time
from collections.abc import Callable, Sequence

REPEATS = 5

# makes a function to time, and the number of plain steps that one call of it runs
Prepare = Callable[[], tuple[Callable[[], None], int]]


def median_seconds(steps: Callable[[], None], count: int) -> float:
    """Seconds of one of the `count` steps that `steps` runs: the median of five calls, after one to warm up."""
    steps()
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        steps()
        times.append((time.perf_counter() - began) / count)
    return statistics.median(times)


class StepClock:
    """Times plain steps, once for each size of batch.

    seconds: (where, mode, rows, binary magnitude of the longest row) -> seconds of a step.
    spent: seconds that all measurements took.
    """

    def __init__(self):
        self.seconds: dict[tuple[str, str, int, int], float] = {}
        self.spent = 0.0

    def measure(self, where: str, mode: str, lengths: Sequence[int], prepare: Prepare) -> float:
        """Seconds of a plain step of rows of `lengths`, see `median_seconds`.

        `where` ("host" or "device") and the runner's `mode` tell how steps run; see `Prepare`."""
        size = where, mode, len(lengths), max(lengths).bit_length()
        if size not in self.seconds:
            began = time.perf_counter()
            self.seconds[size] = median_seconds(*prepare())
            self.spent += time.perf_counter() - began
        return self.seconds[size]
