"""transformers' `generate`: plain, with an assistant model of constant γ, and prompt lookup at its default settings."""

from pathlib import Path

import torch
from transformers.utils import logging

import specdec
from scripts.cpu_bench.engines.ours import draft_of
from scripts.generate_bench.peers import count_forwards

PACKAGES = ("transformers", "torch")


def load(settings: dict):
    """`model.generate` for one kind of decoding; its rounds are forwards of the target."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(settings["threads"])
    target = specdec.load_model(Path(settings["models"], "target"), getattr(torch, settings["dtype"]), "cpu")
    target.generation_config.eos_token_id = None
    keywords: dict = {}
    if settings["kind"] == "chain":
        keywords["assistant_model"] = draft = draft_of(target, settings)
        config = draft.generation_config
        config.num_assistant_tokens, config.num_assistant_tokens_schedule = settings["length"], "constant"
        config.assistant_confidence_threshold = 0.0
    elif settings["kind"] == "lookup":
        keywords["prompt_lookup_num_tokens"] = settings["length"]

    def call(prompts, new_tokens, seed):
        ids, found = torch.tensor(prompts), []
        sampling = {"do_sample": False} if seed is None else {"do_sample": True, "temperature": 1.0, "top_k": 0}
        torch.manual_seed(seed or 0)
        generate = lambda: target.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, **sampling, **keywords
        )
        rounds = count_forwards(target, lambda: found.append(generate()))
        return found[0][:, ids.shape[1] :].tolist(), rounds

    return call
