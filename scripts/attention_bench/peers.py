"""Other people's attention, each behind one small function, so that the benchmark can hold it beside ours.

`find_peers` says which can be imported here and why the others cannot. A paged peer takes a `Memory` and a page size
and returns `call(layer) -> [T, H, D]` over the same memory; whatever it plans once per batch is done before, outside
the timing. A dense peer takes `q [B, S, H, D]`, `k, v [B, S, G, D]` and returns a callable without arguments.

FA3 is looked for in `flash_attn_interface`, in an installed vllm, or as the library file that SPECDEC_FA3_LIBRARY
names."""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from attention.paged.batch import ancestor_bits
from scripts.attention_bench.cases import Memory

PAGE_SIZES = (16, 64, 128, 256)
WORKSPACE_BYTES = 384 << 20


class Peer(NamedTuple):
    """What a peer can do here; `version` is for the record, `absent` says why nothing can be done."""

    name: str
    version: str | None
    absent: str | None


def _find_fa3() -> Peer:
    if importlib.util.find_spec("flash_attn_interface") is not None:
        module = importlib.import_module("flash_attn_interface")
        return Peer("FA3", f"flash_attn_interface {getattr(module, '__version__', '')}".strip(), None)
    library, origin = os.environ.get("SPECDEC_FA3_LIBRARY"), "SPECDEC_FA3_LIBRARY"
    if library is None and (vllm := importlib.util.find_spec("vllm")) is not None:
        library, origin = next(Path(vllm.origin).parent.glob("vllm_flash_attn/_vllm_fa3_C*.so"), None), "vllm"
    if library is None:
        return Peer(
            "FA3", None, "neither flash_attn_interface nor vllm is installed and SPECDEC_FA3_LIBRARY is not set"
        )
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return Peer("FA3", None, f"{library} does not load: {error}")
    return Peer("FA3", f"vllm's build, from {origin}", None)


def _find_flashinfer() -> Peer:
    try:
        module = importlib.import_module("flashinfer")
    except Exception as error:  # its import compiles and probes: anything can go wrong
        return Peer("FlashInfer", None, f"{type(error).__name__}: {error}")
    return Peer("FlashInfer", module.__version__, None)


def find_peers(device: torch.device) -> dict[str, Peer]:
    """Every peer by name, the absent ones with the reason."""
    if device.type != "cuda":
        return {
            name: Peer(name, None, f"needs a CUDA device, this is {device}")
            for name in ("FA3", "FlashInfer", "FlexAttention", "SDPA flash", "SDPA cuDNN")
        }
    found = [
        _find_fa3(),
        _find_flashinfer(),
        *(Peer(name, torch.__version__, None) for name in ("FlexAttention", "SDPA flash", "SDPA cuDNN")),
    ]
    return {peer.name: peer for peer in found}


def _cumulative(memory: Memory) -> Tensor:
    return memory.batch.cu_seqlens_q.int()


def fa3_paged(memory: Memory, size: int) -> Callable[[int], Tensor]:
    """FA3 over pages, causal: it has no tree mask, so for a tree this is what the same shape costs without one."""
    case, table, cu = memory.case, memory.table(size), _cumulative(memory)
    lengths = memory.batch.kv_lengths.int()
    if importlib.util.find_spec("flash_attn_interface") is not None:
        attend = importlib.import_module("flash_attn_interface").flash_attn_with_kvcache
        return lambda layer: attend(
            memory.queries[layer],
            *memory.pages(layer, size),
            cache_seqlens=lengths,
            page_table=table,
            cu_seqlens_q=cu,
            max_seqlen_q=case.queries,
            softmax_scale=memory.scale,
            causal=True,
        )
    return lambda layer: _fa3(
        memory.queries[layer],
        *memory.pages(layer, size),
        cu,
        None,
        lengths,
        case.queries,
        case.context,
        table,
        memory.scale,
    )


def _fa3(q, k, v, cu_q, cu_k, used_k, max_q, max_k, table, scale):
    """The operator as vllm builds it; positions, not names, are its interface."""
    return torch.ops._vllm_fa3_C.fwd(
        q,
        k,
        v,
        None,
        None,
        None,
        None,
        cu_q,
        cu_k,
        None,
        None,
        used_k,
        max_q,
        max_k,
        table,
        *[None] * 8,
        scale,
        True,
        -1,
        -1,
        0.0,
        True,
        None,
        0,
        None,
        0,
        None,
        1,
        0,
        None,
    )[0]


@functools.cache
def _workspace(device: torch.device) -> Tensor:
    """FlashInfer's scratch memory, one for all wrappers: they run one after the other."""
    return torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


