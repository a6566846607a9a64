"""Results of an engine as they come: requests that finish, and new tokens of one request."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from specdec.engine.handle import Handle
from specdec.engine.progress import progress_bar

if TYPE_CHECKING:
    from specdec.engine.engine import Engine


def finished_requests(engine: "Engine", progress: bool) -> Iterator[Handle]:
    """Step to the end -> the handles as they finish; see `Engine.run`."""
    with progress_bar(len(engine.at_work), progress) as update:
        while not engine.idle:
            before = engine.at_work
            try:
                finished = engine.step()
            except KeyboardInterrupt:
                rest = engine.at_work
                for handle in rest:
                    engine.cancel(handle, "interrupted")
                yield from (handle for handle in dict.fromkeys([*before, *rest]) if handle.finished)
                raise
            for handle in finished:
                update(1, len(handle.record.new_tokens))
                yield handle


def new_tokens(engine: "Engine", handle: Handle) -> Iterator[list[int]]:
    """Step until `handle` has finished -> its tokens as they come; see `Engine.stream`."""
    seen = 0
    while True:
        tokens = handle.tokens[seen:]
        if tokens:
            seen += len(tokens)
            yield tokens
        elif handle.error is not None:
            raise handle.error
        elif handle.finished:
            return
        else:
            engine.step()
