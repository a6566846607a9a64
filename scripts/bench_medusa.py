"""Train a target, Medusa heads and a draft model on the spot on real source code, then decode held-out prompts beside
plain decoding.

    python -m scripts.bench_medusa --output runs/medusa --json scripts/results/medusa_h200.json  # half an hour on one
    H200 python -m scripts.bench_medusa --output runs/smoke --preset smoke --device cpu               # seconds: checks
    the path, says nothing

Stages: corpus and tokenizer, target, heads, draft model, calibration of the tree, evaluation. Each resumes where an
interrupted run stopped. Whole packages are held out: prompts come from them alone, those of the calibration from other
files than those of the evaluation. Every prompt is decoded by all methods one after the other, in `--repeats` passes
over all prompts; of each prompt the pass of median time counts. With `--seconds` a run that would outlast its machine
writes the result of what it has and goes on when it is started again; more passes can be asked for likewise."""

import argparse
import hashlib
import json
import random
import time
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer
from transformers.utils import logging

from medusa import MedusaGenerator, MedusaHeads, calibrated_tree, head_ranks
from medusa.calibration import reached
from medusa.settings import TrainingSettings
from medusa.training import train_medusa
from scripts.common.result_files import git_sha
from scripts.common.side_by_side import ALL, OURS, PLAIN, differences, records, run_all, show, summarise
from scripts.common.tiny_corpus import SKIPPED_PARTS, build_prompts, edit_documents, load_corpus
from scripts.common.training_loop import train
from scripts.train_tiny_pair import build_model, distillation, export, held_out_loss, rows_of, tokenize, train_tokenizer
from specdec import AutoregressiveGenerator, ModelDrafter, SpeculativeGenerator
from specdec.info import environment
from specdec.loading import load_model
from specdec.model.runner import MODES
from specdec.planning.costs import measure_costs
from specdec.report.terminal import table
from specdec.training.checkpoint import refuse_other_settings, write_json
from specdec.training.data import Rows, build_rows
from specdec.trees.tree import TokenTree

HELD_OUT = (
    "networkx",
    "pandas",
    "optax",
    "botorch",
    "rich",
    "jinja2",
    "requests",
    "sklearn",
    "pygments",
)  # copies of them, vendored by others, are left out
TEMPERATURES, TREE_SIZE, TOPS = (0.0, 0.7), 64, (1, 5, 10)
MEDUSA, DRAFT, GAMMA = "specdec Medusa", "specdec draft model", 5
PRESETS = {
    # prompt_files: held-out files that prompts come from, half of them for calibration; edit_every: of every so many
    # files, one gives edit examples
    "full": dict(
        max_bytes=120_000_000,
        tokenizer_bytes=20_000_000,
        vocab_size=16384,
        context=1024,
        edit_every=20,
        prompt_files=600,
        target=dict(
            hidden_size=1024,
            intermediate_size=2816,
            num_hidden_layers=26,
            num_attention_heads=16,
            num_key_value_heads=8,
        ),
        parameters_at_least=300_000_000,
        target_batch=64,
        target_steps=600,
        target_lr=6e-4,
        heads=5,
        heads_batch=32,
        rows_at_once=32,
        heads_steps=600,
        heads_lr=1e-3,
        validation_rows=36,
        draft=dict(
            hidden_size=768, intermediate_size=2048, num_hidden_layers=3, num_attention_heads=12, num_key_value_heads=4
        ),
        draft_batch=32,
        draft_steps=500,
        draft_lr=1e-3,
        calibration_prompts=16,
        prompts=8,
        tokens=128,
        repeats=3,
    ),
    "smoke": dict(
        max_bytes=400_000,
        tokenizer_bytes=200_000,
        vocab_size=512,
        context=512,
        edit_every=2,
        prompt_files=60,
        target=dict(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
        ),
        parameters_at_least=0,
        target_batch=2,
        target_steps=6,
        target_lr=3e-3,
        heads=5,
        heads_batch=2,
        rows_at_once=2,
        heads_steps=4,
        heads_lr=1e-3,
        validation_rows=2,
        draft=dict(
            hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
        ),
        draft_batch=2,
        draft_steps=4,
        draft_lr=3e-3,
        calibration_prompts=2,
        prompts=2,
        tokens=16,
        repeats=1,
    ),
}


