"""Generate texts for large sets of prompts on many machines: Ray Data hands blocks of prompts to engines, one a worker.

    # 2 workers on this machine; each line is {"prompt": "…"}, other fields are kept
    python -m scripts.generate_with_ray prompts.jsonl texts --target DIR_OR_HUB_ID --workers 2
    # a draft model, 4 GPUs of a cluster that RAY_ADDRESS names
    python -m scripts.generate_with_ray s3://prompts/ s3://texts/ --target DIR --drafter model:path=DRAFT \\
        --workers 4 --device cuda --dtype bfloat16

Each line gets "text", "tokens" (ids), "reason" ("end", "length" or "error") and "error" (None, or why this prompt
failed; the others go on); fields of these names are replaced. A field "seed" makes a sampled text repeat, whichever
worker draws it; texts without one are independent. Needs the extra `ray`."""

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np

from scripts.common.entry import one_line, run_script
from specdec.cli.command import DTYPES

ADDED = ("text", "tokens", "reason", "error")


class EngineWorker:
    """An actor of `ray.data.Dataset.map_batches`: an engine that outlives the batches that it is given.

    target: folder or hub id. drafter: as of `specdec generate --drafter` (None: none). memory: of its caches in bytes
    (None: the engine's default). options: those of `Engine.submit` for every prompt."""

    def __init__(self, target: str, drafter: str | None = None, dtype: str = "auto", device: str = "cpu",
                 memory: int | None = None, options: dict[str, Any] | None = None):  # fmt: skip
        from transformers import AutoTokenizer

        import specdec
        from specdec.cli.kinds import make_drafter
        from specdec.loading import load_model

        runner = specdec.ModelRunner(load_model(target, DTYPES[dtype], device))
        made = None if drafter is None else make_drafter(drafter, runner)
        tokenizer = AutoTokenizer.from_pretrained(target)
        self.engine = specdec.Engine(runner, made, memory=memory, tokenizer=tokenizer)
        self._options = dict(options or {})

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """Columns of a batch, of which "prompt" is read, and "seed" if there is one -> the same and ADDED."""
        if "prompt" not in batch:
            raise ValueError(f"prompts have a field prompt, got {', '.join(batch)}")
        prompts = batch["prompt"].tolist()
        seeds = batch["seed"].tolist() if "seed" in batch else [None] * len(prompts)
        handles = [self._submitted(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        for _ in self.engine.run():
            pass
        found = [
            ("", [], "error", one_line(one)) if isinstance(one, Exception)
            else (one.text, one.tokens, one.reason, None if one.error is None else one_line(one.error))
            for one in handles
        ]  # fmt: skip
        columns = {name: np.empty(len(found), dtype=object) for name in ADDED}
        for place, values in enumerate(found):
            for name, value in zip(ADDED, values, strict=True):
                columns[name][place] = value
        return batch | columns

    def _submitted(self, prompt: Any, seed: Any):
        """The handle of a prompt, or what is wrong with it."""
        try:
            if not isinstance(prompt, str):
                raise ValueError(f"a prompt is a text, got {prompt!r}")
            seed = None if seed is None or seed != seed else int(seed)  # a missing number is NaN in a column
            return self.engine.submit(prompt, seed=seed, **self._options)
        except (ValueError, TypeError, OverflowError) as error:
            return error


def main(arguments: Sequence[str] | None = None) -> None:
    """Read prompts, generate, write texts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", help="JSON lines with a prompt each: a file, a folder or an address that Ray reads")
    parser.add_argument("texts", help="folder or address for JSON lines")
    parser.add_argument("--target", required=True, help="folder or hub id")
    parser.add_argument("--drafter", help="as of `specdec generate`, such as model:path=DIR")
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        help="engines; Ray needs a CPU beside theirs",
    )
    parser.add_argument("--batch", type=int, default=256, help="prompts that an engine gets at once")
    parser.add_argument("--memory", type=int, metavar="BYTES", help="of each engine's caches")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="auto")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, help="sample at it (default: greedy)")
    options = parser.parse_args(arguments)
    if min(options.workers, options.batch, options.max_new_tokens) < 1:
        parser.error("--workers, --batch and --max-new-tokens must be at least 1")
    if not (options.temperature is None or options.temperature > 0) or (options.memory or 1) < 1:
        parser.error(f"--temperature and --memory must be above 0, got {options.temperature} and {options.memory}")
    import ray

    sampling = dict(do_sample=False) if options.temperature is None else dict(
        do_sample=True, temperature=options.temperature)  # fmt: skip
    worker = dict(
        target=options.target, drafter=options.drafter, dtype=options.dtype, device=options.device,
        memory=options.memory, options=sampling | {"max_new_tokens": options.max_new_tokens},
    )  # fmt: skip
    made = ray.data.read_json(options.prompts, lines=True).map_batches(
        EngineWorker, fn_constructor_kwargs=worker, batch_size=options.batch,
        compute=ray.data.ActorPoolStrategy(size=options.workers), num_gpus=1 if options.device == "cuda" else 0,
    )  # fmt: skip
    made.write_json(options.texts)


if __name__ == "__main__":
    run_script(main)
