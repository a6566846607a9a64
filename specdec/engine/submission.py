"""What an engine makes of the arguments of `submit`, and of a request that others go on from."""

from dataclasses import replace

import torch

from specdec.engine.handle import Handle
from specdec.engine.prompts import Prompt, prompt_ids
from specdec.model.runner import ModelRunner
from specdec.requests.request import Request, build_request


def request_of(target: ModelRunner, tokenizer, prompt: Prompt, logprobs: bool, options: dict) -> Request:
    """One checked request. Raises ValueError or TypeError, naming the value, for what an engine does not take."""
    ids = prompt_ids(prompt, tokenizer)
    mask = torch.as_tensor(options.get("attention_mask", 1))
    if not bool((mask != 0).all()):
        raise ValueError(f"attention_mask must be all 1, as a prompt has no padding, got {mask.tolist()}")
    options = {name: given for name, given in options.items() if name != "attention_mask"}
    request = build_request(target, ids, torch.ones_like(ids), **{"tokenizer": tokenizer} | options)
    if len(request.prompts) > 1:
        raise ValueError(f"a request is one text: submit it {len(request.prompts)} times")
    if request.processors.memory:
        raise ValueError(f"{', '.join(request.processors.memory)} remembers earlier calls and cannot run here")
    if request.outputs:
        names = " and ".join(f"output_{name}" for name in request.outputs)
        raise ValueError(f"{names} would keep as many numbers as there are words for each token; see logprobs=True")
    return replace(request, outputs=("logprobs",)) if logprobs else request


def continued(handle: Handle, count: int, options: dict) -> tuple[list[int], dict]:
    """The text so far of a request, and the arguments of `submit` that go on from there with the rest of its limit."""
    if handle.reason not in (None, "cancelled", "interrupted"):
        raise ValueError(f"request {handle.id!r} has finished ({handle.reason}): nothing can go on from there")
    if handle.request.images is not None:
        raise ValueError(f"request {handle.id!r} has images in its prompt, from which no request can be forked yet")
    tokens = handle.tokens
    if count < 1 or (count > 1 and not options.get("do_sample", handle.request.do_sample)):
        raise ValueError(f"count must be at least 1, and 1 without do_sample (all texts would be equal), got {count}")
    settings = {name: value for name, value in handle.options.items() if name != "max_length"}
    settings |= {"max_new_tokens": handle.request.max_new_tokens - len(tokens), "priority": handle.priority}
    settings["logprobs"] = bool(handle.request.outputs)
    return [*handle.prompt, *tokens], settings | options
