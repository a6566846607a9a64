"""A drafter's config.json, field by field: missing, unknown and badly typed fields are errors that name them."""

from collections.abc import Collection, Mapping
from typing import Any

REQUIRED: Any = object()
# what transformers of any version writes and no drafter computes with
HARMLESS = frozenset({
    "_attn_implementation", "_attn_implementation_internal", "_commit_hash", "_name_or_path", "add_cross_attention",
    "architectures", "attention_dropout", "attn_implementation", "auto_map", "bad_words_ids", "begin_suppress_tokens",
    "bos_token_id", "chunk_size_feed_forward", "cross_attention_hidden_size", "decoder_start_token_id",
    "diversity_penalty", "do_sample", "dtype", "early_stopping", "encoder_no_repeat_ngram_size", "eos_token_id",
    "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "id2label",
    "initializer_range", "is_decoder", "is_encoder_decoder", "label2id", "length_penalty", "max_length",
    "max_window_layers", "min_length", "model_type", "modelopt_version", "no_repeat_ngram_size", "num_beam_groups",
    "num_beams", "num_return_sequences", "output_attentions", "output_hidden_states", "output_scores", "pad_token_id",
    "prefix", "pretraining_tp", "problem_type", "pruned_heads", "remove_invalid_values", "repetition_penalty",
    "return_dict", "return_dict_in_generate", "sep_token_id", "suppress_tokens", "task_specific_params",
    "temperature", "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class", "top_k", "top_p", "torch_dtype",
    "torchscript", "transformers_version", "typical_p", "use_bfloat16", "use_cache",
})  # fmt: skip


class Fields:
    """The fields of a config, or of a section of one, that `where` names in messages. None counts as absent."""

    def __init__(self, values: Mapping[str, Any], where: str):
        self.where = where
        self._values, self._read = {name: value for name, value in values.items() if value is not None}, set[str]()

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def take(self, name: str, kind: type, default: Any = REQUIRED) -> Any:
        """The field `name`, of type `kind`. Raises ValueError where it is of another type, or absent and required."""
        self._read.add(name)
        if name not in self._values:
            if default is REQUIRED:
                raise ValueError(f"{self.where} lacks the field {name}")
            return default
        value = self._values[name]
        if kind is float and type(value) is int:
            value = float(value)
        if not isinstance(value, kind) or isinstance(value, bool) and kind is not bool:
            raise ValueError(f"{self.where}: {name} must be of type {kind.__name__}, got {value!r}")
        return value

    def section(self, name: str) -> "Fields":
        """The fields inside the field `name`, none where it is absent."""
        return Fields(self.take(name, dict, {}), f"{name} of {self.where}")

    def refuse(self, name: str, why: str, harmless: Any = None) -> None:
        """Raise ValueError, with the reason, where the field has another value than `harmless`."""
        self._read.add(name)
        if name in self._values and self._values[name] != harmless:
            raise ValueError(f"{self.where}: {name} is {self._values[name]!r}, {why}")

    def refuse_others(self, ignore: Collection[str] = ()) -> None:
        """Raise ValueError for fields that nobody has taken and that may change what the drafter computes."""
        others = sorted(self._values.keys() - self._read - HARMLESS - set(ignore))
        if others:
            shown = ", ".join(f"{name}={self._values[name]!r}" for name in others)
            raise ValueError(
                f"{self.where} has unknown fields, which may change what the drafter computes: {shown}; "
                f"ignore={others} reads the rest"
            )
