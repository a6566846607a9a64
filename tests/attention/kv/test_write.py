"""The writer and the row moves against plain loops, on a GPU or in Triton's interpreter; the quantised numbers against
the reference, bit for bit.
"""

import pytest
import torch
from torch import Tensor

from attention import PagedKVCache
from attention.dispatch import triton_available
from attention.kv.move import move_rows
from attention.kv.quantization import quantise
from attention.kv.write import write_kv
from tests.attention.devices import DEVICE, LOW_PRECISION

needs_triton = pytest.mark.skipif(not triton_available(torch.device(DEVICE)), reason="needs triton")
every_impl = pytest.mark.parametrize("impl", ["reference", pytest.param("triton", marks=needs_triton)])
every_format = pytest.mark.parametrize("kv_dtype", [None, "int8", "fp8"])


@pytest.mark.parametrize("layer", [-1, 2])
def test_a_layer_outside_the_cache_is_refused(layer):
    cache, x = empty_cache(), torch.zeros(1, 3, 64, device=DEVICE)
    with pytest.raises(ValueError, match=f"one of the cache's 2, got {layer}"):
        write_kv(cache, layer, x, x, torch.zeros(1, dtype=torch.int64, device=DEVICE))


def empty_cache(
    groups: int = 3, dims: tuple[int, int] = (64, 64), dtype: torch.dtype = torch.float32, kv_dtype: str | None = None
) -> PagedKVCache:
    """2 layers of 5 pages of 7 tokens, every byte 0x7f: NaN as a float, and no number that a writer stores."""
    cache = PagedKVCache(2, 5, 7, groups, *dims, dtype=dtype, device=DEVICE, kv_dtype=kv_dtype)
    for memory in memories(cache):
        memory.view(torch.uint8).fill_(0x7F)
    return cache


def memories(cache: PagedKVCache) -> list[Tensor]:
    return [t for t in (cache.key_pages, cache.value_pages, cache.key_scales, cache.value_scales) if t is not None]


def contents(cache: PagedKVCache) -> list[Tensor]:
    """A copy of all of its memory as bytes `[layers, slots, bytes]`."""
    return [t.view(2, 35, -1).view(torch.uint8).clone() for t in memories(cache)]


def new_tokens(count: int, groups: int, dim: int, dtype: torch.dtype, seed: int) -> Tensor:
    """`[T, G, D]`; heads of very different size, one all zero."""
    x = (
        torch.randn(count, groups, dim, generator=torch.Generator().manual_seed(seed))
        * 10.0 ** torch.arange(-2, groups - 2)[:, None]
    )
    x[0, 0] = 0
    return x.to(DEVICE, dtype)


def check_write(cache: PagedKVCache, layer: int, key: Tensor, value: Tensor, slots: list[int], impl: str) -> None:
    """Exactly the slots of one layer change, to exactly what the formats' reference gives."""
    before = contents(cache)
    write_kv(cache, layer, key, value, torch.tensor(slots, dtype=torch.int64, device=DEVICE), impl=impl)
    after = contents(cache)
    kept = [t for t, slot in enumerate(slots) if slot >= 0]
    rows = [slots[t] for t in kept]
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old[1 - layer], new[1 - layer])
        others = [slot for slot in range(35) if slot not in rows]
        assert torch.equal(old[layer, others], new[layer, others])
    stored = [
        (cache.key_slots, getattr(cache, "key_scale_slots", None), key),
        (cache.value_slots, getattr(cache, "value_scale_slots", None), value),
    ]
    for pages, scales, x in stored:
        got, x = pages[layer][rows], x[kept]
        if cache.kv_dtype is None:
            assert torch.equal(got, x)
            continue
        q, scale = quantise(x, cache.kv_dtype)
        if impl == "triton" and cache.kv_dtype == "fp8" and DEVICE == "cpu":  # all but the cast itself can be compared
            from tests.attention.fp8_cast import cast_to_fp8

            q = cast_to_fp8(x.float() / scale[..., None])
        assert torch.equal(scales[layer][rows], scale)
        assert torch.equal(got.view(torch.uint8), q.view(torch.uint8))


