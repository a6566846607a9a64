"""What a draft step and a verification cost on this machine, in units of one autoregressive step."""

import statistics
import time
from dataclasses import dataclass

import torch

from specdec.runner import ModelRunner


@dataclass(frozen=True, slots=True)
class Costs:
    """`step_seconds`: one token through the target; `draft`: one draft step and `verify`: γ + 1 tokens, both as multiples of it."""

    step_seconds: float
    draft: float
    verify: float


@torch.inference_mode()
def measure_costs(target: ModelRunner, draft: ModelRunner, length: int, context: int = 128, repeats: int = 15) -> Costs:
    """Median forward times of `target` with 1 and `length` + 1 tokens and of `draft` with 1, batch 1, after `context` tokens.

    Raises ValueError when both are the same runner.
    """
    if target is draft:
        raise ValueError("target and draft must be two runners, so that each has a cache of its own")
    sequences, times = {}, {"step": [], "verify": [], "draft": []}

    def run(runner, count):
        runner.forward([sequences[runner]], torch.arange(count, device=runner.device), [count]).logits.argmax(-1).tolist()

    try:
        for runner in (target, draft):
            runner.reserve([context + length + 1])
            sequences[runner] = runner.cache.add()
            runner.extend([sequences[runner]], [torch.arange(context, device=runner.device) % runner.vocab_size])
        for _ in range(repeats + 3):  # side by side, so that a slow moment hits all; draft steps in a row, as a round runs them
            for name, runner, count, calls in (("step", target, 1, 1), ("draft", draft, 1, length), ("verify", target, length + 1, 1)):
                began = time.perf_counter()
                for _ in range(calls):
                    run(runner, count)
                times[name].append((time.perf_counter() - began) / calls)
                runner.cache.truncate(sequences[runner], context)
    finally:
        for runner, sequence in sequences.items():
            runner.cache.free(sequence)
    step, drafted, verify = (statistics.median(times[name][3:]) for name in ("step", "draft", "verify"))
    return Costs(step, drafted / step, verify / step)
