"""onnxruntime-genai: its `Generator`, with a draft model or n-grams. Its own builder converts, in fp32.

Both kinds of speculation are the package's own: a second decoder in the config, or `ngram_size`, of which it matches
exactly one token less. A round of n-grams that rejects a token may run the target once more to mend its cache; such a
forward is no round."""

import json
import subprocess
import sys
from pathlib import Path

PACKAGES = ("onnxruntime-genai", "onnxruntime")
NGRAM = 3  # as in the package's own description
NEVER = 1  # ends a text: the padding token, which is never written; a number outside the vocabulary is refused


def export(models: str, folder: str) -> None:
    """ONNX models with their configs; needs torch and transformers."""
    for model in Path(models).iterdir():
        options = ["-m", str(model), "-o", str(Path(folder, model.name)), "-c", str(Path(folder, "cache"))]
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", *options, "-p", "fp32", "-e", "cpu"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError((done.stderr.strip().splitlines() or ["the builder failed"])[-1])


def load(settings: dict):
    """A model, with the draft in its config; a generator for each call."""
    import onnxruntime_genai

    kind, folder = settings["kind"], Path(settings["exports"])
    session = {f"{name}_num_threads": settings["threads"] for name in ("intra_op", "inter_op")}
    model_part: dict = {"eos_token_id": NEVER, "decoder": {"session_options": session}}
    if kind == "chain":
        draft = json.loads((folder / settings["draft"] / "genai_config.json").read_text())["model"]["decoder"]
        draft["session_options"] |= session
        model_part["draft"] = draft | {"filename": f"../{settings['draft']}/model.onnx"}
    config = onnxruntime_genai.Config(str(folder / "target"))
    config.overlay(json.dumps({"model": model_part}))
    model = onnxruntime_genai.Model(config)

    def call(prompts, new_tokens, seed):
        (prompt,) = prompts
        parameters = onnxruntime_genai.GeneratorParams(model)
        sampling = {} if seed is None else {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "random_seed": seed}
        parameters.set_search_options(max_length=len(prompt) + new_tokens, do_sample=seed is not None, **sampling)
        if kind != "plain":
            ngram = {"ngram_size": NGRAM} if kind == "lookup" else {}
            parameters.set_speculative_options(max_draft_tokens=settings["length"], **ngram)
        generator = onnxruntime_genai.Generator(model, parameters)
        generator.append_tokens(prompt)
        while not generator.is_done():
            generator.generate_next_token()
        found = {} if kind == "plain" else generator.get_speculative_stats()
        rounds = found["rounds"] + found["standard_fallback_steps"] if found else new_tokens
        return [generator.get_sequence(0)[len(prompt) :]], rounds

    return call
