"""OpenVINO GenAI: `LLMPipeline`, with a draft model or prompt lookup. optimum-intel converts, without 8-bit weights.

Precision hints ask for fp32, which is not the default on every CPU. With a draft model sampled text is not the
target's own, and many sampled calls raise."""

from pathlib import Path

import numpy as np

PACKAGES = ("openvino-genai", "openvino", "optimum-intel")
NGRAM = 3  # tokens that a lookup matches at most, as in OpenVINO's own sample


def export(models: str, folder: str) -> None:
    """Models with their tokenizers, which a pipeline with a draft model insists on."""
    from openvino import save_model
    from openvino_tokenizers import convert_tokenizer
    from optimum.intel import OVModelForCausalLM
    from transformers import AutoTokenizer

    for source in Path(models).iterdir():
        made = Path(folder, source.name)
        model = OVModelForCausalLM.from_pretrained(source, export=True, load_in_8bit=False, compile=False)
        model.save_pretrained(made)
        tokenizers = convert_tokenizer(AutoTokenizer.from_pretrained(source), with_detokenizer=True)
        for tokenizer, kind in zip(tokenizers, ("tokenizer", "detokenizer"), strict=True):
            save_model(tokenizer, made / f"openvino_{kind}.xml")


def load(settings: dict):
    """A pipeline; its rounds are forwards of the target."""
    import openvino
    import openvino_genai

    kind, folder = settings["kind"], settings["exports"]
    exact = {
        "INFERENCE_NUM_THREADS": settings["threads"], "INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32",
    }  # fmt: skip
    more: dict = {}
    if kind == "chain":
        more["draft_model"] = openvino_genai.draft_model(str(Path(folder, settings["draft"])), "CPU", **exact)
    elif kind == "lookup":
        more["prompt_lookup"] = True
    pipeline = openvino_genai.LLMPipeline(str(Path(folder, "target")), "CPU", **more, **exact)

    def call(prompts, new_tokens, seed):
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = new_tokens, True, seed is not None
        if seed is not None:
            config.temperature, config.rng_seed = 1.0, seed
        if kind != "plain":
            config.num_assistant_tokens = settings["length"]
        if kind == "lookup":
            config.max_ngram_size = NGRAM
        out = pipeline.generate(openvino.Tensor(np.array(prompts, dtype=np.int64)), config)
        return out.tokens, len(out.perf_metrics.raw_metrics.m_batch_sizes)

    return call
