"""This library, or an older checkout of it, which need have no more than this file imports."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

import specdec
from medusa import MedusaDrafter
from medusa.tiny_heads import load_tiny_heads

PACKAGES = ("specdec-lab", "torch", "transformers")


def load(settings: dict):
    """Plain decoding, a chain from the draft, prompt lookup, or the Medusa heads that ship."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(settings["threads"])
    dtype = getattr(torch, settings["dtype"])
    model = specdec.load_model(Path(settings["models"], "target"), dtype, "cpu")
    model.generation_config.eos_token_id = None
    runner = specdec.ModelRunner(model, mode=settings["mode"])
    drafters: dict[str, Callable[[], Any]] = {
        "chain": lambda: specdec.ModelDrafter(draft_of(model, settings), num_tokens=settings["length"]),
        "lookup": lambda: specdec.PromptLookupDrafter(settings["length"], candidates=1),
        "medusa": lambda: MedusaDrafter(load_tiny_heads(dtype)[0], specdec.TokenTree.chain(2)),  # what a CPU can verify
    }
    drafter = drafters.get(settings["kind"], lambda: None)()
    generator: Any = (
        specdec.SpeculativeGenerator(runner, drafter) if drafter else specdec.AutoregressiveGenerator(runner)
    )

    def call(prompts, new_tokens, seed):
        widest = max(map(len, prompts))
        ids = torch.tensor([[0] * (widest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (widest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        sampling = {"do_sample": False} if seed is None else {"do_sample": True, "temperature": 1.0, "top_k": 0}
        out = generator.generate(ids, mask, max_new_tokens=new_tokens, seed=seed or 0, **sampling)
        return out.sequences[:, widest:].tolist(), out.stats.pooled.rounds

    return call


def draft_of(target, settings: dict):
    """The draft model: one of its own, or the first layers of a synthetic target, whose weights it shares."""
    if settings["draft_layers"] is None:
        draft = specdec.load_model(Path(settings["models"], settings["draft"]), target.dtype, "cpu")
    else:
        from specdec.drafters.early_exit import first_layers

        draft = first_layers(target, settings["draft_layers"])
        draft.generation_config = copy.deepcopy(target.generation_config)
    draft.generation_config.eos_token_id = None
    return draft
