import json
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from attention.paged.batch import ancestor_bits
from scripts import bench_table
from scripts.attention_bench import peers as attention_peers
from scripts.attention_bench import rows as attention_rows
from scripts.attention_bench.bench import Bench, bar, best, measure, ratio
from scripts.attention_bench.cases import (
    Case,
    chain,
    depths,
    exact_rows,
    filled_cache,
    prepare,
    random_tree,
    sampled_error,
    sampled_rows,
    tail_mask,
)
from scripts.attention_bench.peers import Peer
from scripts.attention_bench.rows import measure_ours, measure_peer, paged_row
from scripts.common import gpu_timing

torch.set_num_threads(1)  # tiny tensors: waiting threads would cost ten times more on shared cores

CPU = torch.device("cpu")
LIMITS = {"copy_bytes": 2e9, "read_bytes": 1e9, "matmul_flops": 1e10}
CASES = ("prefill", "decode", "verify", "tree", "write", "quant", "mixed")
PEERS = ("FA3", "FlashInfer", "FlexAttention", "SDPA flash", "SDPA cuDNN")


def toy(queries=5, parents=True, **other):
    tree = random_tree(queries) if parents else ()
    return Case(
        "tree",
        2,
        70,
        queries,
        tree,
        **{**dict(heads=4, kv_heads=2, head_dim=64, page=16, dtype=torch.float32), **other},
    )


def bench(present=(), **other):
    peers = {name: Peer(name, "1", None if name in present else "not here") for name in PEERS}
    return Bench(
        CPU, LIMITS, peers, **{**dict(size="toy", clock=gpu_timing.time_on_cpu, calls=1, dtype=torch.float32), **other}
    )


def clock_of(seconds):
    return lambda call, calls: (gpu_timing.Timing(seconds, 0.0, calls, 5), [call(i) for i in range(calls)])


@pytest.mark.parametrize("nodes", [1, 2, 26, 64, 200])
def test_a_random_tree_is_one_and_its_mask_is_that_of_the_ancestor_bits(nodes):
    parents = random_tree(nodes)
    assert (
        len(parents) == nodes
        and parents[0] is None
        and all(0 <= parent < node for node, parent in enumerate(parents) if node)
    )
    bits = [sum((word % (1 << 64)) << 64 * w for w, word in enumerate(words)) for words in ancestor_bits(parents)]
    assert tail_mask(parents).tolist() == [[bool(row >> n & 1) for n in range(nodes)] for row in bits]
    assert depths(parents) == [int(row.sum()) - 1 for row in tail_mask(parents)]


def test_a_chain_is_causal():
    assert torch.equal(tail_mask(chain(5)), torch.ones(5, 5, dtype=torch.bool).tril())


def test_visible_pairs_bytes_and_operations_are_counted():
    case = toy(queries=3, parents=False)
    assert case.visible().sum(1).tolist() == [68, 69, 70]
    assert case.flops == 4 * 2 * 4 * 64 * (68 + 69 + 70)
    assert case.kv_bytes == 2 * 70 * 2 * 64 * 4 * 2
    assert case.bytes == case.kv_bytes + 2 * (2 * 3 * 4 * 64) * 4
    assert replace(case, kv_dtype="int8").kv_bytes == 2 * 70 * 2 * (64 + 4) * 2
    tree = replace(case, parents=(None, 0, 0))
    assert tree.visible().sum(1).tolist() == [68, 69, 69] and tree.flops < case.flops


@pytest.mark.parametrize(
    "wrong", [dict(queries=71), dict(queries=0), dict(heads=5), dict(page=48), dict(parents=(None, 0))]
)
def test_a_case_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(ValueError):
        replace(toy(), **wrong)


