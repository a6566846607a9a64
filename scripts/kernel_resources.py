"""Registers, spills and shared memory of every shipped kernel configuration, read at build time: no GPU is needed.

    python -m scripts.kernel_resources [--arch 90] [--json]

The library's own launchers run on small CPU tensors while Triton is told that a GPU of that architecture is there and
that launches are to be compiled only; the assembler's report on each binary is then read with the `cuobjdump` that
comes with Triton."""

import argparse
import inspect
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

from scripts.common.entry import run_script
from scripts.common.recurrent_kernels import recurrent_launches
from scripts.common.round_kernels import round_launches

H200 = 132  # its multiprocessors
PAGED_CALLS = (
    ("decode", 1, 0),
    ("verify 6", 6, 0),
    ("tree 26", 26, 26),
    ("tree 64", 64, 64),
    ("tree 200", 200, 200),
    ("chunk 512", 512, 0),
)
USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


class Resources(NamedTuple):
    """One compiled kernel's registers and bytes of stack (spills) a thread, shared memory a program, warps."""

    label: str
    kernel: str
    registers: int
    spilled: int
    shared: int
    warps: int
    stages: int


@contextmanager
def compile_only(arch: int) -> Iterator[list]:
    """A context in which launches of Triton kernels only compile; yields the list of compiled kernels.

    Raises RuntimeError where kernels are interpreted (TRITON_INTERPRET=1): there is nothing to compile then.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 interprets kernels, so their resources cannot be read; unset it")
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class NoDevice:
        """A stand-in for Triton's driver; a device number of its own keeps these kernels apart from all others."""

        get_current_target = staticmethod(lambda: GPUTarget("cuda", arch, 32))
        get_current_device = staticmethod(lambda: -arch)
        get_current_stream = staticmethod(lambda device=None: 0)

    compiled: list = []
    run = JITFunction.run

    def warm_up(self, *args, grid, warmup, **kwargs):
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))
        return compiled[-1]

    before = driver._active  # None where nothing asked for a device yet: `reset_active` would insist on one
    driver.set_active(NoDevice())
    JITFunction.run = warm_up
    try:
        yield compiled
    finally:
        JITFunction.run = run
        driver.set_active(before)


def _cuobjdump() -> str:
    import triton

    bundled = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return str(bundled) if bundled.exists() else "cuobjdump"


def read_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack plus local memory a thread, from the assembler's report on one binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([_cuobjdump(), "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = USAGE.search(report.stdout + report.stderr)
    if found is None:
        raise ValueError(f"no resource usage in the report {report.stdout[-500:]!r}")
    registers, stack, _, local = (int(number) for number in found.groups())
    return registers, stack + local


def resources(label: str, launch: Callable[[], object], arch: int = 90) -> list[Resources]:
    """What each kernel that `launch` starts takes on that architecture (90: Hopper)."""
    with compile_only(arch) as compiled:
        launch()
    return [
        Resources(
            label,
            kernel.metadata.name,
            *read_usage(kernel.asm["cubin"]),
            kernel.metadata.shared,
            kernel.metadata.num_warps,
            kernel.metadata.num_stages,
        )
        for kernel in compiled
    ]


