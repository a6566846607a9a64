"""Models and prompts of `scripts.bench_cpu`, in folders that every worker reads."""

import copy
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

import specdec
from scripts.cpu_bench.options import PAIR
from scripts.generate_bench.models import build_shape
from specdec.tiny_pair import FOLDER


@dataclass(frozen=True, slots=True)
class Workload:
    """Models and the calls that every method makes.

    models: the folder of `target` and, for the shipped pair, `draft` and `sure`, in transformers' format.
    batches: token ids, `batches[call][row]`.
    draft_layers: how many first layers of a synthetic target are its draft; None for a draft model of its own.
    """

    models: Path
    batches: list[list[list[int]]]
    draft_layers: int | None = None

    def settings(self, options) -> dict:
        """What an engine's `load` is told, but for the method and the draft."""
        return {
            "models": str(self.models), "dtype": options.dtype, "draft_layers": self.draft_layers,
            "length": options.length, "threads": options.threads,
        }  # fmt: skip

    def load(self, name: str, dtype: str):
        """One of its models."""
        return specdec.load_model(self.models / name, getattr(torch, dtype), "cpu")


SURE = "sure"  # the name of a draft model that samples nearly greedily


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder to fill, which becomes `folder` at the end, so that one of that name is complete."""
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    part.mkdir(parents=True)
    try:
        yield part
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def prepare(options, exports: Path) -> Workload:
    """The workload of the command line; its models are written below `exports`, unless an earlier run did."""
    return _pair(options, exports) if options.shape == PAIR else _shape(options, exports)


def surer(draft):
    """A copy of a draft model whose logits are four times as large, so that it says with certainty what it guesses.

    With it a rule that accepts what the draft is sure of writes text that is far from the target's."""
    changed = copy.deepcopy(draft)
    changed.model.norm.weight.data.mul_(4)
    return changed


def _pair(options, exports: Path) -> Workload:
    digest = hashlib.sha256(
        b"".join((FOLDER / name / "model.safetensors").read_bytes() for name in ("target", "draft"))
    )
    models = exports / f"pair-{options.dtype}-{digest.hexdigest()[:12]}" / "transformers"
    pair = specdec.load_tiny_pair(getattr(torch, options.dtype))
    if not models.exists():
        with whole_folder(models) as folder:
            for name, model in (("target", pair.target), ("draft", pair.draft), (SURE, surer(pair.draft))):
                model.save_pretrained(folder / name)
                pair.tokenizer.save_pretrained(folder / name)
    texts = [texts[number] for number in range(options.prompts) for texts in pair.prompts.values()]
    ids = pair.tokenizer(texts)["input_ids"]
    batches = [ids[start : start + options.batch] for start in range(0, len(ids) - options.batch + 1, options.batch)]
    if not batches:
        raise ValueError(f"a batch of {options.batch} needs more than {len(ids)} prompts: --prompts")
    return Workload(models, batches)


def _shape(options, exports: Path) -> Workload:
    name = f"{options.shape}-{options.dtype}-{options.draft_layers}-{options.seed}"
    models = exports / name / "transformers"
    if not models.exists():
        dtype = getattr(torch, options.dtype)
        built = build_shape(options.shape, options.draft_layers, "random", dtype, "cpu", options.seed)
        with whole_folder(models) as folder:
            built.target.save_pretrained(folder / "target")
        del built
    vocabulary = specdec.load_model(models / "target", torch.bfloat16, "meta").config.vocab_size
    shape = options.prompts, options.batch, options.prompt_tokens
    ids = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(options.seed))
    return Workload(models, ids.tolist(), options.draft_layers)
