"""`specdec generate`: a text from a user's own target and any drafter."""

import argparse
import json
import sys

from transformers.utils import logging

from specdec.cli.command import (
    Command,
    add_model_options,
    add_sampling_options,
    dtype_and_device,
    new_parser,
    require_at_least_one,
    sampling,
)
from specdec.cli.kinds import describe_drafters, make_drafter
from specdec.cli.prompts import load_tokenizer
from specdec.evaluation.questions import read_text
from specdec.evaluation.texts import encode
from specdec.generation.generators import SpeculativeGenerator
from specdec.info import environment
from specdec.loading import load_model
from specdec.model.runner import ModelRunner
from specdec.report.terminal import authors, coloured


def parser(prog: str = "specdec generate") -> argparse.ArgumentParser:
    """The options and their defaults."""
    options = new_parser(prog, f"Generate a text.\n\n{describe_drafters()}")
    add = options.add_argument
    add("--target", required=True, help="folder or hub id")
    drafter = options.add_mutually_exclusive_group()
    drafter.add_argument("--drafter", metavar="DRAFTER", help="see above; none: plain decoding")
    drafter.add_argument("--heads", metavar="DIR", help="Medusa heads: the same as --drafter medusa:path=DIR")
    prompt = options.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt")
    prompt.add_argument("--prompt-file", metavar="FILE", help="a text file, or - for standard input")
    add("--chat", action="store_true", help="the prompt is a user's message, for the tokenizer's chat template")
    add("--system", metavar="TEXT", help="a system message before it")
    add("--chat-template", metavar="FILE", help="a template in place of the tokenizer's")
    option = "an option of the template, such as enable_thinking=false; the value is JSON, or else a text"
    add("--template-option", action="append", default=[], metavar="NAME=VALUE", help=option)
    add("--num-tokens", type=int, help="draft length γ (default: the drafter's)")
    add("--max-new-tokens", type=int, default=128)
    add_sampling_options(add)
    add_model_options(add)
    where = "write one JSON object there instead of text (- or nothing: to standard output)"
    add("--json", nargs="?", const="-", metavar="FILE", help=where)
    return options


def run(options: argparse.Namespace) -> None:
    """Generate once and print the text, coloured by author in a terminal, or one JSON object."""
    given = sampling(options)
    require_at_least_one(options, "num_tokens", "max_new_tokens")
    chat = options.chat or options.system is not None or options.chat_template is not None
    if options.template_option and not chat:
        raise ValueError("--template-option goes with --chat")
    dtype, device = dtype_and_device(options)
    prompt = options.prompt if options.prompt_file is None else read_text(options.prompt_file)
    logging.disable_progress_bar()
    target = ModelRunner(load_model(options.target, dtype, device), mode=options.mode)
    tokenizer = load_tokenizer(options)
    if options.chat_template is not None:
        tokenizer.chat_template = read_text(options.chat_template)
    template = _template_options(options.template_option)
    text, ids = encode(prompt, tokenizer, device, chat, options.system, **template)
    spec = options.drafter if options.heads is None else f"medusa:path={options.heads}"
    drafter = None if spec is None else make_drafter(spec, target, num_tokens=options.num_tokens)
    generator = SpeculativeGenerator(target, drafter)
    out = generator.generate(ids, max_new_tokens=options.max_new_tokens, seed=options.seed, **given)
    count = int(out.lengths[0])
    tokens = out.sequences[0, out.sequences.shape[1] - count :].tolist()
    drafted = authors(out.stats.rows[0], count)
    if options.json is not None:
        said = tokenizer.decode(tokens, skip_special_tokens=True)
        result = {"text": said, "tokens": tokens, "drafted": drafted, "stats": out.stats.as_dict()}
        written = json.dumps(result | {"environment": environment()})
        if options.json == "-":
            print(written)
        else:
            with open(options.json, "w", encoding="utf-8") as file:
                file.write(written + "\n")
        return
    print(coloured(tokenizer, text, tokens, drafted, colour=sys.stdout.isatty()))
    print(out.stats, file=sys.stderr)


def _template_options(given: list[str]) -> dict:
    options = {}
    for pair in given:
        name, equals, value = pair.partition("=")
        if not (name.isidentifier() and equals):
            raise ValueError(f"--template-option is NAME=VALUE, got {pair!r}")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options


COMMAND = Command(parser, run)
