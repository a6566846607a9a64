"""Train the EAGLE-3 drafter that ships with the library: self-distilled, measured on held-out prompts.

    python -m scripts.train_tiny_eagle3 --output runs/tiny_eagle3                  # twenty minutes on one core
    python -m scripts.train_tiny_eagle3 --output runs/tiny_eagle3 --preset full    # on one GPU
    python -m scripts.train_tiny_eagle3 --output runs/smoke --preset smoke         # checks the path, not the drafter

The target continues pieces of the Python standard library, greedily and at another temperature; the drafter learns from
its text (`scripts.train_eagle3`), at the end from its greedy text after whole prompts, which is harder to guess. Then
the shipped prompts, which were in neither, are decoded greedily with it, with the shipped Medusa heads and with the
shipped draft model. The figures go to record.json.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

import specdec
from medusa import MedusaDrafter
from medusa.tiny_heads import load_tiny_heads
from scripts import train_eagle3
from scripts.common.entry import run_script
from scripts.common.tiny_texts import as_arguments, write_texts
from specdec.drafters.eagle3.drafter import Eagle3Drafter
from specdec.drafters.eagle3.loading import load_eagle3
from specdec.drafters.eagle3.saving import save_drafter
from specdec.info import commit, environment
from specdec.report.stats import pool
from specdec.training.acceptance import decode_prompts
from specdec.training.checkpoint import write_json
from specdec.trees.tree import TokenTree

# fmt: off
PRESETS = {
    "full": dict(
        every=1, texts=24576, length=1024, epochs=12, batch=16, max_new_tokens=192, answer_batch=1024,
        temperatures=("0", "0", "0.7"), whole=2400, whole_epochs=3, whole_batch=4, held_out=96, tokens=128, prompts=8,
        precision="bf16", depth=5, validate_every=200, validation_prompts=64, validation_tokens=128,
    ),
    "cpu": dict(
        every=1, texts=4096, length=384, epochs=1, batch=4, max_new_tokens=128, answer_batch=64,
        temperatures=("0", "0", "0.7"), whole=800, whole_epochs=1, whole_batch=4, held_out=32, tokens=128, prompts=8,
        precision="no", depth=3, validate_every=150, validation_prompts=24, validation_tokens=64,
    ),
    "smoke": dict(
        every=40, texts=6, length=128, epochs=1, batch=2, max_new_tokens=8, answer_batch=4,
        temperatures=("0", "0.7"), whole=4, whole_epochs=1, whole_batch=2, held_out=1, tokens=8, prompts=1,
        precision="no", depth=2, validate_every=10, validation_prompts=1, validation_tokens=8,
    ),
}
# fmt: on
NUM_TOKENS, DRAFT_VOCABULARY, INTERMEDIATE = 5, 3072, 768
SEVERAL = TokenTree.from_widths((5, 2, 1))


def train(options: argparse.Namespace, preset: dict, work: Path, model: str) -> Path:
    """Train on pieces of texts, then on whole prompts. Returns the folder of the finished drafter."""
    whole = work / "whole"
    common = dict(
        model=model, self_distil=True, dtype="float32", length=preset["length"], precision=preset["precision"],
        seed=options.seed, depth=preset["depth"], num_tokens=NUM_TOKENS, validate_every=preset["validate_every"],
        validation_prompts=preset["validation_prompts"], validation_tokens=preset["validation_tokens"], save_every=50,
    )  # fmt: skip
    pieces = dict(
        data=work / "training.jsonl", output=work, temperature=preset["temperatures"], lr=options.lr,
        draft_vocabulary=DRAFT_VOCABULARY, intermediate_size=INTERMEDIATE, epochs=preset["epochs"],
        batch=preset["batch"], rows_at_once=preset["batch"], max_new_tokens=preset["max_new_tokens"],
        answer_batch=preset["answer_batch"],
    )  # fmt: skip
    after_whole = dict(
        start=work, data=work / "whole.jsonl", output=whole, temperature=0, lr=options.lr / 4,
        epochs=preset["whole_epochs"], batch=preset["whole_batch"], rows_at_once=preset["whole_batch"],
        prompt_tokens=preset["length"] // 2, max_new_tokens=preset["tokens"], answer_batch=64,
    )  # fmt: skip
    for stage in (pieces, after_whole):
        if train_eagle3.main(as_arguments(**common, **stage)):
            raise SystemExit("the training failed, see above; the same command goes on")
    return whole


def drafters(target: specdec.ModelRunner, drafter: Path, draft) -> dict[str, specdec.Drafter]:
    """What is measured beside each other, by name."""
    network, _ = load_eagle3(target, drafter)
    heads, tree = load_tiny_heads(target.dtype, target.device)
    return {
        f"EAGLE-3, chain of {NUM_TOKENS}": Eagle3Drafter(network, NUM_TOKENS),
        f"EAGLE-3, tree of {SEVERAL.size} nodes": Eagle3Drafter(network, tree=SEVERAL),
        "EAGLE-3, dynamic trees of 26 nodes": Eagle3Drafter(network, dynamic=(25, 5, 4)),
        f"Medusa, calibrated tree of {tree.size} nodes": MedusaDrafter(heads, tree),
        f"Medusa, chain of {NUM_TOKENS}": MedusaDrafter(heads, TokenTree.chain(NUM_TOKENS)),
        f"draft model, chain of {NUM_TOKENS}": specdec.ModelDrafter(draft, NUM_TOKENS),
    }


def measure(pair: specdec.TinyPair, drafter: Path, count: int, tokens: int) -> dict[str, dict[str, float | None]]:
    """Tokens per round on `count` shipped prompts of each kind and over all, `{drafter: {kind: value}}`."""
    target = specdec.ModelRunner(pair.target, mode="eager")
    prompts = {kind: pair.tokenizer(texts[:count]).input_ids for kind, texts in pair.prompts.items()}
    found: dict[str, dict[str, float | None]] = {}
    for name, one in drafters(target, drafter, pair.draft).items():
        stats = {kind: decode_prompts(target, one, some, tokens) for kind, some in prompts.items()}
        found[name] = {kind: each.tokens_per_round for kind, each in stats.items()}
        found[name]["all"] = pool(list(stats.values())).tokens_per_round
    return found


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, export, measure; see the module's docstring."""
    options = options_of(arguments)
    preset, work = PRESETS[options.preset], options.output / "work"
    work.mkdir(parents=True, exist_ok=True)
    write_texts(work, preset, options.seed)
    whole = train(options, preset, work, str(specdec.tiny_pair.FOLDER / "target"))

    pair = specdec.load_tiny_pair(device="cuda" if torch.cuda.is_available() else "cpu")
    trained, _ = load_eagle3(specdec.ModelRunner(pair.target), whole, dtype=torch.bfloat16)
    save_drafter(trained, options.output, num_tokens=NUM_TOKENS, target="specdec/tiny_pair/target")
    found = measure(pair, options.output, preset["prompts"], preset["tokens"])  # as it ships: from bf16
    log = [json.loads((folder / "log.json").read_text()) for folder in (work, whole)]
    record = {
        "tokens_per_round": found, "settings": preset, "lr": options.lr, "seed": options.seed,
        "log": [[record for record in records if "tokens_per_round" in record] for records in log],
        "environment": environment(), "git_sha": commit(),
    }  # fmt: skip
    write_json(record, options.output / "record.json")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    run_script(main)
