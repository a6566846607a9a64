"""`python -m specdec generate`: a user's own pair from the command line."""

import json
import sys

import torch
from transformers import AutoTokenizer

from specdec.drafters import ModelDrafter
from specdec.generators import SpeculativeGenerator
from specdec.info import environment
from specdec.loading import load_model
from specdec.terminal import authors, coloured


def run(options) -> int:
    """Generate once and print the text, coloured by author in a terminal, or one JSON object."""
    if options.temperature < 0:
        raise ValueError(f"--temperature must be >= 0 (0: greedy), got {options.temperature}")
    dtypes = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if options.dtype not in dtypes:
        raise ValueError(f"--dtype must be one of {', '.join(dtypes)}, got {options.dtype}")
    device = torch.device(options.device or ("cuda:0" if torch.cuda.is_available() else "cpu"))
    target = load_model(options.target, dtypes[options.dtype], device)
    draft = load_model(options.draft, target.dtype, device)
    tokenizer = AutoTokenizer.from_pretrained(options.target)
    generator = SpeculativeGenerator(target, ModelDrafter(draft, options.num_tokens))
    out = generator.generate(
        tokenizer(options.prompt, return_tensors="pt").input_ids.to(device),
        max_new_tokens=options.max_new_tokens,
        do_sample=options.temperature > 0,
        temperature=options.temperature or None,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
    )
    count = int(out.lengths[0])
    tokens = out.sequences[0, out.sequences.shape[1] - count :].tolist()
    drafted = authors(out.stats.rows[0], count)
    if options.json:
        result = {"text": tokenizer.decode(tokens, skip_special_tokens=True), "tokens": tokens, "drafted": drafted, "stats": out.stats.as_dict()}
        print(json.dumps(result | {"environment": environment()}))
        return 0
    print(coloured(tokenizer, options.prompt, tokens, drafted, colour=sys.stdout.isatty()))
    pooled = out.stats.pooled
    if pooled.rounds:
        print(f"{count} tokens, {out.stats.tokens_per_second:.1f} tok/s, {pooled.tokens_per_round:.2f} tokens per round, "
              f"acceptance rate {pooled.acceptance_rate or 0:.2f}, overhead {pooled.overhead:.2f}, speedup {pooled.speedup:.2f}", file=sys.stderr)  # fmt: skip
    return 0