def flashinfer_paged(memory: Memory, size: int) -> Callable[[int], Tensor]:
    """FlashInfer over pages, planned here: its decode for single tokens, causal for chains, a custom mask for trees."""
    import flashinfer

    case, table, device = memory.case, memory.table(size), memory.cache.device
    each = table.shape[1]
    indptr = torch.arange(0, case.batch * each + 1, each, dtype=torch.int32, device=device)
    last = torch.full((case.batch,), (case.context - 1) % size + 1, dtype=torch.int32, device=device)
    shape = (case.heads, case.kv_heads, case.head_dim, size)
    types = dict(sm_scale=memory.scale, q_data_type=case.dtype, kv_data_type=case.dtype)
    if case.queries == 1:
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(_workspace(device), "NHD", use_tensor_cores=True)
        wrapper.plan(indptr, table.flatten(), last, *shape, **types)
    else:
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(_workspace(device), "NHD", backend="fa2")
        mask = (
            dict(custom_mask=case.visible(device).repeat(case.batch, 1, 1).flatten())
            if case.parents
            else dict(causal=True)
        )
        wrapper.plan(_cumulative(memory), indptr, table.flatten(), last, *shape, **mask, **types)
    return lambda layer: wrapper.run(memory.queries[layer], memory.pages(layer, size))


def flex_tree(memory: Memory) -> Callable[[int], Tensor]:
    """FlexAttention, compiled, over dense keys `[B, G, L, D]`, no block table; its mask reads the ancestor bits."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    case, device = memory.case, memory.cache.device
    first = case.context - case.queries
    bits = torch.tensor(ancestor_bits(case.parents), dtype=torch.int64, device=device)

    def sees(_b, _h, query, key):
        node = key - first
        inside = node.clamp(min=0)
        return (node < 0) | ((bits[query, inside // 64] >> (inside % 64)) & 1 == 1)

    compiled = torch.compile(flex_attention, dynamic=False)
    mask = create_block_mask(sees, None, None, case.queries, case.context, device=device)
    table = memory.table(1).long()  # the same keys in one piece, gathered before the timing
    dense = []
    for layer, query in enumerate(memory.queries):
        keys, values = (rows[table].transpose(1, 2).contiguous() for rows in memory.rows(layer))
        dense.append(
            (query.view(case.batch, case.queries, case.heads, case.head_dim).transpose(1, 2).contiguous(), keys, values)
        )

    def call(layer: int) -> Tensor:
        out = compiled(
            *dense[layer],
            block_mask=mask,
            scale=memory.scale,
            enable_gqa=case.heads != case.kv_heads,
            kernel_options={"BACKEND": "TRITON"},
        )  # fmt: skip - its decoding kernel finds no configuration for a tree of 64
        return out.transpose(1, 2).flatten(0, 1)

    return call


def fa3_dense(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """FA3, causal."""
    batch, length, _, dim = q.shape
    if importlib.util.find_spec("flash_attn_interface") is not None:
        attend = importlib.import_module("flash_attn_interface").flash_attn_func

        def attended() -> Tensor:
            out = attend(q, k, v, causal=True)
            return out[0] if isinstance(out, tuple) else out

        return attended
    cu = torch.arange(0, batch * length + 1, length, dtype=torch.int32, device=q.device)
    packed = [x.flatten(0, 1) for x in (q, k, v)]
    return lambda: _fa3(*packed, cu, cu, None, length, length, None, dim**-0.5).view(q.shape)


def sdpa_dense(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Callable[[], Tensor]]:
    """torch's scaled_dot_product_attention with one backend, causal; differentiable."""

    def build(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with sdpa_kernel(backend):
                out = scaled_dot_product_attention(
                    *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=q.shape[2] != k.shape[2]
                )
            return out.transpose(1, 2)

        return call

    return build


def flex_dense(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """FlexAttention, compiled, with a causal block mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    length = q.shape[1]
    mask = create_block_mask(lambda _b, _h, query, key: query >= key, None, None, length, length, device=q.device)
    compiled = torch.compile(flex_attention, dynamic=False)
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    return lambda: compiled(*heads_first, block_mask=mask, enable_gqa=q.shape[2] != k.shape[2]).transpose(1, 2)


PAGED = {"FA3": fa3_paged, "FlashInfer": flashinfer_paged}
DENSE = {
    "FA3": fa3_dense,
    "SDPA flash": sdpa_dense(SDPBackend.FLASH_ATTENTION),
    "SDPA cuDNN": sdpa_dense(SDPBackend.CUDNN_ATTENTION),
    "FlexAttention": flex_dense,
}
