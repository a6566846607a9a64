"""transformers' continuous batching, as `scripts.bench_serving` measures it."""

import copy
import time
from collections.abc import Sequence

from scripts.serving_bench.drive import Delivery
from scripts.serving_bench.workload import Request

BLOCK = 256  # tokens, the releases' own default


def twin_of(model):
    """A model of its own, with its own settings, over the very same weights: the manager changes its model's."""
    return copy.deepcopy(model, {id(one): one for one in (*model.parameters(), *model.buffers())})


class BatchServer:
    """What `model.generate_batch` runs: its manager, which `generate_batch` itself gives one length for all requests.

    Here each request has its own. Tokens have the times that transformers writes down. Its thread and its captured
    graphs live as long as the server, so that no pass pays for their beginning.

    The cache holds all `requests` and a quarter more; a step has as many tokens as one of the engine. Left to itself
    it takes most of the device's memory.
    """

    streams, has_steps = True, False

    def __init__(self, model, requests: Sequence[Request], tokens_per_step: int):
        # here, so that a release without them costs this method alone
        from transformers import ContinuousBatchingConfig
        from transformers.generation.continuous_batching.utils import WorkloadHints

        lengths = [(len(one.prompt) + 1, one.new_tokens) for one in requests]
        blocks = sum(-(-(prompt + new) // BLOCK) for prompt, new in lengths)
        longest = [max(sizes) for sizes in zip(*lengths, strict=True)]
        twin = twin_of(model)
        twin.generation_config.eos_token_id = -1  # none; without a word about it
        self._context = twin.continuous_batching_context_manager(
            continuous_batching_config=ContinuousBatchingConfig(
                num_blocks=blocks + blocks // 4 + 1, max_batch_tokens=tokens_per_step
            ),
            workload_hints=WorkloadHints(*longest, num_requests=len(requests)), block=True, timeout=5,
        )  # fmt: skip
        self._manager = self._context.__enter__()
        self._numbers: dict[str, int] = {}

    def submit(self, number: int, request: Request) -> None:
        """See `drive.Server`. Raises RuntimeError where the manager has stopped."""
        name = self._manager.add_request(
            list(request.prompt), max_new_tokens=request.new_tokens, record_timestamps=True, eos_token_id=-1
        )
        if name is None:
            raise RuntimeError("transformers' manager takes no further requests")
        self._numbers[name] = number

    def step(self, wait: float) -> list[Delivery]:
        """Wait for a request to finish. Raises RuntimeError for one that failed, and where the manager has stopped."""
        result = self._manager.get_result(timeout=wait)
        if result is None:
            if not self._manager.is_running():
                raise RuntimeError("transformers' manager has stopped")
            return []
        if result.error is not None:
            raise RuntimeError(f"transformers: {result.error}")
        if not result.is_finished():
            return []
        number, tokens = self._numbers.pop(result.request_id), list(result.generated_tokens)
        times = result.timestamps or [time.perf_counter()] * len(tokens)
        found = [Delivery(number, at, [token], False) for at, token in zip(times, tokens, strict=True)]
        return [*found[:-1], found[-1]._replace(last=True)]

    def counts(self) -> dict:
        """Nothing."""
        return {}

    def close(self) -> None:
        """End its thread and drop its cache."""
        self._context.__exit__(None, None, None)
        self._manager = self._context = None
