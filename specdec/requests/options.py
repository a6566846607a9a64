"""The options of a call: which there are, what each must be, and the generation config that follows from them."""

import difflib
import inspect
import math
from collections.abc import Callable, Sequence
from functools import cache
from numbers import Real
from typing import Any

from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StopStringCriteria,
)

from specdec.requests.row_processors import Complete

DEFAULTS = {"do_sample": False, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
DEFAULT_NEW_TOKENS = 128
UNSUPPORTED = {  # option: the only value it may have
    "num_beams": 1, "guidance_scale": 1.0, "penalty_alpha": 0.0, "token_healing": False, "dola_layers": None,
    "watermarking_config": None, "prompt_lookup_num_tokens": None, "output_attentions": False,
    "output_hidden_states": False, "encoder_repetition_penalty": 1.0, "encoder_no_repeat_ngram_size": 0,
}  # fmt: skip
ONE_ADAPTER = "LoRA per request is not supported: all requests run with the adapters that are active in the model"
ELSEWHERE = {  # argument of transformers' generate, or of other engines: what to do instead
    "inputs": "pass prompts as input_ids",
    "assistant_model": "a generator has its drafter: SpeculativeGenerator(target, ModelDrafter(assistant_model))",
    "assistant_tokenizer": "TranslatedDrafter takes the tokenizers of target and draft model",
    "custom_generate": "it goes to model.generate, with specdec.custom_generate(drafter)",
    "stop": "it is stop_strings, with tokenizer",
    "negative_prompt_ids": "classifier-free guidance is not supported",
    "negative_prompt_attention_mask": "classifier-free guidance is not supported",
} | dict.fromkeys(("adapter", "adapters", "adapter_name", "adapter_names", "lora", "lora_request"), ONE_ADAPTER)


def _is_int(given) -> bool:
    return isinstance(given, int) and not isinstance(given, bool)


def _is_list(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda given: isinstance(given, Sequence) and all(map(test, given))


CALLABLES = "a list of callables", _is_list(callable)
NUMBER = "a number", lambda given: isinstance(given, Real)
COUNT = "an integer of at least 0", lambda given: _is_int(given) and given >= 0
FLAG = "True or False", lambda given: isinstance(given, bool)
KINDS = {  # argument: what it must be unless it is None, and the test for that
    "generation_config": ("a GenerationConfig", lambda given: isinstance(given, GenerationConfig)),
    "logits_processor": CALLABLES,
    "stopping_criteria": CALLABLES,
    "prefix_allowed_tokens_fn": ("a function", callable),
    "tokenizer": ("a tokenizer", lambda given: hasattr(given, "get_vocab")),
    "seed": ("an integer", lambda given: hasattr(given, "__index__")),
    "do_sample": FLAG,
    "output_scores": FLAG,
    "output_logits": FLAG,
    "temperature": NUMBER,
    "top_k": NUMBER,
    "top_p": NUMBER,
    "repetition_penalty": NUMBER,
    "presence_penalty": NUMBER,
    "frequency_penalty": NUMBER,
    "min_length": COUNT,
    "min_new_tokens": COUNT,
    "no_repeat_ngram_size": COUNT,
    "max_length": COUNT,
    "num_return_sequences": ("an integer of at least 1", lambda given: _is_int(given) and given >= 1),
    "pad_token_id": COUNT,
    "eos_token_id": ("a token id or a list of them", lambda given: _is_int(given) or _is_list(_is_int)(given)),
    "stop_strings": ("a string or a list of them", lambda given: _is_list(lambda one: isinstance(one, str))(given)),
}


def require_kinds(**given) -> None:
    """Raise TypeError, naming the argument, for one that is of another kind than it must be."""
    for name, (what, fits) in KINDS.items():
        value = given.get(name)
        if value is not None and not fits(value):
            raise TypeError(f"{name} must be {what} or None, got {value!r}")


def split_options(model, options: dict) -> tuple[dict, dict]:
    """`options` as settings of a GenerationConfig and inputs of `model.forward`. Raises TypeError for others."""
    known, settings, inputs = _settings(), {}, {}
    for name, value in options.items():
        if name in known:
            settings[name] = value
        elif name not in ELSEWHERE and (
            isinstance(value, Tensor) or name in inspect.signature(model.forward).parameters
        ):
            inputs[name] = value
        else:
            near = difflib.get_close_matches(name, known, 1)
            hint = ELSEWHERE.get(name) or (f"is it {near[0]}?" if near else "see GenerationConfig for what there is")
            raise TypeError(f"generate has no option {name}={value!r}: {hint}")
    return settings, inputs


@cache
def _settings() -> frozenset[str]:
    """The names of all settings of a GenerationConfig."""
    return frozenset(name for name in vars(GenerationConfig()) if not name.startswith("_")) - {"transformers_version"}


def end_tokens(config: GenerationConfig) -> list[int]:
    """The end-of-text tokens of a generation config, in its order: none, one or several."""
    ends = config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else [int(end) for end in ends]


def settle_config(model, given: GenerationConfig | None, settings: dict) -> GenerationConfig:
    """The generation config in force: `given` or the model's, with `settings`.

    Raises ValueError for a value out of range, or of an option that is not supported."""
    config, _ = model._prepare_generation_config(given)
    for name, value in ((DEFAULTS if given is None else {}) | settings).items():
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
    if (config.num_return_sequences or 1) > 1 and not config.do_sample:
        raise ValueError(
            f"num_return_sequences={config.num_return_sequences} needs do_sample=True: greedy texts would be all equal"
        )
    return config


def settle_count(count: int | None, max_length: int | None, length: int | None, width: int) -> int:
    """How many tokens to generate at most, with `length` of the criteria before `count` before `max_length`.

    Lengths count from the padded `width`, as in transformers."""
    if count is None:
        count = DEFAULT_NEW_TOKENS if max_length is None else max_length - width
        if count < 1:
            raise ValueError(f"max_length={max_length} leaves no room for new tokens after prompts of {width}")
    if length is not None:
        count = length - width
    if not _is_int(count) or count < 1:
        raise ValueError(f"max_new_tokens must be an integer of at least 1, got {count!r}")
    return count


def settle_criteria(
    config: GenerationConfig, given: Sequence[Callable], tokenizer=None
) -> tuple[int | None, frozenset[int], tuple[Callable, ...]]:
    """The length at which a padded row ends (None: the config decides), its end tokens, and all other criteria.

    As in transformers, a user's criterion of a type that the config makes too replaces the config's."""
    complete, kinds = isinstance(given, Complete), {type(c) for c in given}
    lengths = [c.max_length for c in given if type(c) is MaxLengthCriteria]
    ending = [c for c in given if type(c) is EosTokenCriteria]
    ends = [token for c in ending for token in c.eos_token_id.tolist()] if ending or complete else end_tokens(config)
    rest = [c for c in given if type(c) not in (MaxLengthCriteria, EosTokenCriteria)]
    if config.max_time is not None and not complete and MaxTimeCriteria not in kinds:
        rest.append(MaxTimeCriteria(config.max_time))
    if config.stop_strings and not complete and StopStringCriteria not in kinds:
        if tokenizer is None:
            raise ValueError(f"stop_strings={config.stop_strings!r} needs generate(tokenizer=…)")
        rest.append(StopStringCriteria(tokenizer, config.stop_strings))
    return min(lengths, default=None), frozenset(ends), tuple(rest)
