"""Several processes of one test, as torchrun would start them, joined by gloo."""

import multiprocessing
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist


def run_ranks(folder: Path, work: Callable[[int], object], count: int = 2, seconds: float = 60) -> list[object]:
    """What `work(rank)` returns in each of `count` processes, forked from this one, or its exception as text.

    None for a process that was killed. `folder`: where they find each other."""
    meeting = folder / f"meeting{len(list(folder.iterdir()))}"
    meeting.mkdir()
    context = multiprocessing.get_context("fork")  # what is imported need not be imported again
    pipes = [context.Pipe(duplex=False) for _ in range(count)]
    processes = [
        context.Process(target=_run, args=(rank, count, meeting, work, pipes[rank][1])) for rank in range(count)
    ]
    for process in processes:
        process.start()
    for _, end in pipes:
        end.close()  # so that reading from a process that was killed ends
    try:
        return [_read(pipe, seconds) for pipe, _ in pipes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _read(pipe, seconds: float) -> object:
    if not pipe.poll(seconds):
        raise TimeoutError(f"a process has said nothing for {seconds} seconds")
    try:
        return pipe.recv()
    except EOFError:
        return None


def _run(rank: int, count: int, meeting: Path, work: Callable[[int], object], pipe) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count))
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}/store", rank=rank, world_size=count, timeout=timedelta(seconds=30)
    )
    try:
        pipe.send(work(rank))
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
    pipe.close()
    os._exit(0)  # without pytest's own end