SHAPES = [
    (1, (64, 64)),
    (3, (80, 80)),
    (2, (96, 96)),
    (8, (128, 128)),
    (1, (256, 256)),
    (3, (64, 128)),
    (5, (80, 17)),
    (32, (256, 96)),
]


@every_impl
@every_format
@pytest.mark.parametrize(("groups", "dims"), SHAPES)
def test_writes_exactly_its_slots(groups, dims, kv_dtype, impl):
    cache = empty_cache(groups, dims, kv_dtype=kv_dtype)
    slots = [34, 0, 13, 7, -1, 6]
    key, value = (new_tokens(len(slots), groups, dim, torch.float32, seed) for seed, dim in enumerate(dims))
    check_write(cache, 1, key, value, slots, impl)


@every_impl
@every_format
@pytest.mark.parametrize("dtype", [torch.float64, *LOW_PRECISION, torch.bfloat16], ids=str)
def test_every_dtype(dtype, kv_dtype, impl):
    """Storing needs no arithmetic, so bfloat16 runs in the interpreter too; quantising it is done in float32."""
    cache = empty_cache(2, (80, 64), dtype, kv_dtype)
    key, value = (new_tokens(3, 2, dim, dtype, 0) for dim in (80, 64))
    check_write(cache, 0, key, value, [3, 21, 14], impl)


@every_impl
@every_format
def test_inputs_of_any_strides(kv_dtype, impl):
    """What models pass: [1, G, T, D] transposed, a slice of one fused projection, and every second number."""
    x = new_tokens(8, 4, 160, torch.float32, 0)
    for key in (
        x.transpose(0, 1).contiguous().transpose(0, 1)[..., :80],
        x[..., 40:120],
        x[..., ::2],
        x[::2, :, 80:].repeat_interleave(2, 0),
    ):
        assert key.shape == (8, 4, 80)
        check_write(empty_cache(4, (80, 80), kv_dtype=kv_dtype), 0, key, x[..., 80:], [9, 2, 33, 4, 11, 12, 0, 8], impl)


@every_impl
@every_format
@pytest.mark.parametrize("slots", [[], [-1, -7]])
def test_no_token_to_write(slots, kv_dtype, impl):
    x = new_tokens(2, 3, 64, torch.float32, 0)[: len(slots)]
    check_write(empty_cache(kv_dtype=kv_dtype), 0, x, x, slots, impl)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # the interpreter divides in numpy
@every_impl
@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_a_key_that_is_not_finite_is_not_stored_as_a_number(kv_dtype, impl):
    cache = empty_cache(kv_dtype=kv_dtype)
    x = torch.ones(3, 3, 64, device=DEVICE)
    x[1, 1, 63], x[2, 2, 0] = float("nan"), float("inf")
    write_kv(cache, 0, x, x, torch.tensor([4, 5, 6], device=DEVICE), impl=impl)
    finite = cache.key_scale_slots[0][4:7].isfinite()
    assert finite.equal(torch.tensor([[True, True, True], [True, False, True], [True, True, False]], device=DEVICE))


def test_arguments_that_do_not_fit_are_named():
    cache, slots = empty_cache(dims=(64, 32)), torch.tensor([1, 2], device=DEVICE)
    key, value = torch.zeros(2, 3, 64, device=DEVICE), torch.zeros(2, 3, 32, device=DEVICE)
    for bad_key, bad_value, message in [
        (key[:1], value, r"\[1, 3, 64\]"),
        (key, key, r"values \[2, 3, 32\].*\[2, 3, 64\]"),
        (key.half(), value, "float16"),
    ]:
        with pytest.raises(ValueError, match=message):
            write_kv(cache, 0, bad_key, bad_value, slots)
    with pytest.raises(ValueError, match="'cuda'"):
        write_kv(cache, 0, key, value, slots, impl="cuda")