def test_tables_are_permutations_and_pages_come_in_random_order():
    memory = prepare(toy(), CPU)
    for size in (16, 64, 256):
        table = memory.table(size)
        assert table.shape == (2, -(-70 // size)) and table.dtype == torch.int32
        assert len(set(table.flatten().tolist())) == table.numel() and torch.equal(table, memory.table(size))
        keys, values = memory.pages(0, size)
        assert (
            keys.shape == values.shape == (512 // size, size, 2, 64)
            and keys.data_ptr() == memory.cache.key_pages.data_ptr()
        )
    pages = memory.batch.block_tables.flatten().tolist()
    assert len(set(pages)) == len(pages) and pages != sorted(pages) and pages != sorted(pages, reverse=True)
    cache = filled_cache(toy(), CPU, 3)
    assert cache.free_pages == cache.num_pages == 32 and all(
        bool(x.isfinite().all()) and float(x.std()) > 0.9 for x in (cache.key_pages, cache.value_pages)
    )


def test_sampled_rows_hold_the_first_and_the_last():
    picked = dict(sampled_rows(replace(toy(), batch=9)))
    assert {0, 8} <= set(picked) and all({0, 4} <= set(rows) for rows in picked.values())
    assert dict(sampled_rows(Case("decode", 1, 70))) == {0: [0]}


def test_exact_rows_agree_with_torch():
    q, k, v = torch.randn(3, 4, 64), torch.randn(70, 2, 64), torch.randn(70, 2, 64)
    visible = toy(queries=3, parents=False).visible()
    wide = [x.double().transpose(0, 1)[None] for x in (q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))]
    expected = torch.nn.functional.scaled_dot_product_attention(*wide, attn_mask=visible, scale=0.1)[0].transpose(0, 1)
    assert torch.allclose(exact_rows(q, k, v, visible, 0.1), expected, atol=1e-12)


def test_the_check_notices_a_wrong_page_a_wrong_mask_and_nan():
    memory = prepare(toy(), CPU)
    out = attention_rows.paged_attention(memory.queries[0], 0, memory.batch, memory.scale)
    table = memory.batch.block_tables
    assert sampled_error(memory, out, 0, table, 16) < 1e-6
    assert sampled_error(memory, out, 0, table.roll(1, 1), 16) > 1e-2
    assert sampled_error(memory, out, 0, table, 16, replace(memory.case, parents=chain(5)).visible()) > 1e-2
    out[-1, -1, -1] = math.nan
    assert math.isnan(sampled_error(memory, out, 0, table, 16))


def test_no_speed_is_printed_for_a_wrong_result(monkeypatch):
    monkeypatch.setattr(attention_rows, "paged_attention", lambda query, *_, **__: torch.zeros_like(query))
    row = paged_row(bench(), toy(), "a tree", (), lambda ours, _: [bar("speed", ratio(1.0, ours), 1.0)])
    assert row["ours"]["wrong"] and row["ours"]["error"] == pytest.approx(1)
    assert not {"seconds", "spread", "bytes_per_s", "flops_per_s", "fraction"} & set(row["ours"])
    line = bench_table.row_line(row, bars=True)
    assert "WRONG (error 1e+00)" in line and "µs" not in line and "TB/s" not in line and "unknown" in line


@pytest.mark.parametrize(("error", "kept"), [(math.nan, None), (math.inf, None), (0.5, 0.5)])
def test_nan_is_wrong_and_json_holds_no_nan(error, kept):
    result = measure("x", lambda i: i, lambda outputs: error, 1e-2, clock_of(1.0), 1)
    assert result == {"name": "x", "error": kept, "wrong": True}
    assert "seconds" not in json.dumps(result, allow_nan=False)


def test_a_failing_peer_says_why_and_the_others_go_on():
    def refuse(_):
        raise ValueError("head dim 77\nis odd")

    result = measure("x", refuse, lambda outputs: 0.0, 1e-2, clock_of(1.0), 1, page=16)
    assert result == {"name": "x", "page": 16, "failed": "ValueError: head dim 77"}
    assert bench_table.result_text(result) == "x@16 failed (ValueError: head dim 77)"


def test_ratio_bar_and_best():
    fast, slow, wrong = (
        {"name": "a", "seconds": 1.0},
        {"name": "b", "seconds": 2.0},
        {"name": "c", "wrong": True, "error": 1.0},
    )
    assert best([slow, wrong, fast]) is fast and best([slow, fast], "b") is slow and best([wrong]) is None
    assert ratio(slow, fast) == 2 and ratio(slow, wrong) is None and ratio(None, fast) is None
    assert (
        bar("x", 1.1, 1.1)["met"]
        and not bar("x", 2.9, 3.0, at_most=False)["met"]
        and bar("x", None, 1.0)["met"] is None
    )


def test_limits_take_the_larger_of_bytes_and_operations():
    at = bench()
    assert at.limit(4e9, 0) == 2 and at.limit(0, 3e10) == 3 and at.limit(4e9, 3e10) == 3
    row = attention_rows.record(at, "decode", "x", {"name": "ours", "seconds": 4.0}, [], 4e9, 1e9)
    assert row["ours"]["fraction"] == 0.5 and row["ours"]["bytes_per_s"] == 1e9 and row["limited_by"] == "memory"


@pytest.mark.parametrize("case", [toy(), toy(3, parents=False), toy(1, parents=False), toy(heads=6), toy(page=1)])
def test_ours_is_right_at_toy_sizes(case):
    result = measure_ours(bench(), prepare(case, CPU, 2))
    assert result["error"] < 1e-6 and result["seconds"] > 0


def test_ours_is_right_in_the_interpreter():
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the kernels are compiled where there is a GPU")
    case = Case("tree", 1, 20, 3, random_tree(3), heads=2, kv_heads=1, head_dim=64, page=16, dtype=torch.float32)
    assert measure_ours(bench(impl="triton"), prepare(case, CPU))["error"] < 1e-5


@pytest.mark.parametrize(("kv_dtype", "low", "high"), [("int8", 1e-3, 2e-2), ("fp8", 1e-2, 6e-2)])
def test_the_error_of_8_bit_pages_is_that_against_the_numbers_before(kv_dtype, low, high):
    assert low < measure_ours(bench(), prepare(toy(kv_dtype=kv_dtype), CPU))["error"] < high


def paged_stand_in(q, k, v, cu_q, cu_k, used_k, max_q, max_k, table, scale):
    """Causal attention over pages in plain torch, with the arguments that FA3's operator gets."""
    outs = []
    for b, length in enumerate(used_k.tolist()):
        slots = (table[b].long()[:, None] * k.shape[1] + torch.arange(k.shape[1])).flatten()[:length]
        n = int(cu_q[b + 1] - cu_q[b])
        causal = torch.ones(n, length, dtype=torch.bool).tril(length - n)
        outs.append(exact_rows(q[cu_q[b] : cu_q[b + 1]], k.flatten(0, 1)[slots], v.flatten(0, 1)[slots], causal, scale))
    return torch.cat(outs).to(q.dtype)


def test_a_tree_on_fa3_is_checked_and_labelled_as_causal(monkeypatch):
    monkeypatch.setattr(attention_peers, "_fa3", paged_stand_in)
    result = measure_peer(bench(present=("FA3",)), prepare(toy(), CPU), "FA3")
    assert result["error"] < 1e-6 and result["note"] == "causal, no tree" and result["page"] == 64
    assert "(causal, no tree)" in bench_table.result_text(result)


def test_the_best_right_page_is_kept(monkeypatch):
    def build(memory, size):
        if size == 16:
            raise ValueError("pages of 16 are not taken")
        call = attention_peers.fa3_paged(memory, size)
        return lambda layer: (
            torch.full_like(call(layer), math.nan) if size == 64 else call(layer)
        )  # the quickest is wrong

    def clock(call, calls):
        outputs = [call(0)]
        size = next(sizes)
        return gpu_timing.Timing(size * 1e-6, 0.0, 1, 5), outputs

    sizes = iter((64, 128, 256))
    monkeypatch.setattr(attention_peers, "_fa3", paged_stand_in)
    monkeypatch.setitem(attention_peers.PAGED, "FlashInfer", build)
    result = measure_peer(bench(size="full", clock=clock), prepare(toy(3, parents=False), CPU), "FlashInfer")
    assert result["page"] == 128 and result["seconds"] == 128e-6
    assert result["pages"] == {"16": None, "64": None, "128": 128e-6, "256": 256e-6}


@pytest.mark.parametrize("nodes", [5, 66])
def test_flex_attentions_mask_reads_the_ancestor_bits(monkeypatch, nodes):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    memory = prepare(toy(nodes), CPU)
    result = measure_peer(bench(), memory, "FlexAttention")
    assert result["error"] < 1e-5 and "page" not in result


def test_peers_give_their_result_once_for_a_shape(monkeypatch):
    built = []
    monkeypatch.setattr(attention_peers, "_fa3", paged_stand_in)
    monkeypatch.setitem(
        attention_peers.PAGED, "FA3", lambda memory, size: built.append(size) or attention_peers.fa3_paged(memory, size)
    )
    at = bench(present=("FA3",))
    rows = [paged_row(at, toy(page=page), "x", ("FA3", "FlashInfer"), lambda *_: []) for page in (64, 16)]
    assert (
        built == [64]
        and rows[0]["peers"] == rows[1]["peers"]
        and [peer["name"] for peer in rows[0]["peers"]] == ["FA3"]
    )


def test_absent_peers_say_why(monkeypatch, tmp_path):
    for name, found in attention_peers.find_peers(CPU).items():
        assert found.name == name and "CUDA" in found.absent
    monkeypatch.delenv("SPECDEC_FA3_LIBRARY", raising=False)
    monkeypatch.setattr(attention_peers.importlib.util, "find_spec", lambda name: None)
    assert "SPECDEC_FA3_LIBRARY is not set" in attention_peers._find_fa3().absent
    monkeypatch.setenv("SPECDEC_FA3_LIBRARY", str(tmp_path / "none.so"))
    assert "none.so does not load" in attention_peers._find_fa3().absent
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    assert attention_peers._find_flashinfer().absent.startswith("ModuleNotFoundError")
    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace(__version__="0.2.6"))
    assert attention_peers._find_flashinfer() == Peer("FlashInfer", "0.2.6", None)
