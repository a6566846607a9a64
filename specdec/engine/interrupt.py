"""Ctrl-C between the steps of an engine rather than in the middle of one."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def interrupt_afterwards() -> Iterator[None]:
    """Hold SIGINT back until the block ends, so that caches and queues agree; a second one comes through at once.

    Other threads than the main one get no SIGINT, and what another library than Python has installed stays."""
    usual = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(usual):
        yield
        return
    held = []

    def hold(number, frame) -> None:
        signal.signal(signal.SIGINT, usual)
        held.append((number, frame))

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
        if held:
            usual(*held[0])
