"""A thin adapter for `model.generate(custom_generate=…)`."""

import inspect
from collections.abc import Sized

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.generation import GenerateDecoderOnlyOutput

from specdec.drafters import Drafter, require_drafter
from specdec.generation.generators import SpeculativeGenerator
from specdec.report.stats import GenerationStats
from specdec.requests.row_processors import Complete


class CustomGenerate:
    """What `custom_generate` returns: call it through `model.generate`. `stats` holds the statistics of the last
    call.
    """

    def __init__(self, drafter: Drafter, streamer=None, seed: int | None = None, mode: str | None = None):
        require_drafter(drafter)
        self._drafter, self._streamer, self._seed, self._mode = drafter, streamer, seed, mode
        self._generator: SpeculativeGenerator | None = None
        self.stats: GenerationStats | None = None
        self.__signature__ = _signature(self.__call__)

    def __call__(
        self,
        model,
        input_ids: Tensor,
        logits_processor=None,
        stopping_criteria=None,
        generation_config=None,
        seed: int | None = None,
        **model_inputs,
    ):
        """Called by transformers with everything prepared. Of the inputs of the model's forward only the attention mask
        has a meaning here; others that would change the text raise ValueError.

        It is no parameter of its own, because transformers would then take it out of its own preparation.
        """
        attention_mask = model_inputs.pop("attention_mask", None)
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        for name, given in model_inputs.items():
            _require_unchanged_text(name, given, attention_mask != 0)
        if self._generator is None or self._generator.target.model is not model:
            self._generator = SpeculativeGenerator(model, self._drafter, mode=self._mode)
        out = self._generator.generate(
            input_ids,
            attention_mask=attention_mask,
            generation_config=generation_config,
            logits_processor=Complete(logits_processor or []),
            stopping_criteria=Complete(stopping_criteria or []),
            streamer=self._streamer,
            seed=self._seed if seed is None else seed,
        )
        self.stats = out.stats
        return (
            GenerateDecoderOnlyOutput(sequences=out.sequences)
            if generation_config.return_dict_in_generate
            else out.sequences
        )


def _signature(function) -> inspect.Signature:
    """What `function` takes, and `cache` where this transformers does not know that name: it would refuse it as a
    typing error before we can say why.
    """
    signature = inspect.signature(function)
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters:
        return signature
    *others, rest = signature.parameters.values()
    return signature.replace(
        parameters=[*others, inspect.Parameter("cache", inspect.Parameter.KEYWORD_ONLY, default=None), rest]
    )


def _require_unchanged_text(name: str, given, real: Tensor) -> None:
    """Raise ValueError for an input of the model's forward that would change the text. `real [B, S]` bool: what is no
    padding.

    What counts is the value, since names change from release to release: what is empty changes nothing, nor do flags
    and whole numbers (which transformers adds for its own forwards), nor numbers a token that are all zero or count the
    tokens from 0."""
    if given is None or isinstance(given, int):
        return
    tokens = _tokens_in(given)
    if tokens is not None:
        if tokens:
            raise ValueError(
                f"{name} with {tokens} tokens cannot be used with custom_generate: the cache here is paged "
                "and starts empty"
            )
        return
    if isinstance(given, Tensor) and not given.is_floating_point() and given.ndim and given.shape[-1] == real.shape[1]:
        given = given.to(real.device)
        if not bool(given.any()) or bool((given == real.cumsum(1) - 1)[..., real].all()):
            return
        if "position" in name:
            raise ValueError(
                f"{name} cannot be used with custom_generate unless they count from 0, got {given.tolist()}"
            )
    elif given.numel() == 0 if isinstance(given, Tensor) else isinstance(given, Sized) and len(given) == 0:
        return
    what = f"a tensor {list(given.shape)}" if isinstance(given, Tensor) else repr(given)
    raise ValueError(
        f"{name} cannot be used with custom_generate, whose prompts are input_ids and attention_mask; got {what}"
    )


def _tokens_in(given) -> int | None:
    """How many tokens a cache holds, of transformers' kind or of the older pairs of tensors; None for what is no
    cache.
    """
    if hasattr(given, "get_seq_length"):
        return int(given.get_seq_length())
    if (
        isinstance(given, tuple | list)
        and given
        and all(isinstance(layer, tuple | list) and layer and isinstance(layer[0], Tensor) for layer in given)
    ):
        return given[0][0].shape[-2]
    return None


def custom_generate(
    drafter: Drafter, streamer=None, seed: int | None = None, mode: str | None = None
) -> CustomGenerate:
    """Speculative decoding inside transformers' own `generate`.

    A streamer goes in here, because transformers hands neither its `streamer` nor its `tokenizer` on to a callable:
    with one given to `model.generate`, nothing is streamed. `mode` is that of `SpeculativeGenerator`;
    `model.generate(seed=…)` goes before the `seed` given here. For stop strings pass `StopStringCriteria(tokenizer,
    strings)` in `stopping_criteria`.

    Processors and criteria are those that `generate` has joined, and see each row of a padded batch as it shows them,
    so the text is that of `generate` without us; see `SpeculativeGenerator.generate` for what a processor must be.
    Inputs of the model's forward that would change the text (a cache that holds tokens, embeddings, positions that do
    not count from 0) raise ValueError. Raises TypeError for what is no drafter.

    >>> import specdec
    >>> pair = specdec.load_tiny_pair()
    >>> inputs = pair.tokenizer("import os", return_tensors="pt")
    >>> speculative = specdec.custom_generate(specdec.ModelDrafter(pair.draft))
    >>> pair.target.generate(input_ids=inputs.input_ids, custom_generate=speculative, max_new_tokens=8).shape[0]
    1
    """
    return CustomGenerate(drafter, streamer, seed, mode)
