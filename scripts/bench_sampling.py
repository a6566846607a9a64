"""What sampling costs: the device time of a captured round that samples, over the same round greedy.

    python -m scripts.bench_sampling --json scripts/results/sampling_h200.json
    python -m scripts.bench_sampling --shape toy --device cpu --batch 1 2 --prompt 16   # checks the path only

A synthetic control: random weights of a shape, an exact draft, untrained heads, an untrained EAGLE-3 drafter with
dynamic trees of 60 nodes in 6 levels, and untrained DSpark drafters of blocks of 7 with best-first trees of 64 or 16
tokens, the last of the text among them (scripts/generate_bench/models.py, methods.py, untrained.py).
Each round stands still (scripts/generate_bench/rounds.py); rounds of all settings of a method and a plain greedy one
take turns, a ratio is the median of the ratios of replays that follow each other. Settings: "warm" is temperature 0.7,
"top_p" that with top-p 0.9, "penalties" greedy with a repetition penalty of 1.1 and no sequence of 4 tokens twice.
Memory is what capturing the round took from the card.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack

import torch

from scripts.common.entry import run_script
from scripts.generate_bench.methods import drafter_of
from scripts.generate_bench.models import SHAPES, Models, load, prompts
from scripts.generate_bench.rounds import opened
from scripts.generate_bench.untrained import BLOCKS, EAGLE3
from specdec import ModelRunner, SpeculativeGenerator
from specdec.cli.results import hand_over, make_result
from specdec.cuda_graph import CapturedGraph
from specdec.report.terminal import table

PLAIN = "plain"
KINDS = (PLAIN, "chain", "medusa", "tree", EAGLE3, *BLOCKS)
GREEDY = "greedy"
SETTINGS: dict[str, dict] = {
    GREEDY: {}, "warm": {"temperature": 0.7}, "top_p": {"temperature": 0.7, "top_p": 0.9},
    "penalties": {"do_sample": False, "repetition_penalty": 1.1, "no_repeat_ngram_size": 4},
}  # fmt: skip
NEW_TOKENS = 64  # room; rounds stand still


def options_of(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, on_gpu = parser.add_argument, torch.cuda.is_available()
    add("--shape", choices=SHAPES, default="llama-3.1-8b", help="random weights of this shape")
    add("--device", choices=["cpu", "cuda"], default="cuda" if on_gpu else "cpu")
    add("--dtype", default="bfloat16" if on_gpu else "float32", choices=["bfloat16", "float32"])
    add("--batch", type=int, nargs="+", default=[1, 4, 16])
    add("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="of rounds")
    add("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    add("--prompt", type=int, default=128, help="tokens of each prompt")
    add("--length", type=int, default=5, help="γ of the chain")
    add("--draft-layers", type=int, default=2, help="layers of the shape that contribute, which are its draft")
    add("--repeats", type=int, default=30, help="turns of all settings")
    add("--seed", type=int, default=0)
    add("--json", metavar="FILE", help="where the figures go (default: to standard output if that is no terminal)")
    options = parser.parse_args(arguments)
    if min(*options.batch, options.length, options.repeats) < 1 or options.prompt < 8:
        parser.error("batch sizes, --length and --repeats must be at least 1, --prompt at least 8")
    options.model, options.weights, options.acceptance = None, "counting", None
    options.settings = [GREEDY, *(name for name in options.settings if name != GREEDY)]
    return options


class Timed:
    """A captured round with the seconds of its replays; `bytes` is what capturing took."""

    def __init__(self, stack: ExitStack, models: Models, options, kind: str, batch: int, sampling: dict):
        runner = ModelRunner(models.target, mode="graph")  # each round stands in a cache of its own
        generator = SpeculativeGenerator(runner, drafter_of(kind, models, options)[0])
        self._round = stack.enter_context(opened(generator, *prompts(models, options, batch), NEW_TOKENS, **sampling))
        self._cuda, self.seconds = runner.device.type == "cuda", list[float]()
        self._round.whole()  # compiles what is not compiled yet
        free = self._free()
        self._graph = CapturedGraph(self._round.whole, runner.device)
        self.bytes = free - self._free() if self._cuda else self._graph.bytes

    def _free(self) -> int:
        if not self._cuda:
            return 0
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    def run(self, replays: int) -> None:
        """Replay the round, and keep the mean time of one."""
        began = time.perf_counter()
        for _ in range(replays):
            self._graph()
        if self._cuda:
            torch.cuda.synchronize()
        self.seconds.append((time.perf_counter() - began) / replays)


@torch.inference_mode()
def measure(models: Models, options, kind: str, batch: int) -> list[dict]:
    """A row for each setting of one method and batch size."""
    with ExitStack() as stack:
        timed = {name: Timed(stack, models, options, kind, batch, SETTINGS[name]) for name in options.settings}
        plain = Timed(stack, models, options, PLAIN, batch, {})
        every = (plain, *timed.values())
        for turn in range(options.repeats + 2):
            for one in every:
                one.run(3)
            if turn < 2:  # warming up
                for one in every:
                    one.seconds.clear()
    rows = []
    for name, one in timed.items():
        low, ratio, high = over(one, timed[GREEDY])
        plain_low, over_plain, plain_high = over(one, plain)
        rows.append({"method": kind, "batch": batch, "setting": name, "ms": 1e3 * statistics.median(one.seconds),
                     "over_greedy": ratio, "quartiles": [low, high], "over_plain": over_plain,
                     "over_plain_quartiles": [plain_low, plain_high], "capture_bytes": one.bytes})  # fmt: skip
    return rows


def over(one: Timed, other: Timed) -> list[float]:
    """Quartiles of the ratios of replays that follow each other."""
    ratios = [mine / theirs for mine, theirs in zip(one.seconds, other.seconds, strict=True)]
    return statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3


def report(rows: Sequence[dict]) -> str:
    """The table of a result."""
    lines = []
    for row in rows:
        (low, high), (plain_low, plain_high) = row["quartiles"], row["over_plain_quartiles"]
        greedy = f"{row['over_greedy']:.3f} ({low:.3f} … {high:.3f})"
        plain = f"{row['over_plain']:.3f} ({plain_low:.3f} … {plain_high:.3f})"
        lines.append((row["method"], str(row["batch"]), row["setting"], f"{row['ms']:.3f}", greedy, plain,
                      f"{row['capture_bytes'] / 2**20:.0f}"))  # fmt: skip
    return table(("round", "batch", "setting", "ms", "over greedy (quartiles)", "over plain", "MiB"), lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    options = options_of(arguments)  # type: ignore[arg-type]
    models = load(options)
    rows: list[dict] = []
    for kind in options.kinds:
        for batch in options.batch:
            rows += measure(models, options, kind, batch)
            print(report(rows[-len(options.settings) :]), flush=True)
    print("synthetic control: random weights, an exact draft, untrained heads and learned drafters\n" + report(rows))
    settings = {name: value for name, value in vars(options).items() if name != "json"}
    hand_over(make_result("sampling", settings, [], rows), options.json)


if __name__ == "__main__":
    run_script(main)
