"""Calls of all methods in turn, so that a slow moment of the machine affects them alike."""

import random
from collections.abc import Callable, Sequence

from scripts.cpu_bench.methods import Method
from scripts.cpu_bench.processes import Launcher, RemoteWorker, WorkerFailed

WARM_UP = 16  # tokens of each prompt that do not count


class Calls:
    """A worker for each method, asked in turn; one that fails is closed, named in `failed`, and asked no more."""

    def __init__(self, limit: float, say: Callable[[str], None]):
        self.workers: dict[str, RemoteWorker] = {}
        self.failed: dict[str, str] = {}
        self._limit, self._say = limit, say

    def start(self, methods: Sequence[Method], launcher: Launcher) -> None:
        """Start the workers, one after the other."""
        for method in methods:
            try:
                self.workers[method.name] = launcher(method)
            except WorkerFailed as error:
                self._lose(method.name, error)

    def __call__(self, method: str, prompts: list[list[int]], new_tokens: int) -> dict | None:
        """The worker's answer to a greedy call; None for a method that fails, now or before."""
        if method not in self.workers:
            return None
        try:
            return ask(self.workers[method], prompts, new_tokens, None, self._limit)
        except WorkerFailed as error:
            self._lose(method, error)
            return None

    def _lose(self, method: str, error: WorkerFailed) -> None:
        self.failed[method] = str(error)
        self._say(f"{method}: {error}")
        if method in self.workers:
            self.workers.pop(method).close()

    def close(self) -> None:
        """End all workers."""
        for worker in self.workers.values():
            worker.close()


def ask(worker: RemoteWorker, prompts: list[list[int]], new_tokens: int, seed: int | None, limit: float) -> dict:
    """A worker's answer to a call. Raises WorkerFailed, also where it writes another number of tokens."""
    answer = worker.ask({"call": {"prompts": prompts, "new_tokens": new_tokens, "seed": seed}}, limit)
    lengths = [len(text) for text in answer["texts"]]
    if lengths != [new_tokens] * len(prompts):
        raise WorkerFailed(f"wrote {lengths} tokens, not {new_tokens} for each of {len(prompts)} prompts")
    return answer


def measure(calls: Calls, batches: list[list[list[int]]], options) -> tuple[list[dict], dict[str, list[list[int]]]]:
    """`repeats` passes over all batches, methods in a new random order for each -> (records, texts by method).

    A record is a call; texts are those of the first pass, in the order of the prompts."""
    for method in list(calls.workers):
        for prompts in batches:
            calls(method, prompts, min(WARM_UP, options.new_tokens))
        calls(method, batches[0], options.new_tokens)
    records, shuffled = [], random.Random(options.seed)
    texts: dict[str, list[list[int]]] = {}
    for repeat in range(options.repeats):
        for number, prompts in enumerate(batches):
            for method in shuffled.sample(list(calls.workers), len(calls.workers)):
                answer = calls(method, prompts, options.new_tokens)
                if answer is None:
                    continue
                records.append({
                    "method": method, "kind": "all", "prompt": number, "temperature": 0.0, "repeat": repeat,
                    "new_tokens": options.new_tokens * len(prompts), "seconds": answer["wall"],
                    "cpu_seconds": answer["cpu"], "rounds": answer["rounds"], "peak_bytes": answer["peak"],
                })  # fmt: skip
                if repeat == 0:
                    texts.setdefault(method, []).extend(answer["texts"])
    whole = list(calls.workers)
    return [r for r in records if r["method"] in whole], {m: texts[m] for m in whole}
