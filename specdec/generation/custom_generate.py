"""Speculative decoding for `model.generate(custom_generate=…)`."""

import inspect
from typing import Any

import torch
from torch import Tensor

from specdec.drafters import Drafter, require_drafter
from specdec.generation.generators import SpeculativeGenerator
from specdec.report.stats import GenerationStats
from specdec.requests.images import split_inputs
from specdec.requests.inputs import require_unchanged_text
from specdec.requests.row_processors import Complete


class CustomGenerate:
    """The result of `custom_generate`, called by `model.generate`; `stats`: of the last call."""

    def __init__(self, drafter: Drafter, streamer=None, seed: int | None = None, mode: str | None = None):
        require_drafter(drafter)
        self._drafter, self._streamer, self._seed, self._mode = drafter, streamer, seed, mode
        self._generator: SpeculativeGenerator | None = None
        self.stats: GenerationStats | None = None
        self.__signature__ = _signature(self.__call__)

    def __call__(self, model, input_ids: Tensor, logits_processor=None, stopping_criteria=None, generation_config=None,
                 seed: int | None = None, **model_inputs):  # fmt: skip
        """Called by transformers with everything prepared.

        Of `model_inputs`, those of the model's forward, the attention mask is used, and images with what belongs to
        them; others that would change the text raise ValueError. The mask is no parameter, because transformers would
        then not prepare it."""
        attention_mask = model_inputs.pop("attention_mask", None)
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        of_images, others = split_inputs(model_inputs)
        for name, given in others.items():
            require_unchanged_text(name, given, attention_mask != 0)
        if self._generator is None or self._generator.target.model is not model:
            self._generator = SpeculativeGenerator(model, self._drafter, mode=self._mode)
        out = self._generator.generate(
            input_ids, attention_mask, generation_config=generation_config, streamer=self._streamer,
            logits_processor=Complete(logits_processor or []), stopping_criteria=Complete(stopping_criteria or []),
            seed=self._seed if seed is None else seed, **of_images,
        )  # fmt: skip
        self.stats = out.stats
        if generation_config.return_dict_in_generate:
            from transformers.generation import GenerateDecoderOnlyOutput

            outputs: Any = {name: getattr(out, name) for name in ("sequences", "scores", "logits")}
            return GenerateDecoderOnlyOutput(**outputs)
        return out.sequences


def _signature(function) -> inspect.Signature:
    """The signature of `function`, with `cache` added for releases of transformers that do not know this name.

    Those would reject it as a misspelt argument, without our reason."""
    from transformers import GenerationMixin  # takes seconds

    signature = inspect.signature(function)
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters:
        return signature
    *others, rest = signature.parameters.values()
    cache = inspect.Parameter("cache", inspect.Parameter.KEYWORD_ONLY, default=None)
    return signature.replace(parameters=[*others, cache, rest])


def custom_generate(drafter: Drafter, streamer=None, seed: int | None = None,
                    mode: str | None = None) -> CustomGenerate:  # fmt: skip
    """Speculative decoding inside transformers' own `generate`, with the text that `generate` returns without it.

    Pass a streamer here rather than to `model.generate`, since transformers does not pass its `streamer` or `tokenizer`
    on. `mode` is that of `SpeculativeGenerator`; `model.generate(seed=…)` overrides the `seed` given here. For stop
    strings pass `StopStringCriteria(tokenizer, strings)` in `stopping_criteria`.

    Processors and criteria are those that `generate` prepares, and see the same padded rows; see
    `SpeculativeGenerator.generate` for what a processor must be. Raises ValueError for inputs of the model's forward
    that would change the text (a cache that holds tokens, embeddings, positions that do not count from 0), and
    TypeError if `drafter` is none.

    >>> import specdec
    >>> pair = specdec.load_tiny_pair()
    >>> inputs = pair.tokenizer("import os", return_tensors="pt")
    >>> speculative = specdec.custom_generate(specdec.ModelDrafter(pair.draft))
    >>> pair.target.generate(input_ids=inputs.input_ids, custom_generate=speculative, max_new_tokens=8).shape[0]
    1
    """
    return CustomGenerate(drafter, streamer, seed, mode)