def stage(folder, name, make):
    """What `make()` returns, a dictionary, with the seconds it took; from `folder`/name.json where an earlier run
    finished the stage.
    """
    path = folder / f"{name}.json"
    if not path.exists():
        began = time.perf_counter()
        write_json({**make(), "seconds": time.perf_counter() - began}, path)
    record = json.loads(path.read_text())
    print(f"{name}: {record['seconds']:.1f} s", flush=True)
    return record


def prompts_from(files, per_kind, seed):
    """`({kind: prompts}, the kinds of which the files give too few)`."""
    kinds, left_out = ["code", "prose", "data", "editing"], []
    while kinds:
        try:
            return build_prompts(files, per_kind, seed, kinds), left_out
        except ValueError as error:
            left_out += [kind for kind in kinds if f" {kind} prompts" in str(error)]
            kinds.remove(left_out[-1])
    raise ValueError(f"no kind of prompts could be made {per_kind} times from {len(files)} held-out files")


def within(texts, size):
    """How many of `texts`, from the first on, fit into `size` bytes.

    >>> within(["ab", "cd", "e"], 4)
    2
    """
    return sum(total <= size for total in accumulate(len(text.encode()) for text in texts))


def make_corpus(preset, packages, stdlib, folder, seed):
    """Read and split the source, train the tokenizer, tokenise everything, choose the prompts."""
    names = [name for name in HELD_OUT if (packages / name).is_dir()]
    if not names:
        raise FileNotFoundError(f"{packages} holds none of the packages to evaluate on: {', '.join(HELD_OUT)}")
    began = time.perf_counter()
    files, held_out = load_corpus(
        packages, lambda path: bool(set(names) & set(path.split("/")[:-1])), SKIPPED_PARTS | {"tests", "test"}
    )
    kept_back, rng = {text for _, text in held_out}, random.Random(seed)
    held_out = [
        (path, text) for path, text in held_out if path.split("/")[0] in names
    ]  # a vendored copy would be a second time the same
    files += [(f"stdlib/{path}", text) for path, text in load_corpus(stdlib)[0] if text not in kept_back]
    rng.shuffle(files)
    chosen = files[: within([text for _, text in files], preset["max_bytes"])]
    texts = [text for _, text in chosen] + edit_documents(chosen[:: preset["edit_every"]], seed, share=0.6)
    print(f"{len(files)} files read, {len(chosen)} chosen, {time.perf_counter() - began:.1f} s", flush=True)

    rng.shuffle(texts)
    sample = texts[: within(texts, preset["tokenizer_bytes"])]
    tokenizer = train_tokenizer(sample, folder / "target", preset["vocab_size"])
    print(
        f"tokenizer of {len(tokenizer)} tokens from {len(sample)} texts, {time.perf_counter() - began:.1f} s",
        flush=True,
    )
    rng.shuffle(held_out)
    asked = held_out[: preset["prompt_files"]]
    tokens = {}
    for name, part in (("train", texts), ("held_out", [text for _, text in asked])):
        stream = np.concatenate([tokenize(part[i : i + 2048], tokenizer) for i in range(0, len(part), 2048)])
        np.save(folder / f"{name}.npy", stream)
        tokens[name] = len(stream)
    evaluation, left_out = prompts_from(asked[0::2], preset["prompts"], seed)
    calibration, _ = prompts_from(asked[1::2], preset["calibration_prompts"], seed)
    write_json({"evaluation": evaluation, "calibration": calibration}, folder / "prompts.json")
    return {
        "files": len(chosen),
        "bytes": sum(len(text.encode()) for text in texts),
        "tokens": tokens["train"],
        "sha256": hashlib.sha256("".join(texts).encode()).hexdigest(),
        "held_out_packages": names,
        "held_out_files": len(held_out),
        "held_out_tokens": tokens["held_out"],
        "vocab_size": len(tokenizer),
        "prompts": {kind: [prompt["source"] for prompt in prompts] for kind, prompts in evaluation.items()},
        "kinds_left_out": left_out,
        "calibration_prompts": {kind: len(prompts) for kind, prompts in calibration.items()},
    }


