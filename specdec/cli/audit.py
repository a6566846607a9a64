"""`specdec audit`: does a target with a drafter and an acceptance rule write the target's own text?"""

import argparse
import sys
from typing import Any

from specdec.auditing.audit import PARTS, audit
from specdec.auditing.result import STATUS
from specdec.cli.command import (
    Command,
    add_model_options,
    dtype_and_device,
    new_parser,
    quiet_transformers,
    require_at_least_one,
)
from specdec.cli.kinds import RULES, describe_drafters, make_drafter, make_rule
from specdec.cli.prompts import load_tokenizer
from specdec.cli.results import hand_over, make_result
from specdec.evaluation.questions import read_questions, shipped_questions, some_of
from specdec.evaluation.texts import Texts
from specdec.loading import load_model
from specdec.model.runner import ModelRunner

ABOUT = """Does decoding with a drafter write the target's own text?

Greedy: texts are compared with transformers' generate and with plain decoding here. Where they part, the verdict is a
near-tie, which rounding can decide, or a bug. Sampled: after each prompt the tokens drawn are compared with the
target's distribution, over its 64 likeliest tokens and the rest, and a rule that is wrong on purpose must be found.

Exit status: 0 passed, 1 failed, 3 inconclusive (the wrong rule was not found, or nothing was drafted), 2 bad input."""


def parser(prog: str = "specdec audit") -> argparse.ArgumentParser:
    """The options and their defaults."""
    options = new_parser(prog, f"{ABOUT}\n\n{describe_drafters()}")
    add = options.add_argument
    add("--target", required=True, help="folder or hub id")
    add("--drafter", required=True, metavar="DRAFTER", help="see above")
    rules = f"{', '.join(RULES)}, or MODULE:NAME of a rule of yours"
    add("--rule", metavar="RULE", help=f"of samples: {rules} (default: the one that fits the draft)")
    add("--greedy-rule", metavar="RULE", help="of greedy decoding (default: greedy)")
    add("--prompts", metavar="FILE", help="of the kinds that specdec bench reads (default: some that ship)")
    add("--limit", type=int, default=4, help="prompts to take, evenly from the file")
    add("--chat", action="store_true", help="texts are users' messages, for the tokenizer's chat template")
    add("--num-tokens", type=int, help="draft length γ (default: the drafter's)")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    add("--max-new-tokens", type=int, default=64, help="of a greedy text")
    add("--samples", type=int, default=2000, help="after each prompt")
    add("--tokens", type=int, default=4, help="of each sample")
    add("--level", type=float, default=1e-4, help="probability of a false alarm, over all tests together")
    add("--batch", type=int, default=64, help="rows that are decoded together")
    add("--temperature", type=float, default=1.0)
    add("--top-k", type=int, default=0)
    add("--top-p", type=float, default=1.0)
    add("--seed", type=int, default=0)
    add("--kv-dtype", help="int8 or fp8: keys and values of the target in 8 bits")
    add_model_options(add)
    add("--json", metavar="FILE", help="where all figures go (default: to standard output if that is no terminal)")
    return options


def run(options: argparse.Namespace) -> int:
    """Audit, print the tables, hand over the result -> the status."""
    require_at_least_one(options, "num_tokens", "max_new_tokens", "samples", "tokens", "batch", "limit")
    rule, greedy_rule = make_rule(options.rule), make_rule(options.greedy_rule, "--greedy-rule")
    dtype, device = dtype_and_device(options)
    quiet_transformers()
    target = ModelRunner(load_model(options.target, dtype, device), kv_dtype=options.kv_dtype, mode=options.mode)
    tokenizer = load_tokenizer(options)
    questions = some_of(
        shipped_questions(1) if options.prompts is None else read_questions(options.prompts), options.limit
    )
    texts = Texts(tokenizer, device, options.chat)
    prompts = [texts.ids(question, 0)[None] for question in questions]
    drafter = make_drafter(options.drafter, target, num_tokens=options.num_tokens)
    given: dict[str, Any] = {"temperature": options.temperature, "top_k": options.top_k, "top_p": options.top_p}
    found = audit(
        target, drafter, prompts, rule, greedy_rule, parts=options.parts, max_new_tokens=options.max_new_tokens,
        samples=options.samples, tokens=options.tokens, level=options.level, batch=options.batch, seed=options.seed,
        progress=sys.stderr.isatty(), **given,
    )  # fmt: skip
    print(found)
    settings = {name: value for name, value in vars(options).items() if name != "json"}
    settings |= {
        "dtype": str(target.dtype).removeprefix("torch."),
        "prompts": [question.turns[0] for question in questions],
    }
    result = make_result("audit", settings, found.methods(), found.records(), verdict=found.verdict)
    hand_over(result, options.json)
    return STATUS[found.verdict]


COMMAND = Command(parser, run)
