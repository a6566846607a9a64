"""Norms, rotations and gates as kernels: against PyTorch, and inside models of every family; on a GPU or in Triton's
interpreter.
"""

import copy
import inspect

import pytest
import torch
import transformers as tf
from torch import nn

from attention.dispatch import triton_available
from specdec.model.fusion import deferred_linear as pending
from specdec.model.fusion import pointwise, pointwise_cpu, pointwise_reference
from specdec.model.fusion.matching import random_input
from specdec.model.fusion.pointwise import fuse_pointwise
from specdec.model.fusion.projections import fuse_projections
from specdec.model.fusion.replacements import FusedGate, FusedNorm, FusedRotation, RotaryTable
from specdec.model.fusion.skinny_linear import skinny_linear, skinny_linear_and_norm
from tests.attention.devices import DEVICE, LOW_PRECISION
from tests.families import CONFIGS, build, ragged_prompts

pytestmark = [pytest.mark.seam, pytest.mark.skipif(not triton_available(torch.device(DEVICE)), reason="needs triton")]
SUMS = {"llama": 6, "qwen3": 6, "mistral": 6, "mixtral": 3, "phi3": 6, "opt": 6, "gpt_oss": 3}  # in three layers
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION])
# what is replaced in a model of three layers: (norms, rotations, gates, tables)
REPLACED = {
    "llama": (7, 3, 3, 1),
    "qwen3": (13, 3, 3, 1),
    "mistral": (7, 3, 3, 1),
    "mixtral": (7, 3, 0, 1),
    "gemma2": (13, 3, 3, 1),
    "gemma3": (19, 3, 3, 1),
    "phi3": (7, 3, 0, 1),
    "gpt_neox": (0, 3, 0, 1),
    "gpt2": (0, 0, 0, 0),
    "opt": (0, 0, 0, 0),
    "gpt_oss": (7, 0, 0, 1),
}


def random(*shape: int, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def replaced(model) -> tuple[int, int, int, int]:
    forwards = [vars(module).get("forward") for module in model.modules()]
    globals_of = [
        getattr(inspect.unwrap(getattr(forward, "__func__", forward)), "__globals__", {})
        for forward in forwards
        if forward is not None
    ]
    rotations = sum(isinstance(names.get("apply_rotary_pos_emb"), FusedRotation) for names in globals_of)
    norms, gates, tables = (sum(isinstance(f, kind) for f in forwards) for kind in (FusedNorm, FusedGate, RotaryTable))
    return norms, rotations, gates, tables


def close(ours, theirs) -> bool:
    """Within the few roundings that another order of the same sum may cost."""
    worst, largest = float((ours.float() - theirs.float()).abs().max()), float(theirs.float().abs().max())
    return ours.shape == theirs.shape and worst <= 4 * torch.finfo(ours.dtype).eps * largest


@every_dtype
@pytest.mark.parametrize("width", [1, 17, 64, 339])
def test_norms_of_both_kinds(width, dtype):
    """The rows of one tensor, and those of heads that lie inside a wider one."""
    from specdec.model.fusion.pointwise_kernel import rms_norm

    weight, wide = random(width, dtype=dtype, seed=1), random(1, 5, 4 * width, dtype=dtype)
    for x in (
        random(1, 3, width, dtype=dtype),
        random(2, 3, width, dtype=dtype),
        wide[..., width : 3 * width].unflatten(-1, (2, width)),
        random(1, 0, width, dtype=dtype),
        random(1, width, 3, dtype=dtype).transpose(1, 2),
    ):
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + 1e-5)
        if x.numel():
            assert close(rms_norm(x, weight, 1e-5, False), normed.to(dtype) * weight)
            assert close(rms_norm(x, weight, 1e-5, True), (normed * (1 + weight.float())).to(dtype))
        else:
            assert rms_norm(x, weight, 1e-5, False).shape == x.shape


@pytest.mark.covering
@every_dtype
@pytest.mark.parametrize("dim", [2, 16, 80, 128])
@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (8, 1), (17, 9)])
def test_rotations(heads, groups, dim, dtype):
    """As in a model, where heads lie side by side behind one another's tokens; no rounding is left out or added."""
    from specdec.model.fusion.pointwise_kernel import rotate

    both = random(1, 5, (heads + groups) * dim, dtype=dtype)
    q, k = (part.unflatten(-1, (-1, dim)).transpose(1, 2) for part in both.split([heads * dim, groups * dim], -1))
    cos, sin = random(1, 5, dim, dtype=dtype, seed=1), random(1, 5, dim, dtype=dtype, seed=2)
    expected = tf.models.llama.modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)
    for ours, theirs in zip(rotate(q, k, cos, sin), expected, strict=True):
        assert close(ours, theirs) and (dtype == torch.float32 or ours.equal(theirs))


