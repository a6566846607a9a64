"""Flash attention: reference and kernels against a float64 oracle that loops over sequences and heads, forward,
log-sum-exp and gradients.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from attention.flash.api import flash_attention, flash_implementation
from tests.attention.devices import DEVICE, LOW_PRECISION


@dataclass(frozen=True)
class Case:
    """One batch: `lengths` are (queries, keys) per sequence; a dense batch has equal ones."""

    lengths: tuple[tuple[int, int], ...] = ((19, 19), (19, 19))
    heads: tuple[int, int] = (4, 2)  # query heads, kv heads
    dim: int = 16
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    scale: float | None = None
    packed: bool = False
    dtype: torch.dtype = torch.float32

    def options(self) -> dict:
        """The keywords of `flash_attention`."""
        options = dict(causal=self.causal, window=self.window, softcap=self.softcap, scale=self.scale)
        if self.packed:
            queries, keys = ([n for pair in self.lengths for n in pair[i::2]] for i in (0, 1))
            options |= dict(
                cu_seqlens_q=cumulative(queries),
                cu_seqlens_k=cumulative(keys),
                max_seqlen_q=max(queries),
                max_seqlen_k=max(keys),
            )
        return options

    def tensors(self, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """query, key, value, and gradients of the output and of the log-sum-exp."""
        generator = torch.Generator().manual_seed(seed)
        draw = lambda rows, heads: torch.randn(rows, heads, self.dim, generator=generator).to(DEVICE, self.dtype)
        queries, keys = (sum(pair[i] for pair in self.lengths) for i in (0, 1))
        tensors = (
            draw(queries, self.heads[0]),
            draw(keys, self.heads[1]),
            draw(keys, self.heads[1]),
            draw(queries, self.heads[0]),
        )
        grad_lse = torch.randn(queries, self.heads[0], generator=generator).to(DEVICE)
        if not self.packed:
            return *(x.unflatten(0, (len(self.lengths), -1)) for x in tensors), grad_lse.unflatten(
                0, (len(self.lengths), -1)
            )
        return *tensors, grad_lse


def cumulative(lengths: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype, device=DEVICE)


def attend_one_head(q: Tensor, k: Tensor, v: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    """`q [S, D]`, `k [S_k, D]` -> `(out, lse)` in the inputs' dtype; rows without keys have out 0 and lse -inf."""
    scores = q @ k.T * (case.dim**-0.5 if case.scale is None else case.scale)
    if case.softcap is not None:
        scores = case.softcap * (scores / case.softcap).tanh()
    row = torch.arange(len(k) - len(q), len(k), device=q.device)[:, None]
    column = torch.arange(len(k), device=q.device)[None]
    hidden = torch.zeros(len(q), len(k), dtype=torch.bool, device=q.device)
    if case.causal:
        hidden |= column > row
    if case.window is not None:
        hidden |= column <= row - case.window
    empty = hidden.all(1)
    if not len(k):
        return q * 0, torch.full((len(q),), -math.inf, dtype=q.dtype, device=q.device)
    scores = torch.where(hidden & ~empty[:, None], -math.inf, scores)
    weights = scores.softmax(1) * ~empty[:, None]
    return weights @ v, torch.where(empty, -math.inf, scores.logsumexp(1))


