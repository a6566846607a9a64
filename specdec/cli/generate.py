"""`python -m specdec generate`: a user's own pair from the command line."""

import json
import math
import sys

import torch
from transformers import AutoTokenizer
from transformers.utils import logging

from specdec.cuda_graph import CannotCapture
from specdec.drafters import ModelDrafter
from specdec.generation.generators import SpeculativeGenerator
from specdec.info import environment
from specdec.loading import load_model
from specdec.report.terminal import authors, coloured


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error


def run(options) -> int:
    """Generate once and print the text, coloured by author in a terminal, or one JSON object."""
    if not 0 <= options.temperature < math.inf:
        raise ValueError(f"--temperature must be >= 0 and finite (0: greedy), got {options.temperature}")
    for name in ("num_tokens", "max_new_tokens"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    dtypes: dict[str, torch.dtype | str] = {
        "auto": "auto",
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }
    if options.dtype not in dtypes:
        raise ValueError(f"--dtype must be one of {', '.join(dtypes)}, got {options.dtype}")
    device = _device(options.device or ("cuda:0" if torch.cuda.is_available() else "cpu"))
    logging.disable_progress_bar()
    target = load_model(options.target, dtypes[options.dtype], device)
    draft = load_model(options.draft, target.dtype, device)
    tokenizer = AutoTokenizer.from_pretrained(options.target)
    generator = SpeculativeGenerator(target, ModelDrafter(draft, options.num_tokens), mode=options.mode)
    ids = tokenizer(options.prompt, return_tensors="pt").input_ids.to(device)
    sampling = {name: getattr(options, name) for name in ("max_new_tokens", "top_k", "top_p", "seed")}
    sampling |= {"do_sample": options.temperature > 0, "temperature": options.temperature or None}
    try:
        out = generator.generate(ids, **sampling)
    except CannotCapture as error:  # this model in this mode: bad input
        raise ValueError(str(error)) from error
    count = int(out.lengths[0])
    tokens = out.sequences[0, out.sequences.shape[1] - count :].tolist()
    drafted = authors(out.stats.rows[0], count)
    if options.json:
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        result = {"text": text, "tokens": tokens, "drafted": drafted, "stats": out.stats.as_dict()}
        print(json.dumps(result | {"environment": environment()}))
        return 0
    print(coloured(tokenizer, options.prompt, tokens, drafted, colour=sys.stdout.isatty()))
    pooled = out.stats.pooled
    shown = f"{count} tokens, {out.stats.tokens_per_second:.1f} tok/s, {pooled.tokens_per_round:.2f} tokens per round"
    for name in ("acceptance_rate", "overhead", "speedup"):
        if getattr(pooled, name) is not None:  # a text of one round has no overhead
            shown += f", {name.replace('_', ' ')} {getattr(pooled, name):.2f}"
    print(shown, file=sys.stderr)
    return 0
