"""The experiment's text: source of installed packages, whole packages of it held out for prompts."""

import hashlib
import random
import time
from itertools import accumulate

import numpy as np

from scripts.common.tiny_corpus import SKIPPED_PARTS, build_prompts, edit_documents, load_corpus
from scripts.common.tiny_models import tokenize, train_tokenizer
from specdec.training.checkpoint import write_json

# copies of these that others vendor are left out
HELD_OUT = ("networkx", "pandas", "optax", "botorch", "rich", "jinja2", "requests", "sklearn", "pygments")


def prompts_from(files, per_kind, seed):
    """`({kind: prompts}, the kinds of which the files give too few)`."""
    kinds, left_out = ["code", "prose", "data", "editing"], []
    while kinds:
        try:
            return build_prompts(files, per_kind, seed, kinds), left_out
        except ValueError as error:
            left_out += [kind for kind in kinds if f" {kind} prompts" in str(error)]
            kinds.remove(left_out[-1])
    raise ValueError(f"no kind of prompts could be made {per_kind} times from {len(files)} held-out files")


def within(texts, size):
    """How many of `texts`, from the first on, fit into `size` bytes.

    >>> within(["ab", "cd", "e"], 4)
    2
    """
    return sum(total <= size for total in accumulate(len(text.encode()) for text in texts))


def read_files(packages, stdlib, rng):
    """`(training files, held-out files, held-out packages)`, shuffled, a file as (path, text)."""
    names = [name for name in HELD_OUT if (packages / name).is_dir()]
    if not names:
        raise FileNotFoundError(f"{packages} holds none of the packages to evaluate on: {', '.join(HELD_OUT)}")
    held_out_path = lambda path: bool(set(names) & set(path.split("/")[:-1]))
    files, held_out = load_corpus(packages, held_out_path, SKIPPED_PARTS | {"tests", "test"})
    kept_back = {text for _, text in held_out}
    # vendored copies would repeat the packages themselves
    held_out = [(path, text) for path, text in held_out if path.split("/")[0] in names]
    files += [(f"stdlib/{path}", text) for path, text in load_corpus(stdlib)[0] if text not in kept_back]
    rng.shuffle(files)
    return files, held_out, names


def make_corpus(preset, packages, stdlib, folder, seed):
    """Read and split the source, train the tokenizer, tokenise everything, choose the prompts."""
    began, rng = time.perf_counter(), random.Random(seed)
    files, held_out, names = read_files(packages, stdlib, rng)
    chosen = files[: within([text for _, text in files], preset["max_bytes"])]
    texts = [text for _, text in chosen] + edit_documents(chosen[:: preset["edit_every"]], seed, share=0.6)
    print(f"{len(files)} files read, {len(chosen)} chosen, {time.perf_counter() - began:.1f} s", flush=True)

    rng.shuffle(texts)
    sample = texts[: within(texts, preset["tokenizer_bytes"])]
    tokenizer = train_tokenizer(sample, folder / "target", preset["vocab_size"])
    spent = time.perf_counter() - began
    print(f"tokenizer of {len(tokenizer)} tokens from {len(sample)} texts, {spent:.1f} s", flush=True)
    rng.shuffle(held_out)
    asked = held_out[: preset["prompt_files"]]
    tokens = {}
    for name, part in (("train", texts), ("held_out", [text for _, text in asked])):
        stream = np.concatenate([tokenize(part[i : i + 2048], tokenizer) for i in range(0, len(part), 2048)])
        np.save(folder / f"{name}.npy", stream)
        tokens[name] = len(stream)
    evaluation, left_out = prompts_from(asked[0::2], preset["prompts"], seed)
    calibration, _ = prompts_from(asked[1::2], preset["calibration_prompts"], seed)
    write_json({"evaluation": evaluation, "calibration": calibration}, folder / "prompts.json")
    return {
        "files": len(chosen),
        "bytes": sum(len(text.encode()) for text in texts),
        "tokens": tokens["train"],
        "sha256": hashlib.sha256("".join(texts).encode()).hexdigest(),
        "held_out_packages": names,
        "held_out_files": len(held_out),
        "held_out_tokens": tokens["held_out"],
        "vocab_size": len(tokenizer),
        "prompts": {kind: [prompt["source"] for prompt in prompts] for kind, prompts in evaluation.items()},
        "kinds_left_out": left_out,
        "calibration_prompts": {kind: len(prompts) for kind, prompts in calibration.items()},
    }