@every_dtype
@pytest.mark.parametrize(
    ("activation", "plain"),
    [("silu", nn.functional.silu), ("gelu_tanh", lambda x: nn.functional.gelu(x, approximate="tanh"))],
)
def test_gates(activation, plain, dtype):
    from specdec.model.fusion.pointwise_kernel import gate

    both = 6 * random(1, 3, 2 * 1100, dtype=dtype)
    first, second = both.split(1100, -1)
    assert close(gate(both, activation), plain(first) * second)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_model_keeps_its_logits(family):
    """And its parameters; what it does otherwise than the kernels stays as it was."""
    model = build(family).to(DEVICE)
    ids, _ = (x.to(DEVICE) for x in ragged_prompts(1))
    with torch.inference_mode():
        expected = model(ids).logits
        fused = fuse_projections(model)
        twin = fuse_pointwise(fused, impl="triton")
        assert replaced(twin) == REPLACED[family] and replaced(fused) == (0, 0, 0, 0)
        assert (twin is fused) == (REPLACED[family] == (0, 0, 0, 0))
        torch.testing.assert_close(twin(ids).logits, expected, rtol=1e-4, atol=1e-4)
        assert [p.data_ptr() for p in twin.parameters()] == [p.data_ptr() for p in fused.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("family", CONFIGS)
def test_sums_behind_a_layers_last_products_are_part_of_them(family, dtype, monkeypatch):
    """In models whose layers add them to what came in; norms that stand between get the product. In 16 bits through the
    kernels. Each family meets few tokens with one dtype and more with the other.
    """
    tokens = 5 if (list(CONFIGS).index(family) + (dtype == torch.float16)) % 2 else 9
    model, sums, impl = build(family).to(DEVICE, dtype), [], None if dtype == torch.float32 else "triton"
    monkeypatch.setattr(
        pending,
        "skinny_linear",
        lambda *factors, added=None: sums.append(added) or skinny_linear(*factors, impl=impl, added=added),
    )
    monkeypatch.setattr(
        pending,
        "skinny_linear_and_norm",
        lambda *given: sums.append(given[3]) or skinny_linear_and_norm(*given, impl=impl),
    )
    ids = torch.arange(3, 3 + tokens, device=DEVICE)[None]
    with torch.inference_mode():
        expected = model(ids).logits
        found = fuse_pointwise(fuse_projections(model, skinny_linear), impl="triton")(ids).logits
    tolerance = 1e-4 if dtype == torch.float32 else 0.02 * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=tolerance)
    assert type(found) is torch.Tensor and sum(added is not None for added in sums) == SUMS.get(family, 0)


class Doubled(nn.Module):
    """Looks like a norm and is none."""

    def __init__(self, size: int):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), 1e-5

    def forward(self, x):
        return 2 * x * self.weight


def test_what_only_looks_alike_is_left_alone():
    """A norm that is none, one that somebody hooked, one with broken weights."""
    hooked, broken = (tf.models.llama.modeling_llama.LlamaRMSNorm(8) for _ in range(2))
    hooked.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        broken.weight[3] = float("nan")
    model = nn.ModuleList([Doubled(8), nn.LayerNorm(8, bias=False), hooked, broken]).to(DEVICE)
    assert fuse_pointwise(model, impl="triton") is model
    assert replaced(fuse_pointwise(nn.ModuleList([*model, nn.RMSNorm(8, eps=1e-6).to(DEVICE)]), impl="triton")) == (
        1,
        0,
        0,
        0,
    )


class Clamped(tf.models.llama.modeling_llama.LlamaMLP):
    """Gates that some layers cut off at a limit."""

    def __init__(self, config, limit=None):
        super().__init__(config)
        self.limit = limit

    def forward(self, x):
        gate = self.act_fn(self.gate_proj(x))
        return self.down_proj((gate if self.limit is None else gate.clamp(max=self.limit)) * self.up_proj(x))


def test_gates_that_only_look_alike_are_left_alone():
    """A limit that small numbers never reach, an activation that is nearly another, one with a hook; each layer is
    looked at by itself.
    """
    config = lambda act: tf.LlamaConfig(hidden_size=32, intermediate_size=64, hidden_act=act)
    hooked = Clamped(config("silu"))
    hooked.act_fn.register_forward_hook(lambda *_: None)
    layers = [
        Clamped(config("silu")),
        Clamped(config("silu"), 1.0),
        Clamped(config("quick_gelu")),
        Clamped(config("gelu")),
        hooked,
        Clamped(config("gelu_pytorch_tanh")),
    ]
    twin = fuse_pointwise(fuse_projections(nn.ModuleList(layers).to(DEVICE)), impl="triton")
    assert [isinstance(vars(layer).get("forward"), FusedGate) for layer in twin] == [
        True,
        False,
        False,
        False,
        False,
        True,
    ]


