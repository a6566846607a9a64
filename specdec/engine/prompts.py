"""Prompts as an engine takes them: token ids, a text, or a chat."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Message = Mapping[str, object]
Prompt = Tensor | Sequence[int] | str | Sequence[Message]


def prompt_ids(prompt: Prompt, tokenizer) -> Tensor:
    """A prompt as ids `[1, n]` on the host, so that none waits for a GPU at work.

    A chat template writes its special tokens itself.

    Raises ValueError for a text without a tokenizer, a chat without a template or that the template does not take, and
    for ids of none or several texts."""
    if isinstance(prompt, str):
        prompt = _require_tokenizer(tokenizer, "text")(prompt, return_tensors="pt").input_ids
    elif _is_chat(prompt):
        text = _templated(prompt, _require_tokenizer(tokenizer, "a chat"))
        prompt = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    ids = torch.as_tensor(prompt, device="cpu")
    ids = ids[None] if ids.ndim == 1 else ids
    if ids.ndim != 2 or len(ids) != 1 or ids.shape[1] == 0:
        raise ValueError(f"a prompt is [n] or [1, n] token ids, a text or a chat, got {list(ids.shape)}")
    return ids


def _is_chat(prompt: Prompt) -> bool:
    return not isinstance(prompt, Tensor) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def _require_tokenizer(tokenizer, what: str):
    if tokenizer is None:
        raise ValueError(f"a prompt given as {what} needs Engine(tokenizer=…)")
    return tokenizer


def _templated(messages, tokenizer) -> str:
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message:
            raise ValueError(f"messages of a chat are {{'role': …, 'content': …}}, got {message!r} as message {i}")
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError("the engine's tokenizer has no chat template: set tokenizer.chat_template, or submit a text")
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates raise errors of their own, jinja's among them
        raise ValueError(f"the chat template does not take these messages: {error}") from error
