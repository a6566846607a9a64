"""Triton kernels of `attention.recurrent.linear` and `delta_rule`: trees over a state, and the replay of a path.

A program of the first owns a head of a row and a block of columns of its state, which no token changes: the outputs of
all nodes follow from the state that the row begins with and from products of the nodes, masked by what each node sees.
What a node writes under the delta rule depends on what its ancestors wrote; nodes of one depth do not depend on each
other, so one product for each depth solves the triangular system as forward substitution would (Yang et al. 2024,
Parallelizing Linear Transformers with the Delta Rule, with the mask of a tree in place of a triangle)."""

import triton
import triton.language as tl
from torch import Tensor

from attention.recurrent.nodes import MAX_NODES


@triton.jit
def _decayed_products(k, q, total, M, BM: tl.constexpr):
    """`[BM, BM]` each: products of keys with keys, and of queries with keys `[BM, BD]`, decayed from token j to token i
    in each dim by the difference of their `total [BM, BD]`; of tokens that j is no ancestor of, without meaning."""
    node = tl.arange(0, BM)
    of_keys, of_queries = tl.zeros((BM, BM), tl.float32), tl.zeros((BM, BM), tl.float32)
    for j in range(M):
        at = (node == j)[:, None]
        one, end = tl.sum(tl.where(at, k, 0.0), 0), tl.sum(tl.where(at, total, 0.0), 0)
        # between nodes that do not see each other the difference may be positive
        decayed = one[None, :] * tl.exp(tl.minimum(total - end[None, :], 0.0))
        column = node[None, :] == j
        of_keys = tl.where(column, tl.sum(k * decayed, 1)[:, None], of_keys)
        of_queries = tl.where(column, tl.sum(q * decayed, 1)[:, None], of_queries)
    return of_keys, of_queries


