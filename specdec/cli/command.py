"""What all commands share: errors in one line, and the options about models, devices and sampling."""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from attention import OutOfPages
from specdec.cuda_graph import CannotCapture

DTYPES: dict[str, torch.dtype | str] = {
    "auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
}  # fmt: skip
LONGEST = 600  # characters of an error
BAD_INPUT = (ValueError, TypeError, OSError, ImportError, CannotCapture, OutOfPages)


@dataclass(frozen=True, slots=True)
class Command:
    """A command: `parser(**options)` makes its `ArgumentParser`, `run(options)` does the work -> None or a status."""

    parser: Callable[..., argparse.ArgumentParser]
    run: Callable[[argparse.Namespace], int | None]

    def __call__(self, arguments: Sequence[str] | None, **options: Any) -> int:
        """Parse and run, with `options` for the parser -> the status: 2 for bad input, which prints one line."""
        parsed = self.parser(**options).parse_args(arguments)
        return status_of(lambda: self.run(parsed))


def status_of(run: Callable[[], int | None]) -> int:
    """Run a command or a script -> its status: 0 for None, 2 for bad input, which prints one line."""
    try:
        return run() or 0
    except BAD_INPUT as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2


def one_line(error: BaseException) -> str:
    """What an error says, on one line; of a missing package also which extra brings it."""
    said = " ".join(str(error).split()) or type(error).__name__
    said = said if len(said) <= LONGEST else f"{said[:LONGEST]} …"
    if isinstance(error, ModuleNotFoundError):
        said += f": pip install {error.name}, or all that commands need: pip install 'specdec-lab[train,demo]'"
    return said


class _Help(argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and options without a text too."""

    def add_argument(self, action: argparse.Action) -> None:
        action.help = action.help or " "
        super().add_argument(action)

    def _get_help_string(self, action: argparse.Action) -> str:
        said, shown = action.help or "", action.default not in (None, False, [], argparse.SUPPRESS)
        return said if not shown or "default" in said else f"{said} (default %(default)s)".strip()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def new_parser(prog: str, about: str | None) -> argparse.ArgumentParser:
    """A parser whose help keeps the line breaks of `about` and shows defaults, and whose errors are one line."""
    return _Parser(prog=prog, description=about, formatter_class=_Help)


def add_dtype_option(add: Callable[..., Any]) -> None:
    """--dtype."""
    add("--dtype", default="auto", help=f"of the model: {', '.join(DTYPES)} (default auto: as it is stored)")


def add_device_options(add: Callable[..., Any]) -> None:
    """--dtype and --device."""
    add_dtype_option(add)
    add("--device", help="default: cuda if there is one, else cpu")


def add_model_options(add: Callable[..., Any]) -> None:
    """--tokenizer, --dtype, --device and --mode."""
    add("--tokenizer", metavar="DIR", help="folder or hub id (default: the target's)")
    add_device_options(add)
    mode = (
        "eager, graph (rounds recorded and replayed), compile (torch.compile) or auto (default): graph where it can be"
    )
    add("--mode", default="auto", help=mode)


def add_sampling_options(add: Callable[..., Any]) -> None:
    """--temperature, --top-k, --top-p and --seed."""
    add("--temperature", type=float, default=0.0, help="0 (default): greedy")
    add("--top-k", type=int)
    add("--top-p", type=float)
    add("--seed", type=int)


def require_at_least_one(options: argparse.Namespace, *names: str) -> None:
    """Raise ValueError, naming the option, where a count is below 1."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")


def sampling(options: argparse.Namespace) -> dict:
    """Keywords of `generate` that the sampling options stand for. Raises ValueError for a bad temperature."""
    if not 0 <= options.temperature < math.inf:
        raise ValueError(f"--temperature must be >= 0 and finite (0: greedy), got {options.temperature}")
    if options.temperature == 0:
        return {"do_sample": False}
    return {
        "do_sample": True, "temperature": options.temperature, "top_k": options.top_k or 0,
        "top_p": 1.0 if options.top_p is None else options.top_p,
    }  # fmt: skip


def quiet_transformers() -> None:
    """Let transformers neither warn nor show bars of its own."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def dtype_of(options: argparse.Namespace) -> torch.dtype | str:
    """What --dtype stands for. Raises ValueError naming one that cannot be used."""
    if options.dtype not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {options.dtype}")
    return DTYPES[options.dtype]


def dtype_and_device(options: argparse.Namespace) -> tuple[torch.dtype | str, torch.device]:
    """What --dtype and --device stand for. Raises ValueError naming one that cannot be used."""
    dtype, name = dtype_of(options), options.device or ("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        return dtype, torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
