"""Online softmax of a tile of queries over a range of a sequence's keys (Milakov and Gimelshein 2018).

Scores are in units of log2; `s` are those of a tile of keys, `m` the maximum so far:

    s = scale * log2(e) * <q, k>      m' = max(m, max s)      p = 2^(s - m')
    total = total * 2^(m - m') + sum p        acc = acc * 2^(m - m') + p v

Keys of more than 256 columns come as two tiles, the first MAIN columns and the rest, for widths that are far from a
power of two (576 = 512 + 64). Where values are the first columns of keys (latents), the first tile is both.

Quantised pages: q . (k_scale k) = k_scale (q . k), and p (v_scale v) = (p v_scale) v, so scales multiply rows of
scores, never tiles of keys."""

import triton
import triton.language as tl

from attention.paged.tiles_kernel import even_and_odd, load_scales, load_tile, look_up, tile_visible, widen


@triton.jit
def _halves(x):
    """The even and the odd columns."""
    return tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))


@triton.jit
def products(q, k, PRECISION: tl.constexpr):
    """`q [M, D]` times `k [N, D]`, `[M, N]`; in float32 ("ieee") the products of wide heads are added in four parts,
    since a long sum in its order loses a digit."""
    if PRECISION == "ieee" and q.shape[1] >= 256:
        q_even, q_odd = _halves(q)
        k_even, k_odd = _halves(k)
        q0, q1 = _halves(q_even)
        k0, k1 = _halves(k_even)
        q2, q3 = _halves(q_odd)
        k2, k3 = _halves(k_odd)
        s = tl.dot(q0, tl.trans(k0), input_precision=PRECISION) + tl.dot(q1, tl.trans(k1), input_precision=PRECISION)
        s += tl.dot(q2, tl.trans(k2), input_precision=PRECISION) + tl.dot(q3, tl.trans(k3), input_precision=PRECISION)
    else:
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    return s


@triton.jit
def online_softmax(acc, odd, peak, total, m, q, q_rest, begin, end, k_pages, v_pages, k_scales, v_scales, table,
                   length, scale, softcap, index, first_node, bit_rows, position, tree_positions_end,
                   G: tl.constexpr, P: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, MAIN: tl.constexpr,
                   D_PAD: tl.constexpr, REST_PAD: tl.constexpr, DV_PAD: tl.constexpr, BLOCK_N: tl.constexpr,
                   WORDS: tl.constexpr, WINDOW: tl.constexpr, FIRST: tl.constexpr, SOFTCAP: tl.constexpr,
                   QUANTISED: tl.constexpr, IN_KEYS: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
                   STAGES: tl.constexpr):  # fmt: skip
    """Continue (acc, odd, peak, total, m) over the keys begin .. end - 1, both multiples of BLOCK_N.

    MASKED: some rows do not see some of the keys. Quantised values come as 16-bit pairs of columns, since a product
    over keys needs pairs of keys and shared memory is read 16 bits wide; `acc` then has the even columns and `odd` the
    odd ones, both in units of `peak`, the largest scale so far, because float16 has little range."""
    n = tl.arange(0, BLOCK_N)
    limit = tl.minimum(end, length)
    page = look_up(table, begin, limit, P, BLOCK_N)
    for key in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        j = key + n
        inside = j < length
        if P % BLOCK_N == 0:  # one 64-bit address; the rest of the tile is at constant offsets
            first = page * P + key % P
            offsets = n
        else:
            first = 0
            offsets = page * P + j % P
        page = look_up(table, key + BLOCK_N, limit, P, BLOCK_N)  # one tile ahead: no load of keys waits for a lookup
        k = load_tile(k_pages, first, offsets, inside, G * D, MAIN, D_PAD, MASKED)
        s = products(q, widen(k, q.dtype), PRECISION)
        if REST_PAD > 0:
            k_rest = load_tile(k_pages + MAIN, first, offsets, inside, G * D, D - MAIN, REST_PAD, MASKED)
            s = tl.dot(q_rest, tl.trans(widen(k_rest, q.dtype)), s, input_precision=PRECISION)
        if QUANTISED:
            s = s * load_scales(k_scales, first, offsets, inside, G, MASKED)[None, :]
        s_scale = scale
        if SOFTCAP:  # cap * tanh(x) through 2^(2 x log2 e)
            s = softcap * (1 - 2 / (1 + tl.exp2(s * scale)))
            s_scale = 1.0
        if MASKED:
            visible = tile_visible(
                key, length, index, first_node, bit_rows, position, tree_positions_end, BLOCK_N, WORDS, WINDOW, FIRST
            )
            s = tl.where(visible, s, float("-inf"))
        if QUANTISED:  # rows may have different units
            s = s * s_scale
            s_scale = 1.0
        m_new = tl.maximum(m, tl.max(s, 1) * s_scale)
        shift = m_new
        if MASKED:
            shift = tl.where(m_new > float("-inf"), m_new, 0.0)
        p = tl.exp2(s * s_scale - shift[:, None])
        alpha = tl.exp2(m - shift)
        total = total * alpha + tl.sum(p, 1)
        if QUANTISED:
            scales = load_scales(v_scales, first, offsets, inside, G, MASKED)
            pairs = load_tile(v_pages, first, offsets, inside, G * (DV // 2), DV // 2, DV_PAD // 2, MASKED)
            v_even, v_odd = even_and_odd(pairs, k.dtype, q.dtype)
            larger = tl.maximum(peak, tl.max(scales, 0))
            alpha *= peak / larger
            p = (p * (scales / larger)[None, :]).to(q.dtype)
            acc = tl.dot(p, v_even, acc * alpha[:, None], input_precision=PRECISION)
            odd = tl.dot(p, v_odd, odd * alpha[:, None], input_precision=PRECISION)
            peak = larger
        else:
            acc = acc * alpha[:, None]
            if IN_KEYS:
                v = k
            else:
                v = load_tile(v_pages, first, offsets, inside, G * DV, DV, DV_PAD, MASKED)
            acc = tl.dot(p.to(q.dtype), v, acc, input_precision=PRECISION)
        m = m_new
    return acc, odd, peak, total, m
