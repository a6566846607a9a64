"""A checked call: prompts, generation config, processors and stopping criteria, with transformers' own classes."""

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor
from transformers import EosTokenCriteria, GenerationConfig, MaxLengthCriteria, MaxTimeCriteria

from specdec.model.runner import ModelRunner
from specdec.requests.row_processors import Complete, build_processors
from specdec.sampling.processors import Processors

DEFAULTS = {"do_sample": False, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
DEFAULT_NEW_TOKENS = 128
UNSUPPORTED = {  # option: the only value it may have
    "num_beams": 1, "num_return_sequences": 1, "guidance_scale": 1.0, "penalty_alpha": 0.0, "token_healing": False,
    "dola_layers": None, "watermarking_config": None, "prompt_lookup_num_tokens": None, "output_scores": False,
    "output_logits": False, "output_attentions": False, "output_hidden_states": False,
    "encoder_repetition_penalty": 1.0, "encoder_no_repeat_ngram_size": 0,
}  # fmt: skip

CALLABLES = "a list of callables", lambda given: isinstance(given, Sequence) and all(map(callable, given))
NUMBER = "a number", lambda given: isinstance(given, Real)
KINDS = {  # argument: what it must be unless it is None, and the test for that
    "generation_config": ("a GenerationConfig", lambda given: isinstance(given, GenerationConfig)),
    "logits_processor": CALLABLES,
    "stopping_criteria": CALLABLES,
    "seed": ("an integer", lambda given: hasattr(given, "__index__")),
    "do_sample": ("True or False", lambda given: isinstance(given, bool)),
    "temperature": NUMBER,
    "top_k": NUMBER,
    "top_p": NUMBER,
}


@dataclass(frozen=True, slots=True)
class Request:
    """A checked call.

    prompts: `prompts[row] [n]`, without padding.
    padding: `padding[row] [m]`, what stood before the prompt; criteria see it, as in transformers' `generate`.
    eos: tokens that end a row.
    pad: the token that fills up shorter rows of the output.
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

    @property
    def limits(self) -> list[int]:
        """Length at which each row ends."""
        return [len(prompt) + self.max_new_tokens for prompt in self.prompts]


def build_request(target: ModelRunner, input_ids: Tensor, attention_mask: Tensor | None = None,
                  generation_config: GenerationConfig | None = None, logits_processor: Sequence[Callable] | None = None,
                  stopping_criteria: Sequence[Callable] | None = None, seed: int | None = None,
                  max_new_tokens: int | None = None, **options) -> Request:  # fmt: skip
    """Check a `generate` call and settle its options. Raises ValueError or TypeError naming the bad value.

    `options` are do_sample, temperature, top_k and top_p. Where they or `max_new_tokens` are None, `generation_config`
    decides, or the defaults of `SpeculativeGenerator.generate` if there is none. Everything else comes from the config,
    then from the model's own generation config."""
    _require_kinds(
        **options, generation_config=generation_config, logits_processor=logits_processor,
        stopping_criteria=stopping_criteria, seed=seed,
    )  # fmt: skip
    config = _settle_config(target.model, generation_config, options)
    target.require_eval_mode()
    ends = end_tokens(config)
    # without a pad token the first end token, as in transformers
    pad = config.pad_token_id if config.pad_token_id is not None else (*ends, 0)[0]
    prompts = _unpad(target, input_ids, attention_mask, None if pad in ends else config.pad_token_id)
    width = input_ids.shape[1]
    padding = tuple(input_ids[row, : width - len(prompt)].long() for row, prompt in enumerate(prompts))
    length, eos, criteria = _settle_criteria(config, stopping_criteria or [])
    if max_new_tokens is None:
        max_new_tokens = config.max_new_tokens
    count = _settle_count(max_new_tokens, generation_config, length, width)
    longest = max(len(p) for p in prompts)
    if target.max_positions is not None and longest + count > target.max_positions:
        raise ValueError(f"prompt of {longest} tokens + max_new_tokens {count} exceed {target.limit}")
    processors = build_processors(target.model, config, prompts, padding, count, logits_processor or [], eos)
    seed = int(torch.randint(2**62, ())) if seed is None else operator.index(seed)
    return Request(prompts, padding, count, config.do_sample, eos, pad, processors, criteria, seed)


def _require_kinds(**given) -> None:
    """Raise TypeError, naming the argument, for one that is of another kind than it must be."""
    for name, (what, fits) in KINDS.items():
        value = given.get(name)
        if value is not None and not fits(value):
            raise TypeError(f"{name} must be {what} or None, got {value!r}")


def end_tokens(config: GenerationConfig) -> list[int]:
    """The end-of-text tokens of a generation config, in its order: none, one or several."""
    ends = config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else [int(end) for end in ends]


def _settle_config(model, given: GenerationConfig | None, options: dict) -> GenerationConfig:
    """The generation config in force: `given` or the model's, with `options` that are not None."""
    config, _ = model._prepare_generation_config(given)
    chosen = {name: value for name, value in options.items() if value is not None}
    for name, value in ((DEFAULTS if given is None else {}) | chosen).items():
        setattr(config, name, value)
    if config.do_sample and not (config.temperature is None or 0 < config.temperature < math.inf):
        raise ValueError(
            f"temperature must be > 0 and finite with do_sample, got {config.temperature}; use do_sample=False for "
            "greedy decoding"
        )
    if config.do_sample and config.top_k is not None and config.top_k < 0:
        raise ValueError(f"top_k must be >= 0 (0: off), got {config.top_k}")
    if config.do_sample and config.top_p is not None and not 0 < config.top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {config.top_p}")
    for name, plain in UNSUPPORTED.items():
        value = getattr(config, name, None)
        if value is not None and value != plain:
            raise ValueError(f"{name}={value} is not supported here; only {plain}")
    if getattr(config, "stop_strings", None):
        raise ValueError(
            f"stop_strings={config.stop_strings!r} needs a tokenizer: pass StopStringCriteria(tokenizer, …) in "
            "stopping_criteria"
        )
    return config


def _settle_count(count: int | None, given: GenerationConfig | None, length: int | None, width: int) -> int:
    """How many tokens to generate at most, with `length` of the criteria before `count` before the config's max_length.

    Lengths count from the padded `width`, as in transformers."""
    if count is None:
        longest = None if given is None else given.max_length
        count = DEFAULT_NEW_TOKENS if longest is None else longest - width
        if count < 1:
            raise ValueError(f"max_length={longest} leaves no room for new tokens after prompts of {width}")
    if length is not None:
        count = length - width
    if type(count) is bool or not isinstance(count, int) or count < 1:
        raise ValueError(f"max_new_tokens must be an integer of at least 1, got {count!r}")
    return count


def _settle_criteria(
    config: GenerationConfig, given: Sequence[Callable]
) -> tuple[int | None, frozenset[int], tuple[Callable, ...]]:
    """The length at which a padded row ends (None: the config decides), its end tokens, and all other criteria.

    As in transformers, a user's criterion of a type that the config makes too (length, time, end tokens) replaces the
    config's."""
    complete = isinstance(given, Complete)
    lengths = [c.max_length for c in given if type(c) is MaxLengthCriteria]
    ending = [c for c in given if type(c) is EosTokenCriteria]
    ends = [token for c in ending for token in c.eos_token_id.tolist()] if ending or complete else end_tokens(config)
    rest = [c for c in given if type(c) not in (MaxLengthCriteria, EosTokenCriteria)]
    if config.max_time is not None and not complete and not any(type(c) is MaxTimeCriteria for c in given):
        rest.append(MaxTimeCriteria(config.max_time))
    return min(lengths, default=None), frozenset(ends), tuple(rest)


def _unpad(target: ModelRunner, input_ids: Tensor, mask: Tensor | None, pad: int | None) -> tuple[Tensor, ...]:
    if not isinstance(input_ids, Tensor) or input_ids.dtype not in (torch.int64, torch.int32):
        given = getattr(input_ids, "dtype", type(input_ids).__name__)
        raise TypeError(f"input_ids must be an int64 or int32 tensor [B, S], got {given}")
    shape = list(input_ids.shape)
    if len(shape) != 2:
        raise ValueError(f"input_ids must be [B, S], got shape {shape}: input_ids[None] is a batch of one")
    if 0 in shape:
        raise ValueError(
            f"input_ids must be [B, S] with at least one token, got shape {shape}: an empty prompt has no next token"
        )
    if input_ids.device != target.device:
        raise ValueError(f"input_ids are on {input_ids.device}, the model on {target.device}")
    if mask is not None and not isinstance(mask, Tensor):
        raise TypeError(f"attention_mask must be a tensor [B, S] or None, got {mask!r}")
    if mask is None:  # as in transformers: a pad token that is no end-of-text token marks padding
        mask = torch.ones_like(input_ids) if pad is None else input_ids != pad
    if mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask has shape {list(mask.shape)}, input_ids {shape}")
    mask = mask.to(input_ids.device) != 0
    lengths = mask.sum(1).tolist()
    if 0 in lengths:
        raise ValueError(f"row {lengths.index(0)} is an empty prompt: its attention mask is all zero")
    width = shape[1]
    left = torch.arange(width, device=mask.device) >= (width - mask.sum(1, keepdim=True))
    if not bool((mask == left).all()):
        row = int((mask != left).any(1).int().argmax())
        raise ValueError(
            f"prompts must be padded on the left, but the attention mask of row {row} is {mask[row].int().tolist()}"
        )
    prompts = tuple(input_ids[row, width - length :].long() for row, length in enumerate(lengths))
    for row, prompt in enumerate(prompts):
        low, high = int(prompt.min()), int(prompt.max())
        if low < 0 or high >= target.vocab_size:
            raise ValueError(
                f"row {row} holds token id {low if low < 0 else high}, outside the vocabulary of {target.vocab_size}"
            )
    return prompts