def _paged(
    queries: int,
    tree: int = 0,
    heads: int = 32,
    kv_heads: int = 8,
    dim: int = 128,
    page: int | None = None,
    kv_dtype: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    processors: int = 4,
    latent: int | None = None,
    **options,
):
    """A launch of the paged kernel on memory that nothing reads; `options` are those of `paged_attention`.

    latent: how many numbers of a key are its value (None: values lie elsewhere)."""
    from attention.kv.cache import PagedKVCache
    from attention.paged import api as paged
    from attention.paged import attention_kernel as paged_kernel
    from attention.paged.batch import ancestor_bits, build_batch
    from scripts.attention_bench.cases import DEFAULT_PAGE_SIZE, depths, random_tree

    size = page or DEFAULT_PAGE_SIZE
    length = -(-queries // size) * size
    kinds = dict(dtype=dtype, kv_dtype=kv_dtype, values_in_keys=latent is not None)
    cache = PagedKVCache(1, length // size, size, kv_heads, dim, latent, **kinds)
    sequence = cache.add()
    cache.append([sequence], [length])
    parents = random_tree(tree) if tree else ()
    batch = build_batch(
        cache, [sequence], [queries], trees=[(depths(parents), ancestor_bits(parents))] if tree else None
    )
    query = torch.empty(queries, heads, dim, dtype=dtype)
    # past the door, which refuses a CPU without the interpreter
    patch = mock.patch.object
    with patch(paged, "resolve", lambda *_: "triton"), patch(paged, "triton_available", lambda _: True), \
         patch(paged_kernel, "multiprocessors", lambda _: processors):  # fmt: skip
        paged.paged_attention(query, 0, batch, dim**-0.5, **options)


def _flash(dim: int):
    """Forward and backward."""
    from attention.flash import api as flash

    q = torch.zeros(1, 64, 4, dim, dtype=torch.bfloat16, requires_grad=True)
    k, v = (torch.zeros(1, 64, 1, dim, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    with mock.patch.object(flash, "triton_available", lambda _: True):
        flash.flash_attention(q, k, v, causal=True, impl="triton").sum().backward()


def _write(kv_dtype: str | None):
    from attention.kv.cache import PagedKVCache
    from attention.kv.write_kernel import launch_write_kv

    cache = PagedKVCache(1, 1, 16, 8, 128, dtype=torch.bfloat16, kv_dtype=kv_dtype)
    new = torch.empty(4, 8, 128, dtype=torch.bfloat16)
    launch_write_kv(
        cache.key_pages, cache.value_pages, cache.key_scales, cache.value_scales, new, new, torch.arange(4), 0, kv_dtype
    )


def _skinny(rows: int, outputs: int, normed: bool):
    from specdec.model.fusion import skinny_linear_kernel as skinny_linear_kernel
    from specdec.model.fusion.product_inputs import Norm

    x, weight = (torch.empty(size, 4096, dtype=torch.bfloat16) for size in (rows, outputs))
    norm = Norm(weight[:, 0].contiguous(), 1e-5, False) if normed else None
    with mock.patch.object(skinny_linear_kernel, "multiprocessors", lambda _: H200):
        skinny_linear_kernel.launch_skinny_linear(x, weight, None, None, norm)


def _quantised(layout: str, rows: int, outputs: int, group: int):
    from specdec.model.fusion import skinny_linear_kernel
    from specdec.model.fusion.quantised.linear_kernel import launch_quantised_linear

    x, int4 = torch.empty(rows, 4096, dtype=torch.bfloat16), layout.startswith("int4")
    values = torch.empty(outputs, 2048 if int4 else 4096, dtype=torch.int8)
    scales = torch.empty(outputs, 4096 // group, dtype=torch.int32 if int4 else torch.float32)
    with mock.patch.object(skinny_linear_kernel, "multiprocessors", lambda _: H200):
        launch_quantised_linear(x, values, scales, layout, group, 1, None, None)


def _distance(kind: str):
    from specdec.training.distance_kernel import launch_distance

    launch_distance(torch.empty(1, 32000).bfloat16(), torch.empty(1, 32000).bfloat16(), None, kind)


def shipped() -> dict[str, Callable[[], object]]:
    """Label -> a launch, for the configurations that the library picks: bf16 in full, other types at some shapes."""
    launches: dict[str, Callable[[], object]] = {}
    for dim in (64, 80, 96, 128, 256):
        for name, queries, tree in PAGED_CALLS:
            launches[f"paged {name}, D {dim}"] = lambda q=queries, t=tree, d=dim: _paged(q, t, dim=d)
    for name, queries, tree in PAGED_CALLS:
        call = dict(queries=queries, tree=tree)
        launches[f"paged {name}, D 512"] = lambda c=call: _paged(**c, heads=32, kv_heads=4, dim=512)
        for heads in (20, 128):
            launches[f"paged {name}, {heads} heads over latents"] = lambda c=call, h=heads: _paged(
                **c, heads=h, kv_heads=1, dim=576, latent=512
            )
    launches["paged tree 64, 128 heads over latents, fp32"] = lambda: _paged(
        64, 64, heads=128, kv_heads=1, dim=576, latent=512, dtype=torch.float32
    )
    launches["paged tree 64, short text"] = lambda: _paged(64, 64, processors=H200)
    for page in (1, 16):
        launches[f"paged tree 64, page {page}"] = lambda p=page: _paged(64, 64, page=p)
    for kv_dtype, dim in product(("int8", "fp8"), (64, 80, 128, 256)):
        launches[f"paged decode, D {dim}, {kv_dtype}"] = lambda kind=kv_dtype, d=dim: _paged(1, dim=d, kv_dtype=kind)
        launches[f"paged tree 64, D {dim}, {kv_dtype}"] = lambda kind=kv_dtype, d=dim: _paged(
            64, 64, dim=d, kv_dtype=kind
        )
    for dim in (64, 128, 256):
        launches[f"paged tree 64, D {dim}, fp32"] = lambda d=dim: _paged(64, 64, dim=d, dtype=torch.float32)
    for name, options in {
        "window": dict(window=100),
        "soft-cap": dict(softcap=50.0),
        "sinks, lse": dict(sinks=torch.empty(32), return_lse=True),
    }.items():
        launches[f"paged decode, {name}"] = lambda o=options: _paged(1, **o)
        launches[f"paged tree 64, {name}"] = lambda o=options: _paged(64, 64, **o)
    for group in (1, 7):
        launches[f"paged tree 64, group {group}"] = lambda g=group: _paged(64, 64, heads=8 * g)
    launches |= {f"flash, D {dim}": lambda d=dim: _flash(d) for dim in (64, 80, 96, 128, 256)}
    launches |= {f"write_kv, {kind or 'bf16'}": lambda k=kind: _write(k) for kind in (None, "int8", "fp8")}
    for rows, outputs in product((1, 6, 16, 64), (4096, 28672)):
        launches[f"skinny linear, {rows}, {outputs} outputs"] = lambda r=rows, o=outputs: _skinny(r, o, False)
    launches["skinny linear, 64, normed"] = lambda: _skinny(64, 4096, True)
    kinds = {("int8", 4096), ("fp8", 4096), ("fp8", 128), ("int4 bfloat16", 128), ("int4 bfloat16 shifted", 32)}
    for (layout, group), rows, outputs in product(sorted(kinds), (1, 6, 16, 64), (4096, 28672)):
        name = f"{layout} linear, blocks of {group}, {rows}, {outputs} outputs"
        launches[name] = lambda r=rows, o=outputs, kind=layout, g=group: _quantised(kind, r, o, g)
    launches |= {f"distance, {kind}": lambda k=kind: _distance(k) for kind in ("kl", "tv")}
    return launches | round_launches() | recurrent_launches()


def collect(labels: list[str] | None = None, arch: int = 90) -> tuple[list[Resources], dict[str, str]]:
    """Resources of the shipped configurations (or the named ones), and why others could not be read: label -> error."""
    found, failed = [], {}
    for label, launch in shipped().items():
        if labels is not None and label not in labels:
            continue
        try:
            found += resources(label, launch, arch)
        except Exception as error:  # one kernel that does not compile must not hide the others
            failed[label] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return found, failed


def main(arguments: list[str] | None = None) -> None:
    """Print one line a kernel, or JSON."""
    parser = argparse.ArgumentParser(description=inspect.getdoc(inspect.getmodule(main)).splitlines()[0])
    parser.add_argument("--arch", type=int, default=90, help="compute capability times ten (default: 90, Hopper)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    options = parser.parse_args(arguments)
    found, failed = collect(arch=options.arch)
    if options.json:
        print(json.dumps({"kernels": [row._asdict() for row in found], "not_read": failed}))
        return
    for row in found:
        print(
            f"{row.label:28} {row.kernel:28} {row.registers:4} registers  {row.spilled:5} B spilled  "
            f"{row.shared / 1024:6.1f} KiB shared  {row.warps} warps"
        )
    for label, why in failed.items():
        print(f"{label:28} not read: {why}")


if __name__ == "__main__":
    run_script(main)