def test_what_cannot_be_tried_is_left_alone():
    """Weights that are not there, packed into bytes, or none at all; projections that hold buffers."""
    llama = tf.models.llama.modeling_llama
    missing, packed, attention = (
        llama.LlamaRMSNorm(8).to("meta"),
        llama.LlamaRMSNorm(8),
        llama.LlamaAttention(build("llama").config, 0),
    )
    packed.weight = nn.Parameter(torch.zeros(8, dtype=torch.uint8), requires_grad=False)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        projection = nn.Module()
        projection.register_buffer("packed", torch.zeros(4, dtype=torch.int32))
        setattr(attention, name, projection)
    model = nn.ModuleList(
        [
            *(
                x.to(DEVICE)
                for x in (nn.Linear(2, 2), nn.RMSNorm(8, eps=1e-6, elementwise_affine=False), packed, attention)
            ),
            missing,
        ]
    )
    assert fuse_pointwise(model, impl="triton") is model
    with pytest.raises(
        ValueError, match="meta device"
    ):  # a launch would be an illegal access of memory on a GPU, noticed much later
        random_input(missing.weight, 3)


def test_layouts_that_the_kernel_does_not_take_go_to_the_plain_function():
    from specdec.model.fusion.pointwise_kernel import rotate

    seen = []
    rotation = FusedRotation(lambda *arguments, **options: seen.append(options) or arguments[:2], rotate)
    q, k, cos, sin = random(2, 4, 3, 8), random(2, 2, 3, 8), random(2, 3, 8), random(2, 3, 8)
    one = [x[:1] for x in (q, k, cos, sin)]
    rotation(q, k, cos, sin)  # two rows
    rotation(*one, unsqueeze_dim=2)
    rotation(*one[:2], *(x[..., :4] for x in one[2:]))  # a part of each head
    rotation(*one[:2], *(x.to(torch.float64) for x in one[2:]))
    rotation(*one[:2], *(x[:, :1] for x in one[2:]))  # one angle for all tokens
    assert seen == [{}, {"unsqueeze_dim": 2}, {}, {}, {}]
    rotation(*one)
    assert len(seen) == 5


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"])
def test_tables_hold_what_the_module_gives(family):
    """Bit for bit at every position, for every kind of layer; in another dtype the module itself is asked."""
    model = build(family).to(DEVICE)
    rotary, twin = model.model.rotary_emb, fuse_pointwise(model, impl="triton").model.rotary_emb
    positions = torch.tensor([[3, 0, 77, model.config.max_position_embeddings - 1, 3]], device=DEVICE)
    for kind in getattr(rotary, "layer_types", [None]):
        more = () if kind is None else (kind,)
        for dtype in (torch.float32, torch.float16):
            x = torch.zeros(1, 1, 1, dtype=dtype, device=DEVICE)
            assert all(
                ours.equal(theirs) and ours.dtype == dtype
                for ours, theirs in zip(twin(x, positions, *more), rotary(x, positions, *more), strict=True)
            )


def test_frequencies_that_follow_the_text_have_no_table(monkeypatch):
    """Those that change where a text outgrows what the model was trained on; and tables that would be large."""
    config = copy.deepcopy(build("llama").config)
    config.rope_parameters = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 64,
        "short_factor": [1.0] * 4,
        "long_factor": [3.0] * 4,
    }
    model = tf.LlamaForCausalLM(config).eval().to(DEVICE)
    positions, x = torch.arange(5, device=DEVICE)[None], torch.zeros(1, 1, 1, device=DEVICE)
    before = model.model.rotary_emb(x, positions)
    twin = fuse_pointwise(model, impl="triton").model.rotary_emb
    assert config.max_position_embeddings > 64 and "forward" not in vars(twin)
    assert all(a.equal(b) for a, b in zip(twin(x, positions), before, strict=True))
    monkeypatch.setattr(pointwise, "MAX_TABLES", 1000)
    assert replaced(fuse_pointwise(build("llama").to(DEVICE), impl="triton"))[3] == 0


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_cpus_own_operations_equal_the_reference(dtype, offset):
    make = lambda *shape, seed=0: torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    x, weight = make(1, 3, 40), make(40, seed=1)
    norm = lambda module: module.rms_norm(x, weight, 1e-5, offset)
    torch.testing.assert_close(norm(pointwise_cpu), norm(pointwise_reference))
    both, cos, sin = make(1, 3, 6, 16).transpose(1, 2), make(1, 3, 16, seed=2), make(1, 3, 16, seed=3)
    for q, k in ((both[:, :4], both[:, 4:]), (both[:, :4], both[:, 4:].clone()), (both[:, :4], both[:, 3:5])):
        exact = torch.cat(pointwise_reference.rotate(*(x.double() for x in (q, k, cos, sin))), 1)
        rotated = [torch.cat(module.rotate(q, k, cos, sin), 1) for module in (pointwise_cpu, pointwise_reference)]
        ours, theirs = (float((x.double() - exact).norm()) for x in rotated)
        assert ours <= 2 * theirs or ours <= 1e-6 * float(exact.norm())
    gated = [module.gate(x, "gelu_tanh") for module in (pointwise_cpu, pointwise_reference)]
    torch.testing.assert_close(*gated)