@triton.jit
def _load_nodes(base, node_stride, offset, width, M, BM: tl.constexpr, BW: tl.constexpr):
    """`[BM, BW]` in float32: columns up to `width` of the nodes of a row, from `base` on; zeros elsewhere."""
    node, column = tl.arange(0, BM), offset + tl.arange(0, BW)
    mask = (node < M)[:, None] & (column < width)[None, :]
    return tl.load(base + node[:, None] * node_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _keep_nodes(base, cell, values, cell_stride, node_stride, offset, width, M, BM: tl.constexpr, BW: tl.constexpr):
    """Write `values [BM, BW]` of the nodes to the places that a cell has for them, from `base` on."""
    node, column = tl.arange(0, BM), offset + tl.arange(0, BW)
    mask = (node < M)[:, None] & (column < width)[None, :]
    tl.store(base + cell * cell_stride + node[:, None] * node_stride + column[None, :], values, mask=mask)


@triton.jit
def _tree_kernel(states, cells, keys, values, gates, betas, queries, sees, out, kept_keys, kept_values, kept_gates,
                 kept_betas, state_cell, key_row, key_node, value_row, value_node, gate_row, gate_node, beta_row,
                 beta_node, query_row, query_node, sees_row, kept_key_cell, kept_value_cell, kept_gate_cell,
                 kept_beta_cell, M, H, G, DK, DV, BM: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
                 DELTA: tl.constexpr, BY_DIM: tl.constexpr, TREE: tl.constexpr, KEEP: tl.constexpr,
                 PRECISION: tl.constexpr):  # fmt: skip
    """Shapes are those of `launch_tree`; the last dims of all tensors are contiguous. Dims of keys come in tiles."""
    block, row, head = tl.program_id(0), tl.program_id(1) // H, tl.program_id(1) % H
    group, cell = head // (H // G), tl.load(cells + row).to(tl.int64)
    node, column = tl.arange(0, BM), block * BV + tl.arange(0, BV)
    is_node = node < M
    visible = is_node[:, None] & is_node[None, :] & (node[:, None] >= node[None, :])
    if TREE:
        seen = tl.load(sees + row * sees_row + node[:, None] * M + node[None, :], mask=visible, other=0)
        visible = visible & (seen != 0)
    products, scores = tl.zeros((BM, BM), tl.float32), tl.zeros((BM, BM), tl.float32)
    by_keys, read = tl.zeros((BM, BV), tl.float32), tl.zeros((BM, BV), tl.float32)
    states += cell * state_cell + head * DK * DV
    keys, queries = keys + row * key_row + group * DK, queries + row * query_row + group * DK
    for start in range(0, DK, BD):
        dim = start + tl.arange(0, BD)
        k = _load_nodes(keys, key_node, start, DK, M, BM, BD)
        q = _load_nodes(queries, query_node, start, DK, M, BM, BD)
        inside = (dim < DK)[:, None] & (column < DV)[None, :]
        state = tl.load(states + dim[:, None] * DV + column[None, :], mask=inside, other=0.0).to(tl.float32)
        if KEEP:
            if block == 0 and head % (H // G) == 0:
                _keep_nodes(kept_keys + group * DK, cell, k, kept_key_cell, G * DK, start, DK, M, BM, BD)
        if BY_DIM:
            g = _load_nodes(gates + row * gate_row + head * DK, gate_node, start, DK, M, BM, BD)
            if KEEP:
                if block == 0:
                    _keep_nodes(kept_gates + head * DK, cell, g, kept_gate_cell, H * DK, start, DK, M, BM, BD)
            total = tl.dot(visible.to(tl.float32), g, input_precision=PRECISION)
            of_keys, of_queries = _decayed_products(k, q, total, M, BM)
            products, scores = products + of_keys, scores + of_queries
            reach = tl.exp(total)
            k, q = k * reach, q * reach
        else:
            if DELTA:
                products += tl.dot(k, tl.trans(k), input_precision=PRECISION)
            scores += tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if DELTA:
            by_keys += tl.dot(k, state, input_precision=PRECISION)
        read += tl.dot(q, state, input_precision=PRECISION)
    if BY_DIM:
        products, scores = tl.where(visible, products, 0.0), tl.where(visible, scores, 0.0)
    else:
        g1 = tl.load(gates + row * gate_row + node * gate_node + head, mask=is_node, other=0.0).to(tl.float32)
        of_path = tl.sum(tl.where(visible, g1[None, :], 0.0), 1)
        decay = tl.exp(tl.where(visible, of_path[:, None] - of_path[None, :], float("-inf")))
        products, scores = products * decay, scores * decay
        reach1 = tl.exp(of_path)[:, None]
        by_keys, read = by_keys * reach1, read * reach1
        if KEEP:
            if block == 0:
                tl.store(kept_gates + cell * kept_gate_cell + node * H + head, g1, mask=is_node)
    written = _load_nodes(values + row * value_row + head * DV, value_node, block * BV, DV, M, BM, BV)
    if KEEP:
        _keep_nodes(kept_values + head * DV, cell, written, kept_value_cell, H * DV, block * BV, DV, M, BM, BV)
    if DELTA:
        beta = tl.load(betas + row * beta_row + node * beta_node + head, mask=is_node, other=0.0).to(tl.float32)
        if KEEP:
            if block == 0:
                tl.store(kept_betas + cell * kept_beta_cell + node * H + head, beta, mask=is_node)
        depth = tl.sum(visible.to(tl.int32), 1)  # 1 for roots, 0 for padding
        wanted = beta[:, None] * (written - by_keys)
        system = tl.where(node[:, None] > node[None, :], beta[:, None] * products, 0.0)
        written = tl.where((depth == 1)[:, None], wanted, 0.0)
        for level in range(2, tl.max(depth, 0) + 1):
            of_ancestors = tl.dot(system, written, input_precision=PRECISION)
            written = tl.where((depth == level)[:, None], wanted - of_ancestors, written)
    read += tl.dot(scores, written, input_precision=PRECISION)
    place = out + (row * M + node[:, None]) * H * DV + head * DV + column[None, :]
    tl.store(place, read, mask=is_node[:, None] & (column < DV)[None, :])


@triton.jit
def _replay_kernel(states, keys, values, gates, betas, cells, places, counts, state_layer, state_cell, key_layer,
                   key_cell, value_layer, value_cell, gate_layer, gate_cell, beta_layer, beta_cell, places_row, B, H,
                   G, DK, DV, BK: tl.constexpr, BV: tl.constexpr, DELTA: tl.constexpr,
                   BY_DIM: tl.constexpr):  # fmt: skip
    """One program owns a head of a row in a layer and a block of columns of its state; tokens come one by one."""
    block, head = tl.program_id(0), tl.program_id(1) % H
    row, layer = tl.program_id(1) // H % B, (tl.program_id(1) // H // B).to(tl.int64)
    group, cell = head // (H // G), tl.load(cells + row).to(tl.int64)
    dim, column = tl.arange(0, BK), block * BV + tl.arange(0, BV)
    is_dim, is_column = dim < DK, column < DV
    where = states + layer * state_layer + cell * state_cell + head * DK * DV + dim[:, None] * DV + column[None, :]
    inside = is_dim[:, None] & is_column[None, :]
    state = tl.load(where, mask=inside, other=0.0).to(tl.float32)
    keys += layer * key_layer + cell * key_cell + group * DK
    values += layer * value_layer + cell * value_cell + head * DV
    gates += layer * gate_layer + cell * gate_cell
    count = tl.load(counts + row)
    for step in range(count):
        place = tl.load(places + row * places_row + step)
        k = tl.load(keys + place * G * DK + dim, mask=is_dim, other=0.0).to(tl.float32)
        added = tl.load(values + place * H * DV + column, mask=is_column, other=0.0).to(tl.float32)
        if BY_DIM:
            g = tl.load(gates + (place * H + head) * DK + dim, mask=is_dim, other=0.0).to(tl.float32)
            state = state * tl.exp(g)[:, None]
        else:
            state = state * tl.exp(tl.load(gates + place * H + head).to(tl.float32))
        if DELTA:
            beta = tl.load(betas + layer * beta_layer + cell * beta_cell + place * H + head).to(tl.float32)
            added = beta * (added - tl.sum(state * k[:, None], 0))
        state += k[:, None] * added[None, :]
    if count > 0:
        tl.store(where, state, mask=inside)


def _parts(inputs: tuple[Tensor, ...]) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], bool]:
    """Keys, values, gates and betas of a rule's inputs (the gates again where it has none), and whether it has them."""
    delta = len(inputs) == 4
    keys, values, gates = inputs[:3]
    return (keys, values, gates, inputs[3] if delta else gates), delta


