"""A checked call: prompts, generation config, processors and stopping criteria, with transformers' own classes."""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig

from attention.hf.prompt import Prompts
from specdec.model.runner import ModelRunner
from specdec.requests.images import image_prompts, split_inputs
from specdec.requests.inputs import padding_mask, require_unchanged_text
from specdec.requests.options import (
    end_tokens,
    require_kinds,
    settle_config,
    settle_count,
    settle_criteria,
    split_options,
)
from specdec.requests.row_processors import Complete, build_processors
from specdec.sampling.count_penalties import CountPenalties
from specdec.sampling.processors import Processors


@dataclass(frozen=True, slots=True)
class Request:
    """A checked call.

    prompts: `prompts[row] [n]`, without padding, on the host.
    padding: `padding[row] [m]`, on the target's device: what stood before the prompt; criteria see it, as in
        transformers' `generate`.
    eos: tokens that end a row.
    pad: the token that fills up shorter rows of the output.
    outputs: which of "scores", "logits" and "logprobs" are wanted of every new token.
    images: the prompts once more, each once, where there are images in them (None: they are text).
    """

    prompts: tuple[Tensor, ...]
    padding: tuple[Tensor, ...]
    max_new_tokens: int
    do_sample: bool
    eos: frozenset[int]
    pad: int
    processors: Processors
    criteria: tuple[Callable, ...]
    seed: int
    outputs: tuple[str, ...] = ()
    images: Prompts | None = None

    @property
    def limits(self) -> list[int]:
        """Length at which each row ends."""
        return [len(prompt) + self.max_new_tokens for prompt in self.prompts]


def build_request(target: ModelRunner, input_ids: Tensor, attention_mask: Tensor | None = None,
                  generation_config: GenerationConfig | None = None, logits_processor: Sequence[Callable] | None = None,
                  stopping_criteria: Sequence[Callable] | None = None, seed: int | None = None,
                  max_new_tokens: int | None = None, tokenizer=None,
                  prefix_allowed_tokens_fn: Callable | None = None, presence_penalty: float | None = None,
                  frequency_penalty: float | None = None, **options) -> Request:  # fmt: skip
    """Check a `generate` call and settle its options. Raises ValueError or TypeError naming the bad value.

    `options` are settings of a GenerationConfig, which come before those of `generation_config`, and inputs of the
    model's forward: images and what belongs to them, others that must not change the text. Presence and frequency
    penalty become a processor behind the user's. Where there is no `generation_config` the defaults of
    `SpeculativeGenerator.generate` hold, and everything else comes from the model's own generation config."""
    require_kinds(
        **options, generation_config=generation_config, logits_processor=logits_processor, tokenizer=tokenizer,
        stopping_criteria=stopping_criteria, seed=seed, prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
        presence_penalty=presence_penalty, frequency_penalty=frequency_penalty,
    )  # fmt: skip
    settings, inputs = split_options(target.model, options)
    config = settle_config(target.model, generation_config, settings)
    target.require_eval_mode()
    ends = end_tokens(config)
    # without a pad token the first end token, as in transformers
    pad = config.pad_token_id if config.pad_token_id is not None else (*ends, 0)[0]
    ids, mask, lengths = padding_mask(target, input_ids, attention_mask, None if pad in ends else config.pad_token_id)
    of_images, others = split_inputs(inputs)
    for name, given in others.items():
        require_unchanged_text(name, given, mask)
    images = image_prompts(target, input_ids.long(), mask, of_images) if of_images else None
    custom, (batch, width) = logits_processor or [], input_ids.shape
    if presence_penalty or frequency_penalty:
        penalties = CountPenalties(presence_penalty or 0.0, frequency_penalty or 0.0)
        custom = [*custom, penalties]
    # transformers has repeated the prompts by then
    copies = 1 if isinstance(custom, Complete) else config.num_return_sequences or 1
    rows = [row for row in range(batch) for _ in range(copies)]
    prompts = tuple(ids[row, width - lengths[row] :] for row in rows)
    padding = tuple(input_ids[row, : width - lengths[row]].to(target.device, torch.int64) for row in rows)
    length, eos, criteria = settle_criteria(config, stopping_criteria or [], tokenizer)
    if max_new_tokens is None and settings.get("max_length") is None:
        max_new_tokens = config.max_new_tokens
    given_length = settings.get("max_length", None if generation_config is None else generation_config.max_length)
    count = settle_count(max_new_tokens, given_length, length, width)
    longest = max(lengths)
    if target.max_positions is not None and longest + count > target.max_positions:
        raise ValueError(f"prompt of {longest} tokens + max_new_tokens {count} exceed {target.limit}")
    allowed = (prefix_allowed_tokens_fn, copies)
    size = target.vocab_size
    processors = build_processors(target, config, prompts, padding, count, custom, size, *allowed)
    sampling = config.do_sample, config.temperature, config.top_k, config.top_p
    texts = [prompt.tolist() for prompt in prompts] if target.ranks.several else []
    target.ranks.require_same("prompts, limit, sampling, ends and seed", (texts, count, sampling, sorted(eos), seed))
    seed = target.ranks.decided(int(torch.randint(2**62, ()))) if seed is None else operator.index(seed)
    outputs = tuple(name for name in ("scores", "logits") if getattr(config, f"output_{name}"))
    sampled = bool(config.do_sample)
    return Request(prompts, padding, count, sampled, eos, pad, processors, criteria, seed, outputs, images)
