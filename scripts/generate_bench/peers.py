"""transformers' own ways to generate, as `scripts.bench_generate` measures them."""

import inspect
from collections.abc import Callable

from transformers import StaticCache

from scripts.generate_bench.models import Models, needs_draft, prompts
from scripts.generate_bench.speeds import speeds

EAGER, STATIC, ASSISTED, LOOKUP = (f"transformers-{name}" for name in ("eager", "static", "assisted", "lookup"))


def peer_row(method: str, models: Models, options, batch: int) -> dict:
    """`model.generate` at its best: one static cache for all calls, so captured graphs stay valid; a constant γ."""
    target, (ids, mask) = models.target, prompts(models, options, batch)
    keywords, cache, note = {"attention_mask": mask, "do_sample": False}, None, None
    if method == STATIC:
        cache = StaticCache(config=target.config, max_cache_len=ids.shape[1] + options.new_tokens)
        keywords[cache_argument(target)] = cache
        note = None if options.device == "cuda" else "not compiled"  # which transformers does on accelerators only
    elif method == ASSISTED:
        draft = needs_draft(models)
        config = draft.generation_config
        config.num_assistant_tokens, config.num_assistant_tokens_schedule, config.assistant_confidence_threshold = (
            options.length,
            "constant",
            0.0,
        )
        keywords["assistant_model"] = draft
        note = None if options.acceptance is None else "no wrong tokens planted here"
    elif method == LOOKUP:
        keywords["prompt_lookup_num_tokens"] = options.length

    def call(new_tokens: int):
        if cache is not None:
            cache.reset()
        return target.generate(ids, max_new_tokens=new_tokens, **keywords)

    row, whole = speeds(call, batch, options)
    forwards = count_forwards(target, lambda: call(options.new_tokens)) if method in (ASSISTED, LOOKUP) else None
    return {**row, "tokens_per_round": options.new_tokens / forwards if forwards else None, "note": note,
            "tokens": whole.result[:, ids.shape[1] :].tolist()}  # fmt: skip


def count_forwards(model, call: Callable[[], object]) -> int:
    """How often `call` runs `model`; a draft made of its layers shares its hooks and does not count."""
    seen = []
    handle = model.register_forward_pre_hook(lambda module, _: seen.append(module is model))
    try:
        call()
    finally:
        handle.remove()
    return sum(seen)


def cache_argument(model) -> str:
    """What a transformers model calls its cache: "cache" from 5.24 on, "past_key_values" before."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
