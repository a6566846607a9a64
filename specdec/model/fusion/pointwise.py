"""Norms, rotations, gates and sums between a model's matrix products, each in one kernel instead of up to ten.

Modules are matched numerically, not by name: module and kernel run on the same random inputs, and only modules that
agree with the kernel up to rounding are replaced. Cosines and sines of positions are looked up in a table."""

import inspect
import sys
import types
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from attention.dispatch import resolve
from attention.hf.functions import uses, with_global
from specdec.model.fusion import pointwise_cpu, pointwise_reference
from specdec.model.fusion.deferred_linear import DeferredLinear
from specdec.model.fusion.matching import agree, cannot_be_tried, random_input, settings
from specdec.model.fusion.notes import Note
from specdec.model.fusion.pointwise_reference import ACTIVATIONS
from specdec.model.fusion.projections import FusedProjections, OwnProduct, changed, shallow_copy
from specdec.model.fusion.quantised.packed import PackedWeight
from specdec.model.fusion.replacements import FusedGate, FusedNorm, FusedRotation, RotaryTable, cos_sin
from specdec.model.fusion.skinny_linear import skinny_linear

M = TypeVar("M", bound=nn.Module)
Found = TypeVar("Found")
LAST = ("o_proj", "out_proj", "down_proj", "fc2", "c_proj")  # projections that are usually followed by a residual sum
MAX_TABLES = 1 << 28  # bytes of a model's rotary tables
MAX_WIDTH = 16384  # of a row in the norm kernel, where one program holds it
ROTATION = "apply_rotary_pos_emb"  # the function's name in most architectures of transformers
HOOKED = "it has hooks, or a forward of its own"
OTHER = "it computes something else"


def fuse_pointwise(model: M, impl: str | None = None, notes: list[Note] | None = None) -> M:
    """A twin of `model` with the same weights; `model` itself where nothing can be replaced.

    Replaced are RMS norms, rotary tables, rotations by a function called `apply_rotary_pos_emb`, activation(gate) * up
    after fused projections (`specdec.model.fusion.projections`) and, for layers that multiply by `skinny_linear`, sums
    after their last product. `impl` is that of `paged_attention`; "reference" replaces by plain PyTorch, to show what
    would be replaced. Appends what becomes of each operation to `notes`."""
    parameters = list(model.parameters())
    like = next((p for p in parameters if p.is_floating_point()), parameters[0])
    return _Fusion(like, _kernels(impl, like.device), [] if notes is None else notes)(model)


def _kernels(impl: str | None, device: torch.device) -> types.ModuleType:
    """The Python module with the functions `rms_norm`, `rotate` and `gate` to use."""
    if resolve(impl, device) == "triton":
        from specdec.model.fusion import pointwise_kernel

        return pointwise_kernel
    return pointwise_reference if impl == "reference" else pointwise_cpu


