"""A thin adapter for `model.generate(custom_generate=…)`."""

import torch
from torch import Tensor
from transformers import EosTokenCriteria
from transformers.generation import GenerateDecoderOnlyOutput

from specdec.drafters import Drafter, require_drafter
from specdec.generators import SpeculativeGenerator
from specdec.request import end_tokens
from specdec.stats import GenerationStats

PREPARED = {"attention_mask", "past_key_values", "position_ids", "use_cache", "cache_position", "logits_to_keep"}  # by transformers, for its own forward


class CustomGenerate:
    """What `custom_generate` returns: call it through `model.generate`. `stats` holds the statistics of the last call."""

    def __init__(self, drafter: Drafter, streamer=None, seed: int | None = None, mode: str | None = None):
        require_drafter(drafter)
        self._drafter, self._streamer, self._seed, self._mode = drafter, streamer, seed, mode
        self._generator: SpeculativeGenerator | None = None
        self.stats: GenerationStats | None = None

    def __call__(self, model, input_ids: Tensor, logits_processor=None, stopping_criteria=None, generation_config=None, seed: int | None = None,
                 **model_inputs):  # fmt: skip
        """Called by transformers with everything prepared. Of the inputs of the model's forward only the attention mask has a meaning here; others
        that would change the text raise ValueError.

        It is no parameter of its own, because transformers would then take it out of its own preparation.
        """
        attention_mask = model_inputs.get("attention_mask")
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        _refuse_inputs(model_inputs, attention_mask != 0)
        past = model_inputs.get("past_key_values")
        if past is not None and past.get_seq_length() > 0:
            raise ValueError(f"past_key_values with {past.get_seq_length()} tokens cannot be used: the cache here is paged and starts empty")
        if self._generator is None or self._generator.target.model is not model:
            self._generator = SpeculativeGenerator(model, self._drafter, mode=self._mode)
        ends = set(end_tokens(generation_config))
        criteria = [c for c in stopping_criteria or [] if not (isinstance(c, EosTokenCriteria) and set(c.eos_token_id.tolist()) == ends)]
        # transformers hands over its own processors joined with the user's; ours are rebuilt row by row from the config
        own = {type(p) for p in model._get_logits_processor(generation_config, input_ids.shape[1], input_ids, logits_processor=[], device=input_ids.device)}
        out = self._generator.generate(
            input_ids,
            attention_mask=attention_mask,
            generation_config=generation_config,
            logits_processor=[p for p in logits_processor or [] if type(p) not in own],
            stopping_criteria=criteria,
            streamer=self._streamer,
            seed=self._seed if seed is None else seed,
        )
        self.stats = out.stats
        return GenerateDecoderOnlyOutput(sequences=out.sequences) if generation_config.return_dict_in_generate else out.sequences


def _refuse_inputs(model_inputs: dict, real: Tensor) -> None:
    """Raise ValueError for inputs of the model's forward that cannot be honoured here. `real [B, S]` bool: what is no padding."""
    for name, given in model_inputs.items():
        blank = given is None or name == "token_type_ids" and not bool(given.any())
        if name not in PREPARED and not blank:
            raise ValueError(f"{name} cannot be used with custom_generate: prompts are input_ids and attention_mask")
    positions = model_inputs.get("position_ids")  # [B, S], or some such planes for models that count in several dimensions
    if positions is not None and not bool((positions == real.cumsum(1) - 1)[..., real].all()):
        raise ValueError(f"position_ids cannot be used with custom_generate unless they count from 0, got {positions.tolist()}")


def custom_generate(drafter: Drafter, streamer=None, seed: int | None = None, mode: str | None = None) -> CustomGenerate:
    """Speculative decoding inside transformers' own `generate`.

    A streamer goes in here, because transformers hands neither its `streamer` nor its `tokenizer` on to a callable: with one given to
    `model.generate`, nothing is streamed. `mode` is that of `SpeculativeGenerator`; `model.generate(seed=…)` goes before the `seed` given here.
    For stop strings pass `StopStringCriteria(tokenizer, strings)` in `stopping_criteria`. A processor of a type that the generation config
    builds too (say, a second repetition penalty) is taken from the config. Raises TypeError for what is no drafter.

    >>> import specdec
    >>> pair = specdec.load_tiny_pair()
    >>> inputs = pair.tokenizer("import os", return_tensors="pt")
    >>> speculative = specdec.custom_generate(specdec.ModelDrafter(pair.draft))
    >>> pair.target.generate(input_ids=inputs.input_ids, custom_generate=speculative, max_new_tokens=8).shape[0]
    1
    """
    return CustomGenerate(drafter, streamer, seed, mode)
