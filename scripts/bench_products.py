"""Products of few rows with weights in 16, 8 and 4 bits: ours beside PyTorch's and, where it is there, torchao's.

    python -m scripts.bench_products --json FILE                     # the products of the 8B shape, on a GPU
    python -m scripts.bench_products --kinds int4 --rows 1 8 --compile
    python -m scripts.bench_products --shape toy                     # seconds on a CPU; its figures mean nothing

A time is the median of CUDA-graph replays over copies of the weights that the level-2 cache does not hold (see
scripts/common/gpu_timing.py); `share` is that of the card's bandwidth which the weights' bytes alone make. An error is
against the dequantised weights in float64. Weights and rows are random (synthetic). "layers" adds up the products of
all layers, without the output layer. torchao's kinds of one scale an output run eagerly, or compiled with --compile,
which takes half a minute for each shape and number of rows; its int4 is the layout of PyTorch's own kernel on a GPU."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scripts.common.entry import add_bars_option, one_line, run_script
from scripts.common.gpu_timing import CALLS, cache_bytes, ceilings, copies_beyond_cache, time_graph, time_on_cpu
from scripts.common.quantise import quantise
from scripts.generate_bench.models import SHAPES
from scripts.generate_bench.quantised import stored_bytes
from specdec.cli.results import hand_over, make_result
from specdec.model.fusion.quantised.packed import EightBitWeight, pack_int4
from specdec.model.fusion.skinny_linear import skinny_linear

KINDS = ("16 bits", "int8", "fp8", "int4")
OURS, PYTORCH, TORCHAO = "ours", "PyTorch", "torchao"
GROUP, LAYERS, OUTPUT = 128, "layers", "output"
BARS = {"int4": {1: 1.2, 8: 1.5, 64: 1.15}, "int8": {1: 1.05, 8: 1.4, 64: 1.4}, "fp8": {1: 1.0, 8: 1.1, 64: 1.15}}
MOST_ERROR = 2.5e-3


@dataclass(frozen=True, slots=True)
class Made:
    """A product with fixed weights: `run(x)`, the bytes that it reads of them, and what they stand for `[out, in]`."""

    run: Callable[[Tensor], Tensor]
    bytes: int
    exact: Callable[[], Tensor]


def products_of(shape: str) -> dict[str, tuple[int, int]]:
    """Outputs and inner dimension of each product of a layer, projections that share their input as one, and OUTPUT.

    >>> products_of("llama-3.1-8b")["gate and up"]
    (28672, 4096)
    """
    of = SHAPES[shape]
    hidden, inner, heads = of["hidden_size"], of["intermediate_size"], of["num_attention_heads"]
    dim = of.get("head_dim", hidden // heads)
    return {
        "q, k and v": ((heads + 2 * of["num_key_value_heads"]) * dim, hidden), "o": (hidden, heads * dim),
        "gate and up": (2 * inner, hidden), "down": (hidden, inner), OUTPUT: (of["vocab_size"], hidden),
    }  # fmt: skip


def random_weight(kind: str, outputs: int, inner: int, device: torch.device, dtype: torch.dtype) -> Any:
    """Weights of that kind: one scale an output for int8, blocks of 128 x 128 for fp8, groups of 128 for int4."""
    if kind == "16 bits":
        return torch.randn(outputs, inner, dtype=dtype, device=device)
    if kind == "int8":
        values = torch.randint(-127, 128, (outputs, inner), dtype=torch.int8, device=device)
        return EightBitWeight(values, torch.rand(outputs, 1, device=device) + 0.5, 1, inner)
    if kind == "fp8":
        values = (40 * torch.randn(outputs, inner, dtype=dtype, device=device)).to(torch.float8_e4m3fn)
        blocks = -(-outputs // GROUP), -(-inner // GROUP)
        return EightBitWeight(values, torch.rand(*blocks, device=device) + 0.5, GROUP, GROUP)
    numbers = torch.randint(0, 16, (outputs, inner), dtype=torch.uint8, device=device)
    scales = (torch.rand(outputs, inner // GROUP, device=device) + 0.5).to(dtype)
    return pack_int4(numbers, scales, torch.randint(0, 16, scales.shape, device=device), GROUP)


def make(kind: str, name: str, outputs: int, inner: int, device: torch.device, dtype: torch.dtype,
         compiled: bool) -> Made:  # fmt: skip
    """The product of `name` with new random weights of `kind`."""
    if name != TORCHAO:
        weight = random_weight(kind, outputs, inner, device, dtype)
        run = skinny_linear if name == OURS else nn.functional.linear
        exact = weight.double if isinstance(weight, Tensor) else lambda: weight.dequantise(torch.float64)
        return Made(lambda x: run(x, weight), weight.nbytes, exact)
    layer = nn.Linear(inner, outputs, bias=False, device=device, dtype=dtype)
    model = _Layers(layer)
    if kind == "int4" and device.type == "cuda":
        from torchao import quantization as ao

        ao.quantize_(model.layer, ao.Int4WeightOnlyConfig(GROUP, int4_packing_format="tile_packed_to_4d"))
        exact = lambda: model.layer(torch.eye(inner, dtype=dtype, device=device)).T.detach().double()
    else:
        quantise(model, kind, GROUP)
        exact = lambda: model.layer.weight.dequantize().detach().double()
    layer = torch.compile(model.layer) if compiled else model.layer
    return Made(layer, stored_bytes(model.layer.weight), exact)


class _Layers(nn.Module):
    """A model of one layer, as `quantise` takes it: its output layer stays as it is."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(1, 1)
        self.device = layer.weight.device

    def get_output_embeddings(self) -> nn.Linear:
        """The other layer."""
        return self.head