class _Fusion:
    """Fuses one model; results of trials are cached, as layers of one kind behave alike."""

    def __init__(self, like: Tensor, kernels: types.ModuleType, notes: list[Note]):
        self._like, self._kernels, self._notes = like, kernels, notes
        self._tried: dict[Hashable, tuple[Any, str | None]] = {}

    @torch.no_grad()
    def __call__(self, module: M) -> M:
        children = {
            name: None if child is None else self._child(name, child) for name, child in module._modules.items()
        }
        twin = module
        if any(children[name] is not child for name, child in module._modules.items()):
            twin = shallow_copy(module)
            twin._modules = children
        forward = self._norm(module) or self._gate(twin) or self._rotation(twin) or self._rotary_table(module)
        if forward is not None:
            twin = shallow_copy(twin) if twin is module else twin
            vars(twin)["forward"] = types.MethodType(forward, twin) if inspect.isfunction(forward) else forward
        return twin

    def _child(self, name: str, child: nn.Module) -> nn.Module:
        deferrable = name in LAST and self._kernels is not pointwise_cpu
        if deferrable and isinstance(child, OwnProduct) and child.product is skinny_linear:
            return self._defer(child)
        return self(child)

    def _defer(self, layer: OwnProduct) -> nn.Module:
        """A twin that returns a `DeferredLinear`."""
        twin = shallow_copy(layer)
        vars(twin)["forward"] = lambda x: DeferredLinear(x, layer.matrix, layer.bias)
        self._notes.append(Note("sum", "Linear"))
        return twin

    def _note(self, operation: str, module: nn.Module, why: str | None, lost: bool = False) -> None:
        self._notes.append(Note(operation, type(module).__name__, why, lost))

    def _try(self, key: Hashable, find: Callable[[], Found | None]) -> tuple[Found | None, str | None]:
        """`(find(), None)`, or None and why not: `OTHER` if it finds nothing, else the exception that it raised.

        The result is cached under `key`. Exceptions are expected: weights that are missing or packed, other inputs."""
        if key not in self._tried:
            try:
                found = find()
                self._tried[key] = found, OTHER if found is None else None
            except Exception as error:
                self._tried[key] = None, f"trying it raised {type(error).__name__}: {error}"
        return self._tried[key]

    def _norm(self, module: nn.Module) -> FusedNorm | None:
        weight, eps, named = module._parameters.get("weight"), _eps(module), type(module).__name__.endswith("RMSNorm")
        if module._modules or set(module._parameters) != {"weight"} or weight is None or weight.ndim != 1:
            return None
        if eps is None and not named:
            return None
        rms_norm = self._kernels.rms_norm
        rms_norms = None if self._kernels is pointwise_cpu else self._kernels.rms_norms

        def find() -> bool | None:
            x = random_input(weight, 3, len(weight))
            return next(
                (offset for offset in (False, True) if agree(rms_norm(x, weight, eps, offset), module, x)), None
            )

        offset: bool | None = None
        why: str | None
        lost = False
        if changed(module):
            why = HOOKED
        elif eps is None:
            why, lost = "no attribute of it holds its epsilon", True
        elif len(weight) > MAX_WIDTH:
            why = f"its rows are {len(weight)} wide, kernels take {MAX_WIDTH}"
        else:
            offset, why = self._try((type(module), settings(module), weight.shape, weight.dtype), find)
            lost = named and why not in (None, OTHER) and not cannot_be_tried(weight)
        if named or why is None:  # a LayerNorm without bias has the same attributes, but is no RMS norm
            self._note("norm", module, why, lost)
        return None if offset is None or eps is None else FusedNorm(module, eps, offset, rms_norm, rms_norms)

    def _gate(self, module: nn.Module) -> FusedGate | None:
        fused, down = module._modules.get("gate_proj"), module._modules.get("down_proj")
        act = module._modules.get("act_fn") or module._modules.get("activation_fn")
        if not isinstance(fused, FusedProjections) or len(set(fused.sizes)) != 1 or down is None:
            return None
        like, gate = self._like if isinstance(fused.fused, PackedWeight) else fused.layers[0].weight, self._kernels.gate
        inner = like.shape[1] if fused.fused is None else fused.fused.shape[1]

        def find(act: nn.Module) -> str | None:
            grid = torch.linspace(-30, 30, 1201, device=like.device)
            same = (name for name, plain in ACTIVATIONS.items() if float((act(grid) - plain(grid)).abs().max()) < 1e-5)
            name = next(same, None)
            if name is None:
                return None
            x = random_input(like, 3, inner)
            large = 10 if x.dtype == torch.float16 else 100  # reveals a module that clamps
            replacement = FusedGate(fused, down, name, gate)
            return name if all(agree(replacement(x * scale), module, x * scale) for scale in (1, large)) else None

        activation: str | None = None
        why: str | None
        lost = False
        if act is None:
            why, lost = "it has gate_proj, up_proj and down_proj, but no act_fn or activation_fn", True
        elif act._modules or changed(module) or changed(act):
            why = HOOKED
        else:
            key = type(module), settings(module), type(act), settings(act), fused.sizes[0], inner, like.dtype
            activation, why = self._try(key, lambda: find(act))
            lost = why not in (None, OTHER) and not cannot_be_tried(like)
        self._note("gate", module, why, lost)
        return None if activation is None else FusedGate(fused, down, activation, gate)

    def _rotation(self, module: nn.Module) -> Callable | None:
        forward, named = type(module).forward, type(module).__name__
        used = uses(forward, ROTATION)
        names = inspect.unwrap(forward).__globals__ if used else vars(sys.modules.get(type(module).__module__, types))
        plain = names.get(ROTATION)
        weight: Tensor | None = next((p for p in module.parameters() if p.is_floating_point()), None)
        if any(_multiplies_packed(child) for child in module.children()):
            weight = self._like
        known = used or "k_proj" in module._modules and named.endswith("Attention") and "Cross" not in named
        if plain is None or weight is None or not known:
            return None
        rotate = self._kernels.rotate

        def find() -> Callable | None:
            inputs = [random_input(weight, *shape, 16) for shape in ((4, 3), (2, 3), (3,), (3,))]
            try:
                same = agree(torch.cat(rotate(*inputs), 1), lambda *inputs: torch.cat(plain(*inputs), 1), *inputs)
            except RuntimeError:  # angles of another layout
                same = False
            return with_global(forward, ROTATION, FusedRotation(plain, rotate)) if same else None

        replaced: Callable | None = None
        why: str | None
        lost = False
        if changed(module):
            why = HOOKED
        elif not used:
            why, lost = f"its forward does not call {ROTATION}, which stands beside it", _takes_angles(forward)
        elif list(inspect.signature(plain).parameters)[:4] != ["q", "k", "cos", "sin"]:
            why = OTHER
        else:
            replaced, why = self._try((forward, weight.dtype), find)
            lost = why not in (None, OTHER) and not cannot_be_tried(weight)
        self._note("rotation", module, why, lost)
        return replaced

    def _rotary_table(self, module: nn.Module) -> RotaryTable | None:
        limit: Any = getattr(module, "max_seq_len_cached", None)
        if module._parameters or module._modules or not any("inv_freq" in name for name in module._buffers):
            return None
        if changed(module):
            self._note("rotary table", module, HOOKED)
            return None
        if not isinstance(limit, int):
            self._note("rotary table", module, "no attribute of it says how far it goes", hasattr(module, "rope_type"))
            return None
        layer_types: Any = getattr(module, "layer_types", None) or [None]
        x = self._like.new_zeros(1, 1, 1)

        def rows(kind: str | None, first: int, last: int) -> Tensor:
            return torch.cat(cos_sin(module, x, torch.arange(first, last, device=x.device)[None], kind), -1)[0]

        def table(kind: str | None) -> Tensor | None:
            first = rows(kind, 0, min(4, limit))
            if limit * first.shape[1] * first.element_size() * len(layer_types) > MAX_TABLES:
                return None
            every = rows(kind, 0, limit)
            # both comparisons fail for frequencies that depend on the length of the text
            same = every[: len(first)].equal(rows(kind, 0, len(first))) and every[-1:].equal(
                rows(kind, limit - 1, limit)
            )
            return every if same else None

        found, why = self._try(("table", id(module)), lambda: {kind: table(kind) for kind in layer_types})
        tables = {kind: rows for kind, rows in (found or {}).items() if rows is not None}
        if found is not None and len(tables) < len(found):
            why = f"its frequencies follow the text, or its table is larger than {MAX_TABLES >> 20} MiB"
        self._note("rotary table", module, why)
        return RotaryTable(module, tables) if why is None else None


def _takes_angles(forward: Callable) -> bool:
    """Whether an attention module's forward has a variable for rotary angles."""
    plain = inspect.unwrap(forward)
    return inspect.isfunction(plain) and bool({"cos", "position_embeddings"} & set(plain.__code__.co_varnames))


def _multiplies_packed(module: nn.Module) -> bool:
    return isinstance(vars(module).get("fused", vars(module).get("copy")), PackedWeight)


def _eps(module: nn.Module) -> float | None:
    found = (getattr(module, name, None) for name in ("variance_epsilon", "eps"))
    return next((value for value in found if isinstance(value, float)), None)
