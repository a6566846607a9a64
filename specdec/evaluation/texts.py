"""Questions as token ids: through a tokenizer, and for chats through its template."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specdec.evaluation.questions import Question, Turn
from specdec.training.templates import apply_template


@dataclass(frozen=True, slots=True)
class Texts:
    """Makes prompts for a target.

    chat: texts are users' messages, for the chat template.
    plain: messages are joined by blank lines instead, for a model without a template.
    """

    tokenizer: Any  # a transformers tokenizer
    device: torch.device | str = "cpu"
    chat: bool = False
    plain: bool = False

    def ids(self, question: Question, turn: int, answers: Sequence[str] = ()) -> Tensor:
        """The prompt `[S]` of a turn, after the `answers` to the turns before it."""
        if turn == 0:
            given: Turn | list = question.turns[0] if isinstance(question.turns[0], str) else list(question.turns[0])
        else:
            given = []
            for said, answer in zip(question.turns[: turn + 1], [*answers, None], strict=True):
                given += _messages(said)
                given += [] if answer is None else [{"role": "assistant", "content": answer}]
        if self.plain and not isinstance(given, str):
            given = "\n\n".join(str(message["content"]) for message in given) + "\n\n"
        return encode(given, self.tokenizer, self.device, self.chat)[1][0]

    def answer(self, tokens: Sequence[int]) -> str:
        """The text of new tokens."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


def pad_left(prompts: Sequence[Tensor], pad: int) -> tuple[Tensor, Tensor]:
    """Prompts `[S]` of several lengths as `[B, S]`, padded on the left, and their attention mask."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad, dtype=torch.int64, device=prompts[0].device)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, 1
    return ids, mask


def encode(prompt: str | Sequence[dict], tokenizer, device, chat: bool, system: str | None = None,
           **template: Any) -> tuple[str, Tensor]:  # fmt: skip
    """A prompt as text, see `render`, and as ids `[1, S]`; a chat template writes its special tokens itself."""
    text = render(prompt, tokenizer, chat, system, **template)
    special = isinstance(prompt, str) and not chat
    return text, tokenizer(text, return_tensors="pt", add_special_tokens=special).input_ids.to(device)


def render(prompt: str | Sequence[dict], tokenizer, chat: bool, system: str | None = None, **template: Any) -> str:
    """A prompt as text: messages, or with `chat` a user's text too, through the tokenizer's chat template.

    Raises ValueError where there is no template or it does not take them."""
    if isinstance(prompt, str) and not chat:
        return prompt
    messages = _messages(prompt)
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    if tokenizer.chat_template is None:
        raise ValueError("the tokenizer has no chat template: give --chat-template FILE, or a prompt that is a text")
    return apply_template(messages, tokenizer, "the prompt", tokenize=False, add_generation_prompt=True, **template)


def _messages(prompt: str | Sequence[dict]) -> list[dict]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
