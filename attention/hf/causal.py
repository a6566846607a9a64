"""Which models and adapters are no plain causal language models, by their names and settings, and why."""

import re
from collections.abc import Mapping, Sequence

import transformers

from attention.hf.probe import UnsupportedArchitecture

# class name -> what such a model gives in place of the next token's logits
OTHER_TASKS = (
    (r"For\w*Classification|Reward", "it scores or labels texts and has no next token"),
    (r"ForQuestionAnswering|ForMultipleChoice|ForNextSentence", "it chooses among given answers"),
    (r"ForMaskedLM|ForPreTraining", "it fills gaps and reads the text on both sides of them"),
    (r"(?<!LMHead)(?<!DoubleHeads)Model$|Encoder$", "it gives hidden states or embeddings and has no output layer"),
)
ENCODER_DECODER = "it is an encoder and a decoder, and only decoder-only models run over a paged cache"
VIRTUAL_TOKENS = "virtual tokens before every prompt, which a paged cache does not hold"


def other_task(name: str) -> str | None:
    """What a model class of this name is for, if that is not generating text; None: nothing is known against it.

    >>> other_task("LlamaForTokenClassification"), other_task("GPT2LMHeadModel")
    ('it scores or labels texts and has no next token', None)
    """
    return next((why for pattern, why in OTHER_TASKS if re.search(pattern, name)), None)


def require_causal_lm(model) -> None:
    """Raise UnsupportedArchitecture for a model that cannot generate text, or that adds virtual tokens to prompts."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # of a PEFT model
    kind, own = type(model).__name__, type(inner).__name__
    name = kind if inner is model else f"{kind} around {own}"
    adapters = getattr(model, "peft_config", None) or {}
    for adapter in adapters.values():
        if getattr(adapter, "is_prompt_learning", False) or getattr(adapter, "is_adaption_prompt", False):
            raise UnsupportedArchitecture(f"{name} with {type(adapter).__name__} puts {VIRTUAL_TOKENS}")
    if getattr(inner.config, "is_encoder_decoder", False):
        raise UnsupportedArchitecture(f"{name} is no causal language model: {ENCODER_DECODER}")
    if not getattr(inner, "can_generate", lambda: True)():
        why = other_task(own) or "it cannot generate text"
        raise UnsupportedArchitecture(f"{name} is no causal language model: {why}")


def require_causal_lm_config(where: object, config) -> None:
    """Raise UnsupportedArchitecture, naming `where` it lies, for the configuration of a model that is none."""
    architectures: Sequence[str] = config.architectures or ()
    named = ", ".join(architectures) or type(config).__name__
    reasons = [other_task(name) for name in architectures]
    if (
        architectures
        and all(reasons)
        and all(hasattr(transformers, name) or "Reward" in name for name in architectures)
    ):
        raise UnsupportedArchitecture(f"{where} holds a {named}, which is no causal language model: {reasons[0]}")
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedArchitecture(f"{where} holds a {named}, which is no causal language model: {ENCODER_DECODER}")


def require_text_adapter(where: object, settings: Mapping) -> None:
    """Raise UnsupportedArchitecture for the settings, in adapter_config.json, of a PEFT adapter that we cannot run."""
    kind, task = settings.get("peft_type"), settings.get("task_type")
    if {"num_virtual_tokens", "cpt_token_ids"} & settings.keys() or kind == "ADAPTION_PROMPT":
        raise UnsupportedArchitecture(f"{where} is a {kind} adapter, which puts {VIRTUAL_TOKENS}")
    if task not in (None, "CAUSAL_LM"):
        raise UnsupportedArchitecture(f"{where} is an adapter for the task {task}, not for generating text (CAUSAL_LM)")
