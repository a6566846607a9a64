"""What the trainings of the shipped drafters with a network of their own share: texts, two stages, what is measured.

The target continues pieces of the Python standard library, greedily and at another temperature; the drafter learns from
its text, at the end from its greedy text after whole prompts, which is harder to guess. Then the shipped prompts, which
were in neither, are decoded greedily."""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import specdec
from scripts.common.tiny_texts import as_arguments, write_texts
from specdec.info import commit, environment
from specdec.report.stats import pool
from specdec.training.acceptance import LENGTH, decode_prompts
from specdec.training.checkpoint import write_json

TARGET = specdec.tiny_pair.FOLDER / "target"
# fmt: off
PRESETS = {
    "full": dict(
        every=1, texts=24576, length=1024, epochs=12, batch=16, max_new_tokens=192, answer_batch=1024,
        temperatures=("0", "0", "0.7"), whole=2400, whole_epochs=3, whole_batch=4, held_out=96, tokens=128, prompts=8,
        precision="bf16", validate_every=200, validation_prompts=64, validation_tokens=128,
    ),
    "cpu": dict(
        every=1, texts=4096, length=384, epochs=1, batch=4, max_new_tokens=128, answer_batch=64,
        temperatures=("0", "0", "0.7"), whole=800, whole_epochs=1, whole_batch=4, held_out=32, tokens=128, prompts=8,
        precision="no", validate_every=150, validation_prompts=24, validation_tokens=64,
    ),
    "smoke": dict(
        every=40, texts=6, length=128, epochs=1, batch=2, max_new_tokens=8, answer_batch=4,
        temperatures=("0", "0.7"), whole=4, whole_epochs=1, whole_batch=2, held_out=1, tokens=8, prompts=1,
        precision="no", validate_every=10, validation_prompts=1, validation_tokens=8,
    ),
}
# fmt: on


@dataclass(frozen=True, slots=True)
class TinyTraining:
    """How the drafter of one kind is made and measured.

    train: the command line's arguments -> its status.
    options: of the training, `options(preset)`, in both stages; `new`: of a new drafter, in the first.
    save: `save(runner, trained, folder)`: write the drafter that the second stage left, as it ships.
    drafters: `drafters(runner, folder, draft model)` -> what is decoded with, by name.
    """

    train: Callable[[Sequence[str]], int]
    options: Callable[[Mapping], dict]
    new: Mapping
    save: Callable[[specdec.ModelRunner, Path, Path], None]
    drafters: Callable[..., dict[str, specdec.Drafter]]

    def run(self, options: argparse.Namespace, preset: Mapping) -> None:
        """Train, export, measure, and write record.json."""
        work = options.output / "work"
        work.mkdir(parents=True, exist_ok=True)
        write_texts(work, dict(preset), options.seed)
        whole = self._train(options, preset, work)
        pair = specdec.load_tiny_pair(device="cuda" if torch.cuda.is_available() else "cpu")
        self.save(specdec.ModelRunner(pair.target), whole, options.output)
        drafters = lambda target: self.drafters(target, options.output, pair.draft)  # as it ships: from bf16
        found = measure(pair, drafters, preset["prompts"], preset["tokens"])
        log = [json.loads((folder / "log.json").read_text()) for folder in (work, whole)]
        record = {
            "tokens_per_round": found, "settings": dict(preset), "lr": options.lr, "seed": options.seed,
            "log": [[record for record in records if LENGTH in record] for records in log],
            "environment": environment(), "git_sha": commit(),
        }  # fmt: skip
        write_json(record, options.output / "record.json")
        print(json.dumps(found, indent=1))

    def _train(self, options: argparse.Namespace, preset: Mapping, work: Path) -> Path:
        """Train on pieces of texts, then on whole prompts. Returns the folder of the finished drafter."""
        whole = work / "whole"
        common = dict(
            model=TARGET, self_distil=True, dtype="float32", length=preset["length"], precision=preset["precision"],
            seed=options.seed, validate_every=preset["validate_every"], save_every=50,
            validation_prompts=preset["validation_prompts"], validation_tokens=preset["validation_tokens"],
        ) | self.options(preset)  # fmt: skip
        pieces = dict(
            data=work / "training.jsonl", output=work, temperature=preset["temperatures"], lr=options.lr,
            epochs=preset["epochs"], batch=preset["batch"], rows_at_once=preset["batch"],
            max_new_tokens=preset["max_new_tokens"], answer_batch=preset["answer_batch"],
        ) | self.new  # fmt: skip
        after_whole = dict(
            start=work, data=work / "whole.jsonl", output=whole, temperature=0, lr=options.lr / 4,
            epochs=preset["whole_epochs"], batch=preset["whole_batch"], rows_at_once=preset["whole_batch"],
            prompt_tokens=preset["length"] // 2, max_new_tokens=preset["tokens"], answer_batch=64,
        )  # fmt: skip
        for stage in (pieces, after_whole):
            if self.train(as_arguments(**common, **stage)):
                raise SystemExit("the training failed, see above; the same command goes on")
        return whole


def measure(pair: specdec.TinyPair, drafters: Callable[[specdec.ModelRunner], Mapping[str, specdec.Drafter]],
            count: int, tokens: int) -> dict[str, dict[str, float | None]]:  # fmt: skip
    """Tokens per round on `count` shipped prompts of each kind and over all, `{drafter: {kind: value}}`."""
    target = specdec.ModelRunner(pair.target, mode="eager")
    prompts = {kind: pair.tokenizer(texts[:count]).input_ids for kind, texts in pair.prompts.items()}
    found: dict[str, dict[str, float | None]] = {}
    for name, one in drafters(target).items():
        stats = {kind: decode_prompts(target, one, some, tokens) for kind, some in prompts.items()}
        found[name] = {kind: each.tokens_per_round for kind, each in stats.items()}
        found[name]["all"] = pool(list(stats.values())).tokens_per_round
    return found


def options_of(about: str | None, arguments: Sequence[str] | None, lr: float = 2e-3) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)
