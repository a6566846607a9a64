"""What all kinds of drafters have alike in the format of the speculators library (0.9.0)."""

from collections.abc import Collection, Mapping
from typing import Any

from specdec.drafters.files.fields import Fields
from specdec.drafters.files.reading import refuse_quantised

LAYERS = ("llama", "qwen3")


def open_config(config: Mapping[str, Any], kinds: Collection[str]) -> tuple[Fields, Fields, str, str]:
    """A config's fields, those of its layers, its kind, one of `kinds`, and the type of its layers, one of LAYERS.

    Raises ValueError for others, and for quantised drafters."""
    fields = Fields(config, "config.json")
    kind = fields.take("speculators_model_type", str)
    if kind not in kinds:
        raise ValueError(f"config.json: speculators_model_type must be one of {', '.join(kinds)}, got {kind!r}")
    inner = fields.section("transformer_layer_config")
    layers = inner.take("model_type", str, "qwen3")  # the library's default
    if layers not in LAYERS:
        raise ValueError(f"{inner.where}: model_type must be one of {', '.join(LAYERS)}, got {layers!r}")
    for some in (fields, inner):
        refuse_quantised(some)
        some.take("tie_word_embeddings", bool, False)  # never tied, whatever it says
    return fields, inner, kind, layers
