"""llama.cpp through llama-cpp-python: `Llama.generate`, with its draft models. Files are written with `gguf` alone.

The package ships prompt lookup; a draft model is any callable, here a second `Llama` that continues greedily. A token
that the target draws by itself is compared with the drafted one, so sampled text is the target's own. Keys and values
are kept in fp32, as the others' are."""

import itertools
import json
from pathlib import Path

import numpy as np

PACKAGES = ("llama-cpp-python", "gguf")
F32 = 0  # GGML_TYPE_F32


def export(models: str, folder: str) -> None:
    """Files of fp32 without a tokenizer: calls are given token ids."""
    for model in Path(models).iterdir():
        write_gguf(model, Path(folder, f"{model.name}.gguf"))


def write_gguf(model: Path, path: Path) -> None:
    """A Llama in transformers' format as GGUF."""
    import gguf
    from safetensors.numpy import load_file

    config = json.loads((model / "config.json").read_text())
    heads, kv_heads, layers = (
        config[name] for name in ("num_attention_heads", "num_key_value_heads", "num_hidden_layers")
    )
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(layers)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    for name, weight in load_file(model / "model.safetensors").items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = interleaved(weight, heads if "q_proj" in name else kv_heads)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), weight.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows `[heads * D, …]` for rotations of neighbours, as llama.cpp has them, from those of halves.

    >>> interleaved(np.arange(4)[:, None], 1)[:, 0].tolist()
    [0, 2, 1, 3]
    """
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def load(settings: dict):
    """A `Llama`, and its draft model; the models' keys of an earlier call are forgotten before each."""
    from llama_cpp import Llama
    from llama_cpp.llama_speculative import LlamaDraftModel, LlamaPromptLookupDecoding

    kind, length, threads = settings["kind"], settings["length"], settings["threads"]

    def opened(name: str, **more) -> Llama:
        path = str(Path(settings["exports"], f"{name}.gguf"))
        return Llama(path, n_ctx=0, n_threads=threads, n_threads_batch=threads, n_gpu_layers=0, type_k=F32, type_v=F32,
                     verbose=False, **more)  # fmt: skip

    class Continued(LlamaDraftModel):
        """The `length` tokens that a second model writes next."""

        def __call__(self, input_ids, /, **_):
            return np.array(list(itertools.islice(models[1].generate(input_ids.tolist(), temp=0.0), length)), np.intc)

    drafts = {"chain": Continued(), "lookup": LlamaPromptLookupDecoding(num_pred_tokens=length)}
    draft = drafts.get(kind)
    # without logits_all it raises on texts longer than a batch as soon as something drafts
    models = [opened("target", draft_model=draft, logits_all=draft is not None)]
    if kind == "chain":
        models.append(opened(settings["draft"]))
    evaluate, evaluated = models[0].eval, []

    def counted(tokens) -> None:
        evaluated.append(len(tokens))
        evaluate(tokens)

    models[0].eval = counted

    def call(prompts, new_tokens, seed):
        evaluated.clear()
        for model in models:
            model.reset()
        models[0].set_seed(seed or 0)
        sampling = {"temp": 0.0} if seed is None else {"temp": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        tokens = list(itertools.islice(models[0].generate(prompts[0], **sampling), new_tokens))
        return [tokens], len(evaluated)

    return call
