"""The logits processors of each row of a batch, so that no row depends on another."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PrefixConstrainedLogitsProcessor

from specdec.model.runner import ModelRunner
from specdec.sampling.processors import Processors, memory_of

# attributes in which processors of transformers keep one value per row of a batch
OF_ROWS = {
    "RepetitionPenaltyLogitsProcessor": ("prompt_ignore_length",),
    "EncoderRepetitionPenaltyLogitsProcessor": ("encoder_input_ids",),
    "EncoderNoRepeatNGramLogitsProcessor": ("generated_ngrams",),
}


class Complete(list):
    """All processors or stopping criteria of a call: the user's and those that transformers made of the config."""


def build_processors(target: ModelRunner, config: GenerationConfig, prompts: Sequence[Tensor],
                     padding: Sequence[Tensor], max_new_tokens: int, custom: Sequence[Callable], vocab_size: int,
                     allowed: Callable | None = None, copies: int = 1) -> Processors:  # fmt: skip
    """The processors of a call with `prompts[row] [n]`, each after `padding[row] [m]` in the user's batch.

    Transformers' own processors are built row by row and see the row without padding, as if it were alone. `custom`
    ones are written for `generate` and see what it passes them: the padding too; so does `allowed(prompt, text)`, the
    tokens that may come next, where `copies` rows have a prompt each. `Complete` ones are all there are."""
    lists, padded = [], []
    for row, (prompt, front) in enumerate(zip(prompts, padding, strict=True)):
        built = given = [_of_row(processor, row, len(prompts), len(front) + len(prompt)) for processor in custom]
        if not isinstance(custom, Complete):
            own = None if allowed is None else lambda _, text, number=row // copies: allowed(number, text)
            built = _built(target, config, len(prompt), len(front), max_new_tokens, given, own)
        lists.append(built)
        constrained = PrefixConstrainedLogitsProcessor
        padded.append([any(one is each for each in given) or type(one) is constrained for one in built])
    return Processors(lists, padding, padded, vocab_size)


def _built(target: ModelRunner, config: GenerationConfig, length: int, padding: int, max_new_tokens: int,
           custom: Sequence[Callable], allowed: Callable | None) -> LogitsProcessorList:  # fmt: skip
    """Transformers' processors for a row with a prompt of `length` tokens, as if it were alone, and `custom` ones.

    Minimum lengths count from the start of the row with its `padding` tokens, as in transformers."""
    config = copy.copy(config)
    config.num_return_sequences = 1
    config.max_length = length + max_new_tokens
    if config.min_length:
        config.min_length = max(0, config.min_length - padding)
    if padding:
        config.forced_bos_token_id = None  # meant for rows of one token, padding included
    model: Any = target.model
    model._prepare_special_tokens(config, kwargs_has_attention_mask=True, device=target.device, batch_size=1)
    return model._get_logits_processor(
        generation_config=config, input_ids_seq_length=length, logits_processor=LogitsProcessorList(custom),
        device=target.device, model_kwargs={}, prefix_allowed_tokens_fn=allowed,
    )  # fmt: skip


def _of_row(processor: Callable, row: int, batch: int, width: int) -> Callable:
    """`processor` for one row of a `batch`, processed as a batch of one; `width`: tokens of its padded prompt.

    A processor with a method `for_row(row, width)`, such as a grammar's, makes this itself."""
    if hasattr(processor, "for_row"):
        return processor.for_row(row, width)
    if batch == 1:
        return processor
    if memory_of(processor):
        if hasattr(processor, "model"):
            raise ValueError(
                f"{type(processor).__name__} remembers the calls of a whole batch and runs a model: use batch size 1, "
                f"not {batch}"
            )
        return copy.deepcopy(processor)
    if isinstance(processor, PrefixConstrainedLogitsProcessor):
        allowed, number = processor._prefix_allowed_tokens_fn, row // processor._num_beams
        return PrefixConstrainedLogitsProcessor(lambda _, text: allowed(number, text), 1)
    names = [name for kind in type(processor).__mro__ for name in OF_ROWS.get(kind.__name__, ())]
    mine = {name: _slice(getattr(processor, name, None), row, batch) for name in names}
    if all(value is getattr(processor, name, None) for name, value in mine.items()):
        return processor
    processor = copy.copy(processor)
    for name, value in mine.items():
        setattr(processor, name, value)
    if hasattr(processor, "batch_size"):
        processor.batch_size = 1
    return processor


def _slice(value, row: int, batch: int):
    of_rows = (isinstance(value, Tensor) and value.ndim > 0 or isinstance(value, list)) and len(value) == batch
    return value[row : row + 1] if of_rows else value