def make_target(preset, folder, tokenizer, device, seed):
    """Next-token training on random windows; exported in bf16."""
    stream, held_out = (np.load(folder / f"{name}.npy") for name in ("train", "held_out"))
    model = build_model(preset["target"], len(tokenizer), preset["context"], seed).to(device)
    parameters, steps = model.num_parameters(), preset["target_steps"]
    print(
        f"target of {parameters:,} parameters, {len(stream):,} training tokens, {len(held_out):,} held out", flush=True
    )
    if parameters < preset["parameters_at_least"]:
        raise ValueError(
            f"the target must have at least {preset['parameters_at_least']:,} parameters, got {parameters:,}"
        )
    forward = torch.compile(model) if device.type == "cuda" else model

    def loss_of(step):
        starts = np.random.default_rng([seed, 1, step]).integers(
            0, len(stream) - preset["context"], preset["target_batch"]
        )
        x = rows_of(stream, starts, preset["context"], device)
        return forward(x, labels=x, use_cache=False).loss

    def evaluate():
        return {"held_out_loss": round(held_out_loss(model, held_out, preset["context"], device), 4)}

    log = train(
        model,
        loss_of,
        steps=steps,
        lr=preset["target_lr"],
        checkpoint=folder / "target.pt",
        evaluate=evaluate,
        save_every_s=120.0,
        log_every=max(5, steps // 12),
    )
    export(model, folder / "target")
    (folder / "target.pt").unlink()  # gigabytes that nothing reads any more
    seen = steps * preset["target_batch"] * preset["context"]
    return {"parameters": parameters, "held_out_loss": log[-1]["held_out_loss"], "tokens_seen": seen, "log": log}


def windows(stream, count, length, seed):
    """`count` windows of a token stream, none twice, as training rows that are learned everywhere."""
    starts = np.random.default_rng(seed).permutation(len(stream) // length)[:count] * length
    tokens = torch.from_numpy(np.stack([stream[start : start + length] for start in starts]).astype(np.int32))
    return Rows(tokens, tokens, torch.zeros_like(tokens))


def make_heads(preset, model, folder, seed):
    """Medusa-1: heads in float32 on the frozen target; saved in the target's dtype."""
    from accelerate import Accelerator

    stream, held_out = (np.load(folder / f"{name}.npy") for name in ("train", "held_out"))
    rows = windows(stream, preset["heads_steps"] * preset["heads_batch"], preset["context"], [seed, 2])
    validation = windows(held_out, preset["validation_rows"], preset["context"], [seed, 3])
    settings = TrainingSettings(
        preset["heads_steps"],
        preset["heads_batch"],
        preset["rows_at_once"],
        preset["heads_lr"],
        seed=seed,
        save_every=250,
        log_every=max(1, preset["heads_steps"] // 20),
        validate_every=preset["heads_steps"],
    )
    heads = MedusaHeads.for_model(model, preset["heads"]).float()
    accelerator = Accelerator(mixed_precision="bf16") if model.device.type == "cuda" else None
    log = train_medusa(model, heads, rows, folder / "heads_work", settings, validation, accelerator, progress=False)
    heads.to(model.dtype).save_pretrained(folder / "heads")
    accuracies = {
        f"top_{top}": [log[-1].pop(f"head_{head}_top_{top}") for head in range(preset["heads"])] for top in TOPS
    }
    return {
        "parameters": sum(p.numel() for p in heads.parameters()),
        "accuracies": accuracies,
        "tokens_seen": rows.tokens.numel(),
        "log": log,
    }


def make_draft(preset, target, folder, tokenizer, seed):
    """A draft model distilled from the target on random windows; exported in bf16."""
    stream, held_out = (np.load(folder / f"{name}.npy") for name in ("train", "held_out"))
    device, steps = target.device, preset["draft_steps"]
    model = build_model(preset["draft"], len(tokenizer), preset["context"], seed + 1).to(device)
    loss_on = distillation(model, target)

    def loss_of(step):
        starts = np.random.default_rng([seed, 4, step]).integers(
            0, len(stream) - preset["context"], preset["draft_batch"]
        )
        return loss_on(rows_of(stream, starts, preset["context"], device))

    def evaluate():
        return {"held_out_loss": round(held_out_loss(model, held_out, preset["context"], device), 4)}

    log = train(
        model,
        loss_of,
        steps=steps,
        lr=preset["draft_lr"],
        checkpoint=folder / "draft.pt",
        evaluate=evaluate,
        save_every_s=120.0,
        log_every=max(4, steps // 12),
    )
    export(model, folder / "draft")
    (folder / "draft.pt").unlink()
    seen = steps * preset["draft_batch"] * preset["context"]
    return {
        "parameters": model.num_parameters(),
        "held_out_loss": log[-1]["held_out_loss"],
        "tokens_seen": seen,
        "log": log,
    }


def make_calibration(preset, model, heads, tokenizer, folder, mode):
    """Accuracies on what the target writes greedily, costs on this machine in this mode, and the tree that follows."""
    ours = AutoregressiveGenerator(model, mode=mode)
    prompts = json.loads((folder / "prompts.json").read_text())["calibration"]
    batch = tokenizer(
        [prompt["text"] for chosen in prompts.values() for prompt in chosen], return_tensors="pt", padding=True
    ).to(model.device)
    out = ours.generate(batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=preset["tokens"])
    width, texts = batch.input_ids.shape[1], []
    for tokens, asked, length in zip(
        out.sequences.tolist(), batch.attention_mask.sum(1).tolist(), out.lengths.tolist(), strict=True
    ):
        texts.append({"tokens": tokens[width - asked : width + length], "learned_from": asked})
    found = head_ranks(heads, model, build_rows(texts, tokenizer, preset["context"], packing=False))
    costs = measure_costs(ours.target)
    tree = calibrated_tree(found, TREE_SIZE, costs)
    return {
        "texts": len(texts),
        "accuracies": found.accuracies(),
        "costs": asdict(costs),
        "nodes": tree.size,
        "depth": tree.max_depth,
        "expected_tokens_per_round": sum(reached(tree, found)),
        "choices": tree.choices,
    }


def bars(rows):
    """What is asked, and what was measured; batch 1, greedy, over all kinds."""
    of = {(row["method"], row["kind"]): row for row in rows if (row["batch"], row["temperature"]) == (1, 0.0)}
    row, draft = of[MEDUSA, ALL], of.get((DRAFT, "code"))
    judged = [
        ("tokens per round, greedy, batch 1", row["tokens_per_round"], 2.2),
        ("wall clock over our autoregressive generator, greedy, batch 1", row["over_ours"]["pooled"], 1.7),
        ("wall clock over transformers generate, greedy, batch 1", row["over_transformers"]["pooled"], 1.7),
    ]
    if draft is not None:
        judged.append(
            (
                f"draft model, γ {GAMMA}: wall clock over our autoregressive generator, greedy, batch 1, code",
                draft["over_ours"]["pooled"],
                2.0,
            )
        )
    return [{"what": what, "value": value, "at_least": asked, "met": value >= asked} for what, value, asked in judged]


def options_of(arguments):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for checkpoints and everything measured")
    parser.add_argument(
        "--packages",
        type=Path,
        default=Path(torch.__file__).parents[1],
        help="folder of Python packages (default: torch's)",
    )
    parser.add_argument("--stdlib", type=Path, help="standard library source (default: this interpreter's)")
    parser.add_argument("--preset", choices=PRESETS, default="full")
    for name, what in (
        ("max-bytes", "bytes of source"),
        ("target-steps", "steps of its training"),
        ("heads-steps", "steps of theirs"),
        ("prompts", "prompts of each kind"),
        ("repeats", "passes over all prompts"),
    ):
        parser.add_argument(f"--{name}", type=int, metavar="N", help=f"{what} (default: the preset's)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=float("inf"),
        help="begin to decode no further prompt after so many seconds of this run",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--mode",
        choices=MODES,
        default="graph" if torch.cuda.is_available() else "eager",
        help="of our generators; each has a calibration and passes of its own",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="the result (default: result-MODE.json in the output folder)"
    )
    return parser.parse_args(arguments)


def main(arguments=None):
    """Run all stages; see the module's docstring."""
    began, options = time.perf_counter(), options_of(arguments)
    folder, device, seed = options.output, torch.device(options.device), options.seed
    preset = {name: vars(options).get(name) or value for name, value in PRESETS[options.preset].items()}
    repeats = preset.pop("repeats")  # more can be asked for later
    folder.mkdir(parents=True, exist_ok=True)
    refuse_other_settings(
        folder / "settings.json",
        {"settings": preset, "seed": seed, "packages": str(options.packages), "stdlib": str(options.stdlib)},
    )
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_float32_matmul_precision("high")
    if device.type == "cpu":
        torch.set_num_threads(1)

    corpus = stage(folder, "corpus", lambda: make_corpus(preset, options.packages, options.stdlib, folder, seed))
    tokenizer = AutoTokenizer.from_pretrained(folder / "target")
    target = stage(folder, "target", lambda: make_target(preset, folder, tokenizer, device, seed))
    model = load_model(folder / "target", torch.bfloat16 if device.type == "cuda" else torch.float32, device)
    training = stage(folder, "heads", lambda: make_heads(preset, model, folder, seed))
    heads = MedusaHeads.from_pretrained(folder / "heads", model.dtype).to(device)
    drafting = stage(folder, "draft", lambda: make_draft(preset, model, folder, tokenizer, seed))
    draft = load_model(folder / "draft", model.dtype, device)
    calibration = stage(
        folder,
        f"calibration-{options.mode}",
        lambda: make_calibration(preset, model, heads, tokenizer, folder, options.mode),
    )

    ours, tree = (
        AutoregressiveGenerator(model, mode=options.mode),
        TokenTree.from_choices([tuple(path) for path in calibration["choices"]]),
    )
    methods = {PLAIN: model.generate, OURS: ours.generate, MEDUSA: MedusaGenerator(ours.target, heads, tree).generate,
               DRAFT: SpeculativeGenerator(ours.target, ModelDrafter(draft, GAMMA)).generate}  # fmt: skip
    asked = json.loads((folder / "prompts.json").read_text())["evaluation"]
    prompts = {kind: [prompt["text"] for prompt in chosen] for kind, chosen in asked.items()}
    runs, complete = run_all(
        methods,
        tokenizer,
        prompts,
        TEMPERATURES,
        preset["tokens"],
        repeats,
        folder / f"runs-{options.mode}.jsonl",
        device,
        seed,
        began + options.seconds,
    )
    if not runs:
        raise SystemExit(
            f"no prompt was begun within --seconds {options.seconds:g}; the stages before are done, run again to go on"
        )
    rows = summarise(runs, methods, TEMPERATURES, prompts)
    found = differences(
        model, tokenizer, runs, prompts, [(MEDUSA, OURS), (MEDUSA, PLAIN), (OURS, PLAIN), (DRAFT, OURS)]
    )
    judged = bars(rows)
    show(rows, found)
    print(
        "\n"
        + table(
            ["figure", "asked", "measured", ""],
            [
                [bar["what"], f">= {bar['at_least']:g}", f"{bar['value']:.2f}", "met" if bar["met"] else "NOT MET"]
                for bar in judged
            ],
        )
    )
    stages = {"corpus": corpus, "target": target, "heads": training, "draft": drafting, "calibration": calibration}
    seconds = {name: record.pop("seconds") for name, record in stages.items()} | {
        "evaluation": sum(run["seconds"] for run in runs)
    }
    print(
        "\nseconds: "
        + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
        + ("" if complete else "; the evaluation is NOT complete")
    )
    settings = {
        "preset": options.preset,
        **preset,
        "mode": options.mode,
        "temperatures": TEMPERATURES,
        "repeats": repeats,
    }
    settings |= {"tree_size": TREE_SIZE, "seed": seed}
    versions = environment()
    result = {
        "schema": 1,
        "environment": versions,
        "device": versions["device"],
        "git_sha": git_sha(),
        "settings": settings,
        **stages,
        "rows": rows,
        "differences": found,
        "bars": judged,
        "prompts": records(runs),
        "complete": complete,
        "seconds": seconds,
    }
    path = options.json or folder / f"result-{options.mode}.json"
    write_json(result, path)


if __name__ == "__main__":
    main()
