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
    """Median forward times of `target` with 1 and `length` + 1 tokens and of `draft` with 1, batch 1, after `context` tokens."""
    forwards = [(target, 1), (target, length + 1), (draft, 1)]
    sequences, times = {}, [[] for _ in forwards]
    try:
        for runner in (target, draft):
            runner.reserve([context + length + 1])
            sequences[runner] = runner.cache.add()
            runner.extend([sequences[runner]], [torch.arange(context, device=runner.device) % runner.vocab_size])
        for repeat in range(repeats + 3):
            for kept, (runner, count) in zip(times, forwards, strict=True):  # side by side, so that a slow moment hits all
                began = time.perf_counter()
                runner.forward([sequences[runner]], torch.arange(count, device=runner.device), [count]).logits.argmax(-1).tolist()
                if repeat >= 3:
                    kept.append(time.perf_counter() - began)
                runner.cache.truncate(sequences[runner], context)
    finally:
        for runner, sequence in sequences.items():
            runner.cache.free(sequence)
    step, verify, drafted = (statistics.median(t) for t in times)
    return Costs(step, drafted / step, verify / step)
