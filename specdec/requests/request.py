"""What the user asked for, checked: prompts, generation config, processors, stopping criteria. Transformers' own
classes are reused.
"""

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
    "num_beams": 1,
    "num_return_sequences": 1,
    "guidance_scale": 1.0,
    "penalty_alpha": 0.0,
    "token_healing": False,
    "dola_layers": None,
    "watermarking_config": None,
    "prompt_lookup_num_tokens": None,
    "output_scores": False,
    "output_logits": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
}

CALLABLES = "a list of callables", lambda given: isinstance(given, Sequence) and all(map(callable, given))
NUMBER = "a number", lambda given: isinstance(given, Real)
KINDS = {  # argument: what it must be where it is given, and whether it is
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
    """A checked call: `prompts[row] [n]` without padding, and how to choose and where to stop.

    `padding[row] [m]` stood in front of the prompt: criteria see it, as in transformers' `generate`.
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


def build_request(
    target: ModelRunner,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    generation_config: GenerationConfig | None,
    logits_processor: Sequence[Callable] | None,
    stopping_criteria: Sequence[Callable] | None,
    seed: int | None,
    **keywords,
) -> Request:
    """Check a `generate` call and settle its options. Raises ValueError (or TypeError) naming the value that is wrong.

    `keywords` are max_new_tokens, do_sample, temperature, top_k and top_p; None means "as in `generation_config`", or
    the defaults of `SpeculativeGenerator.generate` where no config is given. All else comes from the config, then from
    the model's own generation config."""
    _require_kinds(
        keywords
        | dict(
            generation_config=generation_config,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            seed=seed,
        )
    )
    config, max_new_tokens = _settle_config(target.model, generation_config, keywords)
    target.require_eval_mode()
    ends = end_tokens(config)
    pad = (
        config.pad_token_id if config.pad_token_id is not None else (*ends, 0)[0]
    )  # the first end token, as in transformers
    prompts = _unpad(target, input_ids, attention_mask, None if pad in ends else config.pad_token_id)
    width = input_ids.shape[1]
    padding = tuple(input_ids[row, : width - len(prompt)].long() for row, prompt in enumerate(prompts))
    if max_new_tokens is None:
        max_new_tokens = generation_config.max_length - width
        if max_new_tokens < 1:
            raise ValueError(
                f"max_length={generation_config.max_length} leaves no room for new tokens behind prompts of {width}"
            )
    length, eos, criteria = _settle_criteria(config, stopping_criteria or [])
    max_new_tokens = (
        max_new_tokens if length is None else length - width
    )  # counts from the padded width, as in transformers
    if type(max_new_tokens) is bool or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be an integer of at least 1, got {max_new_tokens!r}")
    longest = max(len(p) for p in prompts)
    if target.max_positions is not None and longest + max_new_tokens > target.max_positions:
        raise ValueError(f"prompt of {longest} tokens + max_new_tokens {max_new_tokens} exceed {target.limit}")
    return Request(
        prompts=prompts,
        padding=padding,
        max_new_tokens=max_new_tokens,
        do_sample=config.do_sample,
        eos=eos,
        pad=pad,
        processors=build_processors(
            target.model, config, prompts, padding, max_new_tokens, logits_processor or [], eos
        ),
        criteria=criteria,
        seed=int(torch.randint(2**62, ())) if seed is None else operator.index(seed),
    )


def _require_kinds(given: dict) -> None:
    """Raise TypeError naming the argument that is of another kind than it must be."""
    for name, (what, fits) in KINDS.items():
        value = given.get(name)
        if value is not None and not fits(value):
            raise TypeError(f"{name} must be {what} or None, got {value!r}")


def end_tokens(config: GenerationConfig) -> list[int]:
    """The end-of-text tokens of a generation config, in its order; it may name none, one or several."""
    ends = config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else [int(end) for end in ends]


def _settle_config(model, given: GenerationConfig | None, keywords: dict) -> tuple[GenerationConfig, int | None]:
    """The config in force, and max_new_tokens (None: `given.max_length` decides)."""
    config, _ = model._prepare_generation_config(given)
    options = {} if given is not None else dict(DEFAULTS)
    options |= {name: value for name, value in keywords.items() if value is not None and name != "max_new_tokens"}
    for name, value in options.items():
        setattr(config, name, value)
    if config.do_sample and not (config.temperature is None or 0 < config.temperature < math.inf):
        raise ValueError(
            f"temperature must be > 0 and finite with do_sample, got {config.temperature}; use "
            "do_sample=False for greedy decoding"
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
            f"stop_strings={config.stop_strings!r} needs a tokenizer: pass StopStringCriteria(tokenizer, …) "
            "in stopping_criteria"
        )
    asked = keywords["max_new_tokens"] if keywords["max_new_tokens"] is not None else config.max_new_tokens
    if asked is None and (given is None or given.max_length is None):
        asked = DEFAULT_NEW_TOKENS
    return config, asked


def _settle_criteria(
    config: GenerationConfig, given: Sequence[Callable]
) -> tuple[int | None, frozenset[int], tuple[Callable, ...]]:
    """Where a padded row ends (None: as the config says), the tokens that end it, and the criteria that are left to
    ask.

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
        raise TypeError(
            "input_ids must be an int64 or int32 tensor [B, S], got "
            f"{getattr(input_ids, 'dtype', type(input_ids).__name__)}"
        )
    if input_ids.ndim != 2:
        raise ValueError(
            f"input_ids must be [B, S], got shape {list(input_ids.shape)}: input_ids[None] is a batch of one"
        )
    if 0 in input_ids.shape:
        raise ValueError(
            f"input_ids must be [B, S] with at least one token, got shape {list(input_ids.shape)}: an empty "
            "prompt has no next token"
        )
    if input_ids.device != target.device:
        raise ValueError(f"input_ids are on {input_ids.device}, the model on {target.device}")
    if mask is not None and not isinstance(mask, Tensor):
        raise TypeError(f"attention_mask must be a tensor [B, S] or None, got {mask!r}")
    if mask is None:  # as transformers does: a pad token that is no end-of-text token marks padding
        mask = torch.ones_like(input_ids) if pad is None else input_ids != pad
    if mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask has shape {list(mask.shape)}, input_ids {list(input_ids.shape)}")
    mask = mask.to(input_ids.device) != 0
    lengths = mask.sum(1).tolist()
    if 0 in lengths:
        raise ValueError(f"row {lengths.index(0)} is an empty prompt: its attention mask is all zero")
    width = input_ids.shape[1]
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
