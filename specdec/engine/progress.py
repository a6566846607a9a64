"""A progress bar of requests that finish."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(total: int, shown: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar of `total` requests -> a function that takes how many have finished since, and their new tokens.

    Warns where it cannot be `shown`, since tqdm is not installed."""
    if shown:
        try:
            from tqdm.auto import tqdm
        except ImportError:
            warnings.warn("progress=True shows nothing without tqdm: pip install tqdm", stacklevel=2)
            shown = False
    if not shown:
        yield lambda finished, tokens: None
        return
    with tqdm(total=total, unit="request") as bar:
        written = 0

        def update(finished: int, tokens: int) -> None:
            nonlocal written
            written += tokens
            bar.set_postfix(tokens=written, refresh=False)
            bar.update(finished)

        yield update
