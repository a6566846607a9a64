"""A tree of nodes over the state of a recurrent layer, beside a chain through fla-core's recurrent kernel.

    python -m scripts.bench_recurrent --json FILE              # a layer of the 27B shape, on a GPU with fla-core
    python -m scripts.bench_recurrent --kinds "state space" --rows 1 8 32
    python -m scripts.bench_recurrent --shape toy --device cpu # seconds on a CPU; its figures mean nothing

Times are of one layer's recurrence: outputs of all nodes from the state before them ("tree", "chain"), and the replay
of an accepted path ("replay"), by our kernels and by the PyTorch code that specifies them. A time is the median of
CUDA-graph replays over the same inputs, which the level-2 cache may hold (see scripts/common/gpu_timing.py). fla's
kernel runs the chain token by token and writes the state after it. Numbers are random (synthetic), keys of length 1.
An error is against our PyTorch code in float64, and fla's against that of the chain."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from attention.recurrent.nodes import replay_nodes, run_nodes
from scripts.common.entry import add_bars_option, one_line, run_script
from scripts.common.gpu_timing import time_graph, time_on_cpu
from specdec.cli.results import hand_over, make_result
from specdec.trees.tree import TokenTree

KINDS = ("delta rule", "delta rule by channel", "state space", "convolution")
SHAPES = {  # heads of values, of keys, dims of keys and values, channels and taps of the convolution
    "27b": dict(heads=48, groups=16, dk=128, dv=128, channels=10240, taps=4),
    "toy": dict(heads=4, groups=2, dk=16, dv=16, channels=48, taps=4),
}
OURS, REFERENCE, FLA = "ours", "PyTorch", "fla"
BAR, PATH = 1.0, 6  # a tree takes at most so many times fla's chain; nodes of the path that is replayed
MOST_ERROR = 1e-4


@dataclass(frozen=True, slots=True)
class Layer:
    """What `run_nodes` takes of a layer with random states and nodes."""

    kind: str
    states: Tensor
    cells: Tensor
    inputs: tuple[Tensor, ...]
    reads: tuple[Tensor, ...]
    constants: tuple[Tensor, ...]
    kept: tuple[Tensor, ...]

    def run(self, sees: Tensor | None, impl: str, dtype: torch.dtype | None = None) -> Tensor:
        """Outputs `[B, M, *]`, computed in `dtype` (None: as the numbers are) where nothing is kept."""
        to = lambda some: some if dtype is None else tuple(x.to(dtype) for x in some)
        states, kept = to((self.states,))[0], self.kept if dtype is None else None
        given = to(self.inputs), to(self.reads), sees, to(self.constants), kept
        return run_nodes(self.kind, states, self.cells, *given, impl=impl)

    def replay(self, places: Tensor, counts: Tensor, impl: str) -> None:
        """Move the states on, in place."""
        states, kept, constants = (tuple(x[None] for x in some) for some in ((self.states,), self.kept, self.constants))
        replay_nodes(self.kind, states[0], kept, self.cells, places, counts, constants, impl)


def random_layer(kind: str, shape: str, rows: int, nodes: int, device: torch.device) -> Layer:
    """A layer of that kind: float32, or bfloat16 for convolutions."""
    of = SHAPES[shape]
    dtype = torch.bfloat16 if kind == "convolution" else torch.float32
    rand = lambda *size: torch.randn(*size, device=device).to(dtype)
    cells = torch.randperm(rows + 1, device=device)[:rows]
    if kind == "convolution":
        channels, taps = of["channels"], of["taps"]
        inputs, reads, constants = (rand(rows, nodes, channels),), (), (rand(channels, taps),)
        states = rand(rows + 1, channels, taps - 1)
    else:
        heads, groups, dk, dv = (of[name] for name in ("heads", "groups", "dk", "dv"))
        unit = lambda: F.normalize(rand(rows, nodes, groups, dk), dim=-1)
        gates = F.logsigmoid(rand(rows, nodes, heads, dk if kind.endswith("by channel") else 1) + 3)
        inputs = (unit(), rand(rows, nodes, heads, dv), gates)
        inputs = inputs if kind == "state space" else (*inputs, rand(rows, nodes, heads).sigmoid())
        reads, constants, states = (unit() * dk**-0.5,), (), rand(rows + 1, heads, dk, dv)
    kept = tuple(torch.zeros(rows + 1, *x.shape[1:], dtype=dtype, device=device) for x in inputs)
    return Layer(kind.removesuffix(" by channel"), states, cells, inputs, reads, constants, kept)


def tree_of(nodes: int) -> TokenTree:
    """The tree that is best where a node's first child is right with 0.6, and each next one a third as often.

    >>> tree_of(64).size, tree_of(64).max_depth
    (64, 9)
    """
    parents: list[int | None] = [None]
    coming = [(-0.6, 0.6, 0, 1.0)]  # the likeliest first: of the node, its share, its parent, and that one's
    while len(parents) < nodes:
        likely, share, parent, above = heappop(coming)
        heappush(coming, (-above * share / 3, share / 3, parent, above))
        heappush(coming, (likely * 0.6, 0.6, len(parents), -likely))
        parents.append(parent)
    return TokenTree(tuple(parents))


def sees_of(tree: TokenTree, device: torch.device) -> Tensor:
    """`[1, M, M]` bool: the ancestors of each node and itself."""
    sees = torch.eye(tree.size, dtype=torch.bool)
    for node, parent in enumerate(tree.parents):
        if parent is not None:
            sees[node] |= sees[parent]
    return sees[None].to(device)


def fla_chain(layer: Layer) -> Callable[[], Tensor]:
    """The chain of the same tokens through fla-core's recurrent kernel. Raises ImportError without it."""
    from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule

    (k, v, g, beta), (q,) = layer.inputs, layer.reads
    q, k, v = (x.to(torch.bfloat16) for x in (q, k, v))
    options = dict(scale=1.0, initial_state=layer.states[layer.cells].contiguous(), output_final_state=True)
    return lambda: fused_recurrent_gated_delta_rule(q, k, v, g[..., 0].contiguous(), beta=beta, **options)[0]


