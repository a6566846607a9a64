"""What growing a best-first tree out of one block's logits takes, captured, without the block's own pass.

    python -m scripts.bench_best_first --json FILE              # on a GPU
    python -m scripts.bench_best_first --vocabulary 500 --nodes 8 --rank 4 --json FILE   # checks the path on a CPU

Random unary logits of 7 slots, and random matrices W1 and W2 of which W2 W1[t] is added after token t ("conditional"),
or not ("marginal"). "exact" looks at the whole vocabulary and finds the likeliest nodes; "fast" is `Growth.fast`. A
time is the median of CUDA-graph replays (scripts/common/gpu_timing.py); `tables` is that of what rules and attention
read of the grown trees, on top; `share` that of growing in a plain step of `--step-ms`."""

import argparse
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from scripts.common.entry import run_script
from scripts.common.gpu_timing import time_graph, time_on_cpu
from specdec.cli.results import hand_over, make_result
from specdec.drafters.block.best_first import best_first
from specdec.drafters.block.growth import Growth
from specdec.drafters.block.scoring import SlotScores
from specdec.drafters.block.slots import Factors, SlotState
from specdec.report.terminal import table
from specdec.requests.batch import Batch
from specdec.sampling.processors import Processors
from specdec.trees.draft import Draft
from specdec.trees.tensors import as_words

CALLS = 4  # trees in one graph
GROWTHS = {"exact": Growth, "fast": Growth.fast}


class RandomBlock:
    """The part of a `SlotState` that trees grow out of, with random weights; without `rank` one of marginals."""

    ids = None

    def __init__(self, rows: int, slots: int, vocabulary: int, rank: int, device: torch.device, dtype: torch.dtype):
        normal = lambda *shape: torch.randn(*shape, device=device, dtype=dtype)
        self.unary, self.w1 = 2 * normal(rows, slots, vocabulary), normal(vocabulary, max(1, rank))
        self.w2 = normal(vocabulary, rank) / rank**0.5 if rank else None

    def slots(self, batch: Batch) -> Tensor:
        """See `SlotState`."""
        return self.unary

    def conditional(self, level: int, tokens: Tensor, among: Tensor | None = None,
                    above: Tensor | None = None) -> Tensor:  # fmt: skip
        """See `SlotState`."""
        own = self.unary[:, level, None]
        if among is not None:
            own = own.gather(2, among[:, None])
        if self.w2 is None:
            return own
        follow = self.w1[tokens]
        return own + (follow @ self.w2.T if among is None else follow @ self.w2[among].mT)

    def factors(self, level: int, tokens: Tensor) -> Factors | None:
        """See `SlotState`."""
        return None if self.w2 is None else Factors(self.unary[:, level], self.w1, tokens, self.w2)


def stand_in(rows: int, device: torch.device) -> Batch:
    """What growing reads of a batch of greedy rows."""
    last = torch.ones(rows, 1, dtype=torch.int64, device=device)
    about = SimpleNamespace(processors=Processors([[]] * rows))
    stub: Any = SimpleNamespace(rows=about, size=rows, last_tokens=lambda: last,
                                report_fault=lambda about, what: None)  # fmt: skip
    return cast(Batch, stub)


@torch.inference_mode()
def measure(options: argparse.Namespace, vocabulary: int, rows: int) -> Iterator[dict]:
    """A row for each kind of block, growth and number of nodes."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    clock, batch = time_graph if device.type == "cuda" else time_on_cpu, stand_in(rows, device)
    for kind, rank in (("conditional", options.rank), ("marginal", 0)):
        state = RandomBlock(rows, options.slots, vocabulary, rank, device, dtype)
        for name in options.growths:
            for nodes in options.nodes:
                growth = GROWTHS[name](nodes, options.slots)

                def grow(state: RandomBlock = state, growth: Growth = growth) -> Draft:
                    block = cast(SlotState, state)
                    return best_first(batch, SlotScores.of(batch, block, growth.depth, growth.candidates), growth)

                def with_tables(index: int, grow=grow) -> tuple[Tensor, Tensor]:
                    tables = grow().tables
                    return tables.depth, as_words(tables.sees)

                def grown(index: int, grow=grow) -> tuple[Tensor, Tensor]:
                    draft = grow()
                    return draft.tokens, draft.tree.parents

                timing, (found, *_) = clock(grown, CALLS)
                whole, _ = clock(with_tables, CALLS)
                seconds = timing.seconds
                yield {
                    "vocabulary": vocabulary, "batch": rows, "kind": kind, "growth": name, "nodes": nodes,
                    "us": 1e6 * seconds, "tables_us": 1e6 * (whole.seconds - seconds),
                    "share": 1e3 * seconds / options.step_ms, "found": int((found[1] >= 0).sum(1).min()),
                }  # fmt: skip


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, on_gpu = parser.add_argument, torch.cuda.is_available()
    add("--vocabulary", type=int, nargs="+", default=[131072, 32768], help="tokens that the drafter knows")
    add("--batch", type=int, nargs="+", default=[1, 4])
    add("--nodes", type=int, nargs="+", default=[16, 64, 256])
    add("--growths", nargs="+", choices=GROWTHS, default=list(GROWTHS))
    add("--slots", type=int, default=7)
    add("--rank", type=int, default=256)
    add("--device", choices=["cpu", "cuda"], default="cuda" if on_gpu else "cpu")
    add("--dtype", default="bfloat16" if on_gpu else "float32", choices=["bfloat16", "float32"])
    add("--step-ms", type=float, default=5.0, help="milliseconds of a plain step of the 8B shape")
    add("--json", metavar="FILE", help="where the figures go (default: to standard output if that is no terminal)")
    options = parser.parse_args(arguments)
    if min(*options.vocabulary, *options.batch, *options.nodes, options.slots, options.rank) < 1:
        parser.error("--vocabulary, --batch, --nodes, --slots and --rank must be at least 1")
    if not options.step_ms > 0:
        parser.error(f"--step-ms must be above 0, got {options.step_ms}")
    return options


def report(rows: Sequence[dict]) -> str:
    """The table of a result."""
    head = ("vocabulary", "batch", "kind", "growth", "nodes", "µs", "tables µs", "of a step")
    lines = [(f"{row['vocabulary']}", f"{row['batch']}", row["kind"], row["growth"], f"{row['nodes']}",
              f"{row['us']:.0f}", f"{row['tables_us']:.0f}", f"{row['share']:.1%}") for row in rows]  # fmt: skip
    return table(head, lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    options = options_of(arguments)
    torch.manual_seed(0)
    rows = [row for size in options.vocabulary for batch in options.batch for row in measure(options, size, batch)]
    print("synthetic: random logits and weights\n" + report(rows))
    settings = {name: value for name, value in vars(options).items() if name != "json"}
    hand_over(make_result("best_first", settings, [], rows), options.json)


if __name__ == "__main__":
    run_script(main)