@every_impl
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_compiles_as_one_graph(kv_dtype, backend, impl):
    """Two layers, written and read back inside the compiled function: the mutation is neither lost nor reordered."""

    def write_and_read(key, value, slots):
        for layer in range(2):
            write_kv(cache, layer, key + layer, value, slots, impl=impl)
        return [pages[:, 1].float().sum() for pages in memories(cache)]

    cache, twin = (empty_cache(kv_dtype=kv_dtype) for _ in range(2))
    for memory in (*memories(cache), *memories(twin)):
        memory.zero_()
    arguments = (
        *(new_tokens(3, 3, 64, torch.float32, seed) for seed in range(2)),
        torch.tensor([8, 30, 9], device=DEVICE),
    )
    compiled = torch.compile(write_and_read, backend=backend, fullgraph=True)(*arguments)
    ours = contents(cache)
    cache = twin
    for got, expected in zip(compiled, write_and_read(*arguments), strict=True):
        assert torch.equal(got, expected) and got != 0
    assert all(torch.equal(a, b) for a, b in zip(ours, contents(twin), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_a_gpu_quantises_every_number_as_the_reference(kv_dtype):
    """Hundreds of thousands of numbers of all sizes, the halfway points of the formats among them."""
    cache = PagedKVCache(1, 64, 64, 8, 128, dtype=torch.float32, device=DEVICE, kv_dtype=kv_dtype)
    x = torch.randn(4096, 8, 128, device=DEVICE) * torch.logspace(-30, 30, 4096, device=DEVICE)[:, None, None]
    x[::2, :, 0] = 127.0
    x[::2, :, 1:] = torch.randint(-254, 255, (2048, 8, 127), device=DEVICE) / 2
    write_kv(cache, 0, x, -x, torch.arange(4096, device=DEVICE))
    for slots, scales, y in (
        (cache.key_slots, cache.key_scale_slots, x),
        (cache.value_slots, cache.value_scale_slots, -x),
    ):
        q, scale = quantise(y, kv_dtype)
        assert torch.equal(scales[0], scale) and torch.equal(slots[0].view(torch.uint8), q.view(torch.uint8))


@pytest.mark.gpu
def test_slots_after_two_to_the_31_numbers():
    """A layer of 2.2e9 numbers: 32-bit address arithmetic would wrap."""
    cache = PagedKVCache(2, 1056, 1024, 8, 256, 8, dtype=torch.float16, device=DEVICE)
    last = 1056 * 1024 - 1
    key, value = (
        torch.ones(1, 8, 256, device=DEVICE, dtype=torch.float16),
        torch.ones(1, 8, 8, device=DEVICE, dtype=torch.float16),
    )
    write_kv(cache, 1, key, value, torch.tensor([last], device=DEVICE))
    assert torch.equal(cache.key_slots[1][last], key[0]) and torch.equal(cache.value_slots[1][last], value[0])
    move_rows([cache.key_pages.view(2, last + 1, -1)], *(torch.tensor(x, device=DEVICE) for x in ([last], [3], [0, 1])))
    assert torch.equal(cache.key_slots[1][3], key[0])


@every_impl
def test_values_in_keys_are_not_written_again(impl):
    """What a value would hold beside its key is ignored."""
    cache = PagedKVCache(2, 5, 7, 1, 24, 16, device=DEVICE, values_in_keys=True)
    cache.key_pages.fill_(float("nan"))
    key = torch.randn(3, 1, 24, device=DEVICE)
    slots = torch.tensor([4, -1, 30], device=DEVICE)
    write_kv(cache, 1, key, torch.full((3, 1, 16), float("nan"), device=DEVICE), slots, impl=impl)
    assert torch.equal(cache.key_slots[1][[4, 30]], key[[0, 2]])
    assert torch.equal(cache.value_slots[1][[4, 30]], key[[0, 2], :, :16])
    assert int(cache.key_pages.isfinite().sum()) == 2 * 24