def measure(kind: str, rows: int, options) -> Iterator[dict]:
    """Seconds, spread and error of each form of one layer; a form that cannot run is a row that says so."""
    device = torch.device(options.device)
    layer = random_layer(kind, options.shape, rows, options.nodes, device)
    tree = tree_of(options.nodes)
    sees, forms = sees_of(tree, device), dict[tuple[str, str], Callable[[], Tensor]]()
    path = [0, *tree.path(max(range(tree.size), key=tree.depths.__getitem__))][:PATH]
    places = torch.tensor([path] * rows, device=device)
    counts = torch.full((rows,), len(path), device=device)
    for name, impl in ((OURS, "triton"), (REFERENCE, "reference")):
        forms[name, "tree"] = lambda impl=impl: layer.run(sees, impl)
        forms[name, "chain"] = lambda impl=impl: layer.run(None, impl)
        forms[name, "replay"] = lambda impl=impl: layer.replay(places, counts, impl)
    exact = {"tree": layer.run(sees, "reference", torch.float64), "chain": layer.run(None, "reference", torch.float64)}
    if kind == "delta rule":
        try:
            forms[FLA, "chain"] = fla_chain(layer)
        except ImportError as error:
            yield dict(kind=kind, rows=rows, name=FLA, form="chain", error=one_line(error))
    clock = time_graph if device.type == "cuda" else time_on_cpu
    for (name, form), run in forms.items():
        about = dict(kind=kind, rows=rows, name=name, form=form, nodes=len(path) if form == "replay" else options.nodes)
        before = layer.states.clone()
        try:
            with torch.inference_mode():
                timing, _ = clock(lambda _, run=run: run(), calls=options.calls)
                layer.states.copy_(before)
                out = run()
        except Exception as error:
            yield about | {"error": one_line(error)}
            continue
        finally:
            layer.states.copy_(before)
        apart = None
        if form in exact:
            apart = float((out.double() - exact[form]).norm() / exact[form].norm())
        yield about | {"seconds": timing.seconds, "spread": timing.spread, "apart": apart, "error": None}


def bars_of(rows: Sequence[dict], judged: bool) -> list[dict]:
    """How many times fla's chain our tree takes, for each number of rows; the error of our trees."""
    found = []
    ran = {(row["kind"], row["rows"], row["name"], row["form"]): row for row in rows if row["error"] is None}
    for (kind, count, name, form), row in ran.items():
        if (name, form) != (OURS, "tree"):
            continue
        if kind == "delta rule":
            chain = ran.get((kind, count, FLA, "chain"))
            value = None if chain is None else row["seconds"] / chain["seconds"]
            met = value <= BAR if judged and value is not None else None
            what = f"{kind}, {count} rows, a tree over a chain of fla"
            found.append({"what": what, "value": value, "at_most": BAR, "judged": judged, "met": met})
        most = 1e-2 if kind == "convolution" else MOST_ERROR
        what, met = f"{kind}, {count} rows, error", row["apart"] <= most
        found.append({"what": what, "value": row["apart"], "at_most": most, "judged": True, "met": met})
    return found


def table(rows: Sequence[dict]) -> str:
    """Lines to read: microseconds and error."""
    lines = ["kind                   rows  of       form    nodes        us    error"]
    for row in rows:
        head = f"{row['kind']:<22} {row['rows']:>4}  {row['name']:<8} {row['form']:<7}"
        if row["error"] is not None:
            lines.append(f"{head}  {row['error']}")
            continue
        error = "" if row["apart"] is None else f"{row['apart']:>8.1e}"
        lines.append(f"{head} {row['nodes']:>5} {row['seconds'] * 1e6:>9.1f} {error}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write or print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="27b", help="of the layer")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8], help="numbers of rows")
    parser.add_argument("--nodes", type=int, default=64, help="of a row's tree, and tokens of its chain")
    parser.add_argument("--calls", type=int, default=10, help="in one graph")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result to FILE")
    add_bars_option(parser)
    options = parser.parse_args(arguments)
    if min(*options.rows, options.nodes, options.calls) < 1:
        parser.error(f"--rows, --nodes and --calls must be at least 1, got {options.rows}, {options.nodes}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU")
    rows = [row for kind in options.kinds for count in options.rows for row in measure(kind, count, options)]
    print(table(rows))
    bars = bars_of(rows, options.device == "cuda" and options.shape == "27b" and options.nodes == 64)
    if options.bars:
        print("\n".join(f"{bar['what']}: {bar['value']} (met: {bar['met']})" for bar in bars))
    settings = {name: getattr(options, name) for name in ("shape", "kinds", "rows", "nodes", "calls", "device")}
    result = make_result("recurrent", settings, rows, [], bars=bars)
    hand_over(result, None if options.json is None else str(options.json))


if __name__ == "__main__":
    run_script(main)