def launch_tree(states: Tensor, cells: Tensor, inputs: tuple[Tensor, ...], queries: Tensor, sees: Tensor | None,
                kept: tuple[Tensor, ...] | None) -> Tensor:  # fmt: skip
    """Outputs `[B, M, H, Dv]` in float32; see `attention.recurrent.nodes.run_nodes`.

    states: `[cells, H, Dk, Dv]`, contiguous; inputs: of `delta_rule` or `state_space`, with contiguous tokens
    sees: uint8 `[B, M, M]`, contiguous but for rows that may be one; kept: `[cells, room, *]` each, contiguous"""
    (keys, values, gates, betas), delta = _parts(inputs)
    kept_parts = _parts(inputs if kept is None else kept)[0]
    (rows, nodes, heads, dv), (groups, dk) = values.shape, keys.shape[2:]
    out, sees_row = values.new_empty(rows, nodes, heads, dv), 0 if sees is None or len(sees) == 1 else sees.stride(0)
    block_m, block_d = max(16, triton.next_power_of_2(nodes)), min(32, max(16, triton.next_power_of_2(dk)))
    # few heads are cut into more blocks, so that all multiprocessors have work
    block_v = min(max(16, triton.next_power_of_2(dv)), 32 if rows * heads < 256 else 64)
    mask = keys if sees is None else sees
    tensors = (keys, values, gates, betas, queries)
    _tree_kernel[(triton.cdiv(dv, block_v), rows * heads)](
        states, cells, *tensors, mask, out, *kept_parts, states.stride(0),
        *[stride for x in tensors for stride in x.stride()[:2]], sees_row,
        *[x.stride(0) for x in kept_parts], nodes, heads, groups, dk, dv, BM=block_m, BD=block_d, BV=block_v,
        DELTA=delta, BY_DIM=gates.shape[-1] > 1, TREE=sees is not None, KEEP=kept is not None,
        PRECISION="tf32x3", num_warps=8 if block_m == MAX_NODES else 4,
    )  # fmt: skip
    return out


def launch_replay(states: Tensor, kept: tuple[Tensor, ...], cells: Tensor, places: Tensor, counts: Tensor) -> None:
    """Run kept tokens from the states on, in place; see `attention.recurrent.nodes.replay_nodes`.

    states: `[layers, cells, H, Dk, Dv]`; kept: `[layers, cells, room, *]` each, of a rule's inputs; both contiguous"""
    (keys, values, gates, betas), delta = _parts(kept)
    layers, _, heads, dk, dv = states.shape
    rows, groups = len(cells), keys.shape[3]
    block_k, block_v = max(16, triton.next_power_of_2(dk)), min(32, max(16, triton.next_power_of_2(dv)))
    strides = [stride for x in (states, keys, values, gates, betas) for stride in x.stride()[:2]]
    _replay_kernel[(triton.cdiv(dv, block_v), layers * rows * heads)](
        states, keys, values, gates, betas, cells, places, counts, *strides, places.stride(0), rows, heads, groups,
        dk, dv, BK=block_k, BV=block_v, DELTA=delta, BY_DIM=gates.shape[-1] > 1, num_warps=4,
    )  # fmt: skip