def measure(kind: str, name: str, outputs: int, inner: int, counts: Sequence[int], options) -> Iterator[dict]:
    """Time, share of the bandwidth and error for each number of rows; a product that cannot run is a row that says so.

    Whether two calls give the same bits is told too."""
    device, dtype = torch.device(options.device), options.dtype
    size = outputs * inner * {"16 bits": 2, "int4": 0.5}.get(kind, 1)
    copies = copies_beyond_cache(int(size), cache_bytes(device))
    clock, about = time_graph if device.type == "cuda" else time_on_cpu, {"kind": kind, "name": name}
    try:
        made = [make(kind, name, outputs, inner, device, dtype, options.compile) for _ in range(copies)]
        exact = made[0].exact().T
    except Exception as error:
        yield from (about | {"rows": count, "error": one_line(error)} for count in counts)
        return
    for count in counts:
        x = torch.randn(count, inner, dtype=dtype, device=device)
        try:
            with torch.inference_mode():
                timing, outs = clock(lambda i, x=x: made[i % copies].run(x), calls=max(CALLS, copies))
                again = made[0].run(x)
        except Exception as error:
            yield about | {"rows": count, "error": one_line(error)}
            continue
        wanted, out = x.double() @ exact, outs[0].double()
        yield about | {
            "rows": count, "seconds": timing.seconds, "spread": timing.spread, "bytes": made[0].bytes,
            "apart": float((out - wanted).norm() / wanted.norm()), "repeats": bool(again.equal(outs[0])), "error": None,
        }  # fmt: skip


def add_layers(rows: Sequence[dict], layers: int) -> list[dict]:
    """The sum over the products of all layers, of each kind, name and number of rows that has them all."""
    found = []
    names = {row["product"] for row in rows} - {OUTPUT}
    for key in dict.fromkeys((row["kind"], row["name"], row["rows"]) for row in rows):
        mine = [r for r in rows if (r["kind"], r["name"], r["rows"]) == key and r["product"] != OUTPUT]
        if len(mine) == len(names) and all(row["error"] is None for row in mine):
            total = {name: layers * sum(row[name] for row in mine) for name in ("seconds", "bytes")}
            worst = {"apart": max(row["apart"] for row in mine), "repeats": all(row["repeats"] for row in mine)}
            about = dict(zip(("kind", "name", "rows"), key, strict=True))
            found.append({"product": LAYERS, **about, **total, "spread": None, **worst, "error": None})
    return found


def bars_of(rows: Sequence[dict], judged: bool) -> list[dict]:
    """How many times as fast as torchao's product of the same kind ours is, all layers together; errors."""
    found = []
    sums = {(row["kind"], row["rows"], row["name"]): row for row in rows if row["product"] == LAYERS}
    for kind, asked in BARS.items():
        for count, least in asked.items():
            ours, other = (sums.get((kind, count, name)) for name in (OURS, TORCHAO))
            if ours is None:
                continue
            value = None if other is None else other["seconds"] / ours["seconds"]
            what = f"{kind}, {count} rows, over torchao's"
            met = value >= least if judged and value else None
            found.append({"what": what, "value": value, "at_least": least, "judged": judged, "met": met})
            what, met = f"{kind}, {count} rows, error", ours["apart"] <= MOST_ERROR and ours["repeats"]
            found.append({"what": what, "value": ours["apart"], "at_most": MOST_ERROR, "judged": True, "met": met})
    return found


def table(rows: Sequence[dict], bandwidth: float) -> str:
    """Lines to read: microseconds, share of the bandwidth and error."""
    lines = ["product        kind     of        rows        us  share    error  same bits"]
    for row in rows:
        head = f"{row['product']:<14} {row['kind']:<8} {row['name']:<8} {row['rows']:>5}"
        if row["error"] is not None:
            lines.append(f"{head}  {row['error']}")
            continue
        share = row["bytes"] / bandwidth / row["seconds"]
        lines.append(f"{head} {row['seconds'] * 1e6:>9.1f} {share:>6.2f} {row['apart']:>8.1e}  {row['repeats']}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write or print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b", help="whose products")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 6, 8, 16, 64], help="numbers of rows")
    parser.add_argument("--compile", action="store_true", help="compile torchao's")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result to FILE")
    add_bars_option(parser)
    options = parser.parse_args(arguments)
    if min(options.rows) < 1:
        parser.error(f"--rows must be at least 1, got {min(options.rows)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU")
    options.rows = list(dict.fromkeys(options.rows))
    options.dtype = torch.bfloat16
    rows, device = list[dict](), torch.device(options.device)
    limits = ceilings(device) if device.type == "cuda" else ceilings(device, megabytes=16, size=256)
    for product, (outputs, inner) in products_of(options.shape).items():
        for kind in options.kinds:
            for name in (OURS, PYTORCH if kind == "16 bits" else TORCHAO):
                found = measure(kind, name, outputs, inner, options.rows, options)
                rows += [{"product": product} | row for row in found]
    rows += add_layers(rows, SHAPES[options.shape]["num_hidden_layers"])
    print(table(rows, limits["read_bytes"]))
    judged = device.type == "cuda" and options.shape == "llama-3.1-8b"
    bars = bars_of(rows, judged)
    if options.bars:
        print("\n".join(f"{bar['what']}: {bar['value']} (met: {bar['met']})" for bar in bars))
    settings = {name: getattr(options, name) for name in ("shape", "kinds", "rows", "compile", "device")}
    result = make_result("products", settings, rows, [], ceilings=limits, bars=bars)
    hand_over(result, None if options.json is None else str(options.json))


if __name__ == "__main__":
    run_script(main)