def expected(case: Case, tensors: tuple[Tensor, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """out, lse, dq, dk, dv by looping over sequences and heads, in `dtype`, packed `[rows, ...]`."""
    q, k, v, grad_out, grad_lse = (x if case.packed else x.flatten(0, 1) for x in tensors)
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in (q, k, v))
    outs, lses, first_q, first_k = [], [], 0, 0
    for queries, keys in case.lengths:
        rows, columns = slice(first_q, first_q + queries), slice(first_k, first_k + keys)
        group = case.heads[0] // case.heads[1]
        heads = [
            attend_one_head(q[rows, h], k[columns, h // group], v[columns, h // group], case)
            for h in range(case.heads[0])
        ]
        outs.append(torch.stack([out for out, _ in heads], 1))
        lses.append(torch.stack([lse for _, lse in heads], 1))
        first_q, first_k = first_q + queries, first_k + keys
    out, lse = torch.cat(outs), torch.cat(lses)
    finite = lse.isfinite()  # -inf carries no gradient
    loss = (out * grad_out.to(dtype)).sum() + (lse[finite] * grad_lse.to(dtype)[finite]).sum()
    return out.detach(), lse.detach(), *torch.autograd.grad(loss, (q, k, v), materialize_grads=True)


def measured(case: Case, tensors: tuple[Tensor, ...], attend: Callable) -> tuple[Tensor, ...]:
    """The same five through `attend`, and packed."""
    q, k, v = (x.detach().requires_grad_() for x in tensors[:3])
    out, lse = attend(q, k, v)
    grads = torch.autograd.grad((out, lse), (q, k, v), tensors[3:])
    results = (out.detach(), lse.detach(), *grads)
    return results if case.packed else tuple(x.flatten(0, 1) for x in results)


def worst(results: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> list[float]:
    """Largest absolute error of each; infinities must match."""
    errors = []
    for result, right in zip(results, truth, strict=True):
        assert result.shape == right.shape
        assert torch.equal(result.isinf(), right.isinf()) and not result.isnan().any()
        differences = (result.double() - right)[~right.isinf()].abs()
        errors.append(float(differences.max()) if differences.numel() else 0.0)
    return errors


def through(impl: str, case: Case) -> Callable:
    options = case.options()
    return lambda q, k, v: flash_attention(q, k, v, return_lse=True, impl=impl, **options)


def small_tiles(case: Case) -> Callable:
    """The kernels with tiles of 16, through a plain autograd function.

    In the interpreter a tile costs the same at any size."""
    from attention.flash.backward_kernel import flash_backward
    from attention.flash.forward_kernel import FlashConfig, flash_forward
    from attention.flash.options import flash_options

    config = FlashConfig(16, 16, 4, 2)

    class Small(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            ctx.options = flash_options(q, k, v, **case.options())
            out, lse = flash_forward(q, k, v, *ctx.options[:3], *ctx.options[4:], config)
            ctx.save_for_backward(q, k, v, out, lse)
            return out, lse.unflatten(1, q.shape[:-2]).movedim(0, -1)

        @staticmethod
        def backward(ctx, grad_out, grad_lse):
            grad_lse = grad_lse.movedim(-1, 0).flatten(1)
            return flash_backward(grad_out, grad_lse, *ctx.saved_tensors, *ctx.options, config, config)

    return Small.apply


FEATURES = [
    dict(causal=c, window=w, softcap=s) for c, w, s in itertools.product((True, False), (None, 1, 7), (None, 1.5))
]
LAYOUTS = {
    "dense": Case(((19, 19), (19, 19))),
    "more keys": Case(((5, 23),), heads=(7, 1)),
    "more queries": Case(((23, 5),), heads=(3, 3)),
    "packed": Case(((17, 17), (0, 0), (1, 1), (30, 30)), packed=True),
    "packed, other keys": Case(((3, 21), (4, 0), (0, 5), (9, 2), (1, 33)), heads=(7, 1), packed=True),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("features", FEATURES, ids=str)
def test_reference_is_the_oracle(layout, features):
    case = replace(LAYOUTS[layout], **features, dtype=torch.float64)
    tensors = case.tensors()
    assert max(worst(measured(case, tensors, through("reference", case)), expected(case, tensors))) < 1e-12


def test_reference_keeps_the_dtype_and_the_scale():
    case = Case(dtype=torch.bfloat16, scale=0.7)
    tensors = case.tensors()
    out = flash_attention(*tensors[:3], impl="reference", scale=0.7)
    assert out.dtype == torch.bfloat16
    assert (out.flatten(0, 1).double() - expected(case, tensors)[0]).abs().max() < 0.02


KERNEL_CASES = [
    Case(((50, 50),), heads=(2, 1)),
    Case(((33, 33),), heads=(2, 1), causal=False, dim=20),
    Case(((20, 70),), heads=(2, 1), window=21, scale=0.6),
    Case(((70, 20),), heads=(2, 2), softcap=1.5),
    Case(((50, 50),), heads=(2, 1), window=18, softcap=2.0, dim=24),
    Case(((40, 66),), heads=(2, 1), causal=False, window=19, softcap=2.0),
    Case(((17, 17), (0, 0), (1, 1), (37, 37)), heads=(2, 1), packed=True),
    Case(((3, 37), (4, 0), (0, 5), (21, 2)), heads=(2, 1), packed=True, window=17, softcap=1.5),
    Case(((20, 20),), heads=(7, 1), packed=True),
    Case(((21, 38), (2, 2)), heads=(2, 2), packed=True, causal=False),
]


@pytest.mark.parametrize("case", KERNEL_CASES, ids=str)
def test_kernels_are_the_oracle(case):
    tensors = case.tensors()
    assert max(worst(measured(case, tensors, small_tiles(case)), expected(case, tensors))) < 1e-5


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_low_precision_kernels_are_as_good_as_pytorch(dtype):
    case = Case(((37, 37),), heads=(2, 1), dim=32, dtype=dtype)
    tensors = case.tensors()
    truth = expected(case, tensors)
    ours, theirs = (
        worst(measured(case, tensors, small_tiles(case)), truth),
        worst(expected(case, tensors, dtype), truth),
    )
    assert all(a <= 2 * b for a, b in zip(ours, theirs, strict=True)), f"{ours} against {theirs}"


@pytest.mark.parametrize("layout", ["dense", "packed, other keys"])
def test_the_operator_with_default_tiles(layout):
    """Through `flash_attention`: strided views of `[B, H, S, D]`, an expanded gradient, an unused log-sum-exp."""
    case = replace(LAYOUTS[layout], window=7)
    q, k, v, *_ = case.tensors()
    tensors = [x.transpose(-3, -2).contiguous().transpose(-3, -2).requires_grad_() for x in (q, k, v)]
    results = []
    for impl in ("triton", "reference"):
        out, lse = through(impl, case)(*tensors)
        gradients = [torch.autograd.grad(out.sum(), tensors, retain_graph=True)]
        gradients += [torch.autograd.grad(lse[lse.isfinite()].sum(), tensors[:2])] if layout == "dense" else []
        results.append([out, *itertools.chain(*gradients)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_poisoned_memory_is_never_used(impl):
    """NaN between and after dense batches, after the last packed sequence, and in another sequence."""
    case = Case(((19, 19), (19, 19)), heads=(2, 1), causal=False)
    q, k, v, grad_out, grad_lse = case.tensors()
    wide = [torch.full((2, 40, *x.shape[2:]), math.nan, device=DEVICE) for x in (q, k, v)]
    for whole, x in zip(wide, (q, k, v), strict=True):
        whole[:, :19] = x
    clean = measured(case, (q, k, v, grad_out, grad_lse), through(impl, case))
    dirty = measured(case, (*(x[:, :19] for x in wide), grad_out, grad_lse), through(impl, case))
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))

    packed = replace(case, lengths=((19, 19), (5, 5)), packed=True)
    tensors = [torch.cat([x[0], torch.full_like(x[0], math.nan)]) for x in (q, k, v, grad_out, grad_lse)]
    out, lse, *grads = measured(packed, tuple(tensors), through(impl, packed))
    alone = measured(replace(packed, lengths=((19, 19),)), tuple(x[0] for x in (q, k, v, grad_out, grad_lse)),
                     through(impl, replace(packed, lengths=((19, 19),))))  # fmt: skip
    assert all(torch.allclose(a[:19], b, atol=1e-6) for a, b in zip((out, lse, *grads), alone, strict=True))
    assert out[24:].eq(0).all() and lse[24:].eq(-math.inf).all() and all(g[24:].eq(0).all() for g in grads)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize(
    "case",
    [
        Case(((3, 0), (3, 0)), causal=False),
        Case(((0, 3),)),
        Case(((0, 0), (0, 0)), packed=True),
        Case(((4, 0), (2, 0)), packed=True, causal=False),
    ],
    ids=str,
)
def test_nothing_to_see(impl, case):
    tensors = case.tensors()
    assert max(worst(measured(case, tensors, through(impl, case)), expected(case, tensors))) == 0


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_index_dtypes_and_default_keys(impl):
    case = Case(((5, 5), (9, 9)), packed=True)
    q, k, v, *_ = case.tensors()
    same = [
        flash_attention(q, k, v, cu_seqlens_q=cumulative([5, 9], dtype), max_seqlen_q=9, impl=impl)
        for dtype in (torch.int32, torch.int64)
    ]
    assert torch.equal(same[0], same[1])
    assert torch.equal(same[0], through(impl, case)(q, k, v)[0])


def test_a_window_that_reaches_every_key_is_no_window():
    q, k, v, *_ = Case(((5, 19),)).tensors()
    assert torch.equal(flash_attention(q, k, v, window=19), flash_attention(q, k, v))
    assert not torch.equal(flash_attention(q, k, v, window=18), flash_attention(q, k, v))


@pytest.mark.parametrize("case", [Case(((21, 21),), heads=(4, 1), window=9), KERNEL_CASES[7]], ids=str)
def test_gradients_repeat_bitwise(case):
    tensors = case.tensors()
    first, second = (measured(case, tensors, through("triton", case)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.covering
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("impl", ["reference", "triton", None])
def test_compiles_as_one_graph_forward_and_backward(backend, impl):
    """Each implementation with either backend, packed with one of them."""
    packed = (backend == "eager") == (impl == "triton")
    case = Case(((9, 9), (9, 9)), heads=(2, 1), packed=packed, window=5)
    tensors = case.tensors()
    torch.compiler.reset()
    compiled = torch.compile(through(impl, case), fullgraph=True, backend=backend)
    results, eager = measured(case, tensors, compiled), measured(case, tensors, through(impl, case))
    assert max(worst(results, tuple(x.double() for x in eager))) < 1e-6


def test_operator_registration():
    q, k, v, *_ = Case(((9, 9),), heads=(2, 1)).tensors()
    arguments = (q.requires_grad_(), k, v, None, None, 9, 9, True, 0.25, None, 2.0)
    assert set(torch.library.opcheck(torch.ops.specdec.flash_forward.default, arguments).values()) == {"SUCCESS"}


q_, k_ = torch.zeros(1, 4, 4, 16), torch.zeros(1, 4, 2, 16)
cu_ = torch.tensor([0, 4], dtype=torch.int32)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((q_, k_, k_[:, :3]), {}, "key's shape is value's"),
        ((q_[0], k_[0], k_[0]), {}, "dense query, key and value have 4 dimensions"),
        ((q_, torch.zeros(1, 4, 3, 16), torch.zeros(1, 4, 3, 16)), {}, "number of heads that divides"),
        ((q_, k_[..., :8], k_[..., :8]), {}, "head dim"),
        ((q_, k_.expand(2, -1, -1, -1), k_.expand(2, -1, -1, -1)), {}, "batch size"),
        ((q_, k_.half(), k_.half()), {}, "torch.float16"),
        ((q_, k_, k_), dict(scale=0.0), "scale 0.0"),
        ((q_, k_, k_), dict(window=0), "window 0"),
        ((q_, k_, k_), dict(softcap=-1.0), "softcap -1.0"),
        ((q_, k_, k_), dict(max_seqlen_q=4), "need cu_seqlens_q"),
        ((q_[0], k_[0], k_[0]), dict(cu_seqlens_q=cu_), "need max_seqlen_q and max_seqlen_k on the host, got None"),
        ((q_[0], k_[0], k_[0]), dict(cu_seqlens_q=cu_, cu_seqlens_k=cu_, max_seqlen_q=4), "got 4 and None"),
        (
            (q_[0], k_[0], k_[0]),
            dict(cu_seqlens_q=cu_, cu_seqlens_k=cu_[:1], max_seqlen_q=4, max_seqlen_k=4),
            "cu_seqlens_k must be",
        ),
        ((q_[0], k_[0], k_[0]), dict(cu_seqlens_q=cu_.float(), max_seqlen_q=4), "torch.float32"),
        ((q_, k_, k_), dict(impl="flashy"), "impl='flashy' is not one of"),
        ((q_, k_, k_), dict(impl="cudnn"), "impl='cudnn' cannot do this call: it takes float16 and bfloat16"),
        ((q_.half(), k_.half(), k_.half()), dict(impl="fa3"), "impl='fa3' cannot do this call"),
        ((q_.double(), k_.double(), k_.double()), dict(impl="triton"), "torch.float64"),
        ((torch.zeros(1, 1, 1, 512),) * 3, dict(impl="triton"), "512"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_bad_arguments_are_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        flash_attention(*arguments, **options)


def test_explicit_triton_needs_a_gpu_or_the_interpreter(monkeypatch):
    monkeypatch.setattr("attention.flash.api.triton_available", lambda device: False)
    with pytest.raises(ValueError, match="impl='triton' cannot do this call: it needs the package triton"):
        flash_attention(q_, k_, k_, impl="triton")


def test_the_implementation_is_named():
    assert flash_implementation(q_, k_, k_) == "reference"
    assert flash_implementation(q_, k_, k_, impl="reference", window=3) == "reference"
    with pytest.raises(ValueError, match="scale"):
        flash_implementation(q_, k_, k_, scale=-1)


@pytest.mark.gpu
def test_a_gpu_takes_the_fastest_that_can():
    q = torch.zeros(1, 256, 4, 128, device="cuda", dtype=torch.bfloat16)
    fast = flash_implementation(q, q, q)
    assert fast in ("fa3", "cudnn")
    for options in (dict(window=9), dict(softcap=1.0), dict(return_lse=True)):
        assert flash_implementation(q, q, q, **options) == "triton"
        with pytest.raises(ValueError, match="cannot do this call"):
            flash_attention(q, q, q, impl="cudnn", **options)
    assert flash_implementation(q.float(), q.float(), q.float()) == "triton"
    assert flash_implementation(q.double(), q.double(), q.double()) == "reference"
    torch.use_deterministic_algorithms(True)
    try:
        assert flash_implementation(q.requires_grad_(), q, q) != "cudnn"
    finally:
        torch.use_deterministic_algorithms(False)


LONG = (113, 113), (1, 339), (339, 339), (17, 2048), (0, 63), (63, 0), (1024, 1024)
SWEEP = [
    Case(((2048, 2048),), heads=(8, 2), dim=128, dtype=torch.bfloat16),
    Case(LONG, heads=(7, 1), dim=64, dtype=torch.bfloat16, packed=True, window=100),
    Case(((339, 1025),) * 2, heads=(4, 4), dim=80, dtype=torch.bfloat16, causal=False, softcap=5.0),
    Case(LONG, heads=(4, 2), dim=96, dtype=torch.bfloat16, packed=True, causal=False, window=65, softcap=5.0),
    Case(((1025, 1025),), heads=(4, 2), dim=256, dtype=torch.bfloat16, window=513),
    Case(LONG, heads=(4, 2), dim=256, dtype=torch.float16, packed=True, softcap=5.0),
    Case(((113, 2048),) * 3, heads=(7, 1), dim=128, dtype=torch.float16, window=339, softcap=5.0),
    Case(((1023, 1023),) * 2, heads=(3, 3), dim=64, dtype=torch.float16, causal=False),
    Case(LONG, heads=(4, 2), dim=64, dtype=torch.float32, packed=True),
    Case(((339, 339),), heads=(7, 1), dim=96, dtype=torch.float32, window=63),
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", SWEEP, ids=str)
def test_shipped_configurations_are_as_good_as_pytorch(case):
    """At most twice the error of the same maths in PyTorch in the same dtype."""
    tensors = case.tensors()
    truth = expected(case, tensors)
    ours, theirs = (
        worst(measured(case, tensors, through("triton", case)), truth),
        worst(expected(case, tensors, case.dtype), truth),
    )
    assert all(a <= 2 * b + 1e-6 for a, b in zip(ours, theirs, strict=True)), f"{ours} against {theirs}"
    assert all(
        torch.equal(a, b)
        for a, b in zip(*(measured(case, tensors, through("triton", case)) for _ in range(2)), strict=True)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["triton", None])
def test_dense_prefill_is_as_good_as_sdpa_flash(impl):
    case = replace(SWEEP[0], heads=(8, 2))
    tensors = case.tensors()
    truth = expected(case, tensors)
    q, k, v = (x.detach().transpose(1, 2).requires_grad_() for x in tensors[:3])
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(
            1, 2
        )
    their_grads = [x.transpose(1, 2) for x in torch.autograd.grad((theirs * tensors[3]).sum(), (q, k, v))]
    q, k, v = (x.detach().requires_grad_() for x in tensors[:3])
    ours = flash_attention(q, k, v, impl=impl)
    our_grads = torch.autograd.grad((ours * tensors[3]).sum(), (q, k, v))
    truth = (truth[0], *expected(case, (*tensors[:4], torch.zeros_like(tensors[4])))[2:])
    errors = [
        worst(tuple(x.flatten(0, 1).detach() for x in both), truth)
        for both in ((ours, *our_grads), (theirs, *their_grads))
    ]
    assert all(a <= 2 * b for a, b in zip(*errors, strict=True)), f"{errors[0]} against {errors[1]}"


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["fa3", "cudnn"])
@pytest.mark.parametrize("case", [SWEEP[0], replace(SWEEP[1], window=None), replace(SWEEP[7], dim=128)], ids=str)
@torch.no_grad()
def test_other_implementations_compute_the_same(impl, case):
    q, k, v, *_ = tensors = case.tensors()
    try:
        out = flash_attention(q, k, v, impl=impl, **case.options())
    except ValueError as error:
        pytest.skip(str(error))
    ours = flash_attention(q, k, v, impl="triton", **case.options())
    with torch.enable_grad():
        truth = expected(case, tensors)[0].view(q.shape)
    assert (out - truth).abs().max() <= 2 * (ours - truth).abs().max()


@pytest.mark.gpu
def test_compiles_with_inductor():
    case = replace(SWEEP[0], lengths=((300, 300),))
    q, k, v, grad_out, _ = case.tensors()
    results = []
    for attend in (flash_attention, torch.compile(flash_attention, fullgraph=True)):
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        out = attend(*inputs, impl="triton")
        results.append([out, *torch.autograd.grad(out, inputs, grad_out)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert torch.compile(flash_attention, fullgraph=True)(q, k, v).shape == q.shape


@pytest.mark.gpu
def test_addresses_beyond_32_bits():
    """The last sequences of tensors of more than 2 ** 31 elements, against the same sequences alone."""
    rows, case = (
        5 << 18,
        Case(((100, 100), (200, 200)), heads=(16, 16), dim=128, dtype=torch.bfloat16, packed=True, window=50),
    )
    tensors = case.tensors()
    cu = torch.tensor([rows - 300, rows - 200, rows], device="cuda")
    big = [torch.empty(rows, *x.shape[1:], device="cuda", dtype=x.dtype) for x in tensors]
    for whole, x in zip(big, tensors, strict=True):
        whole[-300:] = x
    attend = lambda q, k, v: flash_attention(
        q, k, v, cu_seqlens_q=cu, max_seqlen_q=200, window=50, return_lse=True, impl="triton"
    )
    results, alone = measured(case, tuple(big), attend), measured(case, tensors, through("triton", case))
    assert all(torch.equal(a[-300:], b) for a, b in zip(results, alone, strict=True))
    del whole, big, results
    torch.cuda.empty_cache()  # some 40 GB, which other test processes on this GPU could not have until this one ends


@pytest.mark.gpu
def test_a_cuda_graph_replays_forward_and_backward():
    case = Case(((300, 300), (50, 50)), heads=(4, 2), dim=64, dtype=torch.bfloat16, packed=True)
    tensors, other = case.tensors(), case.tensors(seed=1)
    options, static = case.options(), [x.clone() for x in tensors]

    def step():
        return measured(
            case, tuple(static), lambda q, k, v: flash_attention(q, k, v, return_lse=True, impl="triton", **options)
        )

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for target, x in zip(static, other, strict=True):
        target.copy_(x)
    options["cu_seqlens_q"].copy_(torch.tensor([0, 150, 350]))
    options["cu_seqlens_k"].copy_(torch.tensor([0, 150, 350]))
    graph.replay()
    fresh = replace(case, lengths=((150, 150), (200, 200)))
    assert all(
        torch.equal(a, b) for a, b in zip(results, measured(fresh, other, through("triton", fresh)), strict=True)
    )
