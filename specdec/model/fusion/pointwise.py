"""The small operations between a model's matrix products, one kernel each where transformers launches up to ten: norms,
rotations, gates. Cosines and sines of positions are looked up.

What a module computes is not read off its name. Module and kernel are given the same random numbers, and what agrees up
to rounding is replaced; everything else stays as it is."""

import inspect
import sys
import types
from collections.abc import Callable

import torch
from torch import Tensor, nn

from attention.dispatch import resolve
from attention.hf.functions import uses, with_global
from specdec.model.fusion import pointwise_reference
from specdec.model.fusion.deferred_linear import DeferredLinear, materialise
from specdec.model.fusion.notes import Note
from specdec.model.fusion.pointwise_reference import ACTIVATIONS
from specdec.model.fusion.projections import FusedProjections, OwnProduct, changed, shallow_copy
from specdec.model.fusion.skinny_linear import Norm, skinny_linear

LAST = ("o_proj", "out_proj", "down_proj", "fc2", "c_proj")  # layers whose product is mostly added to something
MAX_TABLES = 1 << 28  # bytes of one model's table of rotary embeddings
MAX_WIDTH = 16384  # of a normalised row, which one program holds
ROTATION = "apply_rotary_pos_emb"  # the function that most architectures of transformers call by this name
HOOKED = "it has hooks, or a forward of its own"
OTHER = "it computes something else"


def fuse_pointwise(model: nn.Module, impl: str | None = None, notes: list[Note] | None = None) -> nn.Module:
    """A twin of `model` with the same weights; `model` itself where nothing can be replaced, or no kernels run on its
    device.

    RMS norms; sines and cosines of rotary embeddings, which are looked up; rotations by a function called
    `apply_rotary_pos_emb`; activation(gate) * up behind joined projections (`specdec.model.fusion.projections`), and,
    where these multiply by `skinny_linear`, sums behind a layer's last product. `impl` is that of `paged_attention`;
    "reference" replaces by plain PyTorch, which only shows what would be replaced. What becomes of each is appended to
    `notes`."""
    parameters = list(model.parameters())
    if impl != "reference" and resolve(impl, parameters[0].device) != "triton":
        return model
    like = next((p for p in parameters if p.is_floating_point()), parameters[0])
    return _Fusion(like, _kernels(impl != "reference"), [] if notes is None else notes)(model)


def _kernels(triton: bool):
    """The module whose `rms_norm`, `rotate` and `gate` are put in place."""
    if not triton:
        return pointwise_reference
    from specdec.model.fusion import pointwise_kernel

    return pointwise_kernel


class _Fusion:
    """Remembers, for one model, what has been tried: layers of one kind behave alike."""

    def __init__(self, like: Tensor, kernels, notes: list[Note]):
        self._like, self._kernels, self._notes, self._known = like, kernels, notes, {}

    @torch.no_grad()
    def __call__(self, module: nn.Module) -> nn.Module:
        children = {
            name: None
            if child is None
            else self._put_off(child)
            if name in LAST and _is_product(child)
            else self(child)
            for name, child in module._modules.items()
        }
        twin = module
        if any(children[name] is not child for name, child in module._modules.items()):
            twin = shallow_copy(module)
            twin._modules = children
        forward = self._norm(module) or self._gated(twin) or self._rotating(twin) or self._rotary_table(module)
        if forward is not None:
            twin = shallow_copy(twin) if twin is module else twin
            twin.forward = types.MethodType(forward, twin) if isinstance(forward, types.FunctionType) else forward
        return twin

    def _note(self, operation: str, module: nn.Module, why: str | None, lost: bool = False) -> None:
        self._notes.append(Note(operation, type(module).__name__, why, lost))

    def _put_off(self, layer: OwnProduct) -> nn.Module:
        """A twin whose product waits for what is added to it."""
        twin = shallow_copy(layer)
        twin.forward = lambda x: DeferredLinear(x, layer.weight, layer.bias)
        self._notes.append(Note("sum", "Linear"))
        return twin

    def _try(self, key, find: Callable) -> tuple[object, str | None]:
        """What `find()` says, asked once, and None; or None and why it is left alone: `OTHER`, or what it raised
        (weights that are not there, or packed; other inputs)."""
        if key not in self._known:
            try:
                found = find()
                self._known[key] = found, OTHER if found is None else None
            except Exception as error:
                self._known[key] = None, f"trying it raised {type(error).__name__}: {error}"
        return self._known[key]

    def _norm(self, module: nn.Module) -> Callable | None:
        weight, eps, named = getattr(module, "weight", None), _eps(module), type(module).__name__.endswith("RMSNorm")
        if (
            module._modules
            or set(module._parameters) != {"weight"}
            or weight is None
            or weight.ndim != 1
            or not named
            and eps is None
        ):
            return None
        rms_norm = self._kernels.rms_norm

        def find():
            x = _random(weight, 3, len(weight))
            return next(
                (offset for offset in (False, True) if _agree(rms_norm(x, weight, eps, offset), module, x)), None
            )

        offset, lost = None, False
        if changed(module):
            why = HOOKED
        elif eps is None:
            why, lost = "no attribute of it holds its epsilon", True
        elif len(weight) > MAX_WIDTH:
            why = f"its rows are {len(weight)} wide, kernels take {MAX_WIDTH}"
        else:
            offset, why = self._try((type(module), _settings(module), weight.shape, weight.dtype), find)
            lost = named and why not in (None, OTHER) and not _unusual(weight)
        if named or why is None:  # LayerNorms look like a norm too, and are none of this kind
            self._note("norm", module, why, lost)
        return None if offset is None else _Norm(module, eps, offset, rms_norm)

    def _gated(self, module: nn.Module) -> Callable | None:
        fused, down, act, other = (
            module._modules.get(name) for name in ("gate_proj", "down_proj", "act_fn", "activation_fn")
        )
        act = other if act is None else act
        if not isinstance(fused, FusedProjections) or len(set(fused.sizes)) != 1 or down is None:
            return None
        weight, gate = fused.layers[0].weight, self._kernels.gate

        def find():
            grid = torch.linspace(-30, 30, 1201, device=weight.device)
            name = next(
                (name for name, plain in ACTIVATIONS.items() if float((act(grid) - plain(grid)).abs().max()) < 1e-5),
                None,
            )
            if name is None:
                return None
            x = _random(weight, 3, weight.shape[1])
            far = 10 if x.dtype == torch.float16 else 100  # where a module that clamps would show it
            return (
                name
                if all(_agree(_Gated(fused, down, name, gate)(x * scale), module, x * scale) for scale in (1, far))
                else None
            )

        activation, why, lost = None, None, False
        if act is None:
            why, lost = "it has gate_proj, up_proj and down_proj, but no act_fn or activation_fn", True
        elif act._modules or changed(module) or changed(act):
            why = HOOKED
        else:
            activation, why = self._try(
                (type(module), _settings(module), type(act), _settings(act), weight.shape, weight.dtype), find
            )
            lost = why not in (None, OTHER) and not _unusual(weight)
        self._note("gate", module, why, lost)
        return None if activation is None else _Gated(fused, down, activation, gate)

    def _rotating(self, module: nn.Module) -> Callable | None:
        forward, named = type(module).forward, type(module).__name__
        used = uses(forward, ROTATION)
        weight = next((p for p in module.parameters() if p.is_floating_point()), None)
        plain = (
            inspect.unwrap(forward).__globals__[ROTATION]
            if used
            else getattr(sys.modules.get(type(module).__module__), ROTATION, None)
        )
        known = used or "k_proj" in module._modules and named.endswith("Attention") and "Cross" not in named
        if plain is None or weight is None or not known:
            return None
        rotate = self._kernels.rotate

        def find():
            inputs = [_random(weight, *shape, 16) for shape in ((4, 3), (2, 3), (3,), (3,))]
            try:
                same = _agree(torch.cat(rotate(*inputs), 1), lambda *inputs: torch.cat(plain(*inputs), 1), *inputs)
            except RuntimeError:  # angles of another layout
                same = False
            if not same:
                return None
            return with_global(forward, ROTATION, _Rotation(plain, rotate))

        replaced, lost = None, False
        if changed(module):
            why = HOOKED
        elif not used:
            why, lost = f"its forward does not call {ROTATION}, which stands beside it", _rotates(forward)
        elif list(inspect.signature(plain).parameters)[:4] != ["q", "k", "cos", "sin"]:
            why = OTHER
        else:
            replaced, why = self._try((forward, weight.dtype), find)
            lost = why not in (None, OTHER) and not _unusual(weight)
        self._note("rotation", module, why, lost)
        return replaced

    def _rotary_table(self, module: nn.Module) -> Callable | None:
        limit = getattr(module, "max_seq_len_cached", None)
        if module._parameters or module._modules or not any("inv_freq" in name for name in module._buffers):
            return None
        if changed(module) or not isinstance(limit, int):
            self._note(
                "rotary table",
                module,
                HOOKED if changed(module) else "no attribute of it says how far it goes",
                hasattr(module, "rope_type"),
            )
            return None
        kinds, x = getattr(module, "layer_types", None) or [None], self._like.new_zeros(1, 1, 1)

        def rows(kind, first: int, last: int) -> Tensor:
            return torch.cat(_cos_sin(module, x, torch.arange(first, last, device=x.device)[None], kind), -1)[0]

        def table(kind) -> Tensor | None:
            some = rows(kind, 0, min(4, limit))
            if limit * some.shape[1] * some.element_size() * len(kinds) > MAX_TABLES:
                return None
            every = rows(kind, 0, limit)
            # frequencies that depend on how far a text goes would show
            return (
                every
                if every[: len(some)].equal(rows(kind, 0, len(some))) and every[-1:].equal(rows(kind, limit - 1, limit))
                else None
            )

        tables, why = self._try(("table", id(module)), lambda: {kind: table(kind) for kind in kinds})
        if tables is not None and any(table is None for table in tables.values()):
            tables, why = None, f"its frequencies follow the text, or its table is larger than {MAX_TABLES >> 20} MiB"
        self._note("rotary table", module, why)
        return None if tables is None else _Table(module, tables)


def _cos_sin(module: nn.Module, x: Tensor, positions: Tensor, kind: str | None) -> tuple[Tensor, Tensor]:
    """What a rotary embedding says; with kinds of layers, that for one `kind`."""
    return module(x, positions) if kind is None else module(x, positions, kind)


class _Table:
    """In place of a module that gives cosines and sines for positions: what it gave for each of them."""

    def __init__(self, module: nn.Module, tables: dict[str | None, Tensor]):
        self._module, self._tables = module, tables

    def __call__(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> tuple[Tensor, Tensor]:
        table = self._tables.get(layer_type)
        if table is None or table.dtype != x.dtype or position_ids.ndim != 2:
            return _cos_sin(self._module, x, position_ids, layer_type)
        return nn.functional.embedding(position_ids, table).chunk(2, -1)


def _is_product(layer: nn.Module) -> bool:
    return isinstance(layer, OwnProduct) and layer.product is skinny_linear


class _Norm:
    def __init__(self, module: nn.Module, eps: float, offset: bool, rms_norm: Callable):
        self._module, self._eps, self._offset, self._rms_norm = module, eps, offset, rms_norm

    def __call__(self, x: Tensor) -> Tensor:
        weight = self._module.weight
        if x.dtype != weight.dtype:
            return self._module(materialise(x))
        norm = Norm(weight, self._eps, self._offset)
        normed = x.normed(norm) if isinstance(x, DeferredLinear) else None
        return self._rms_norm(materialise(x), *norm) if normed is None else normed


class _Gated:
    def __init__(self, fused: FusedProjections, down: nn.Module, activation: str, gate: Callable):
        self._joined, self._down, self._activation, self._gate = fused, down, activation, gate

    def __call__(self, x: Tensor) -> Tensor:
        return self._down(self._gate(self._joined.multiply(x), self._activation))


class _Rotation:
    """In place of the function `plain`, which does what the kernel does not: parts of a head, several rows, other
    layouts.
    """

    def __init__(self, plain: Callable, rotate: Callable):
        self._plain, self._rotate = plain, rotate

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *more, **options):
        fits = not more and not options and q.ndim == 4 and len(q) == 1 and cos.ndim == 3 and len(cos) == 1
        fits = fits and q.shape[2:] == k.shape[2:] == cos.shape[1:] == sin.shape[1:] and q.shape[3] % 2 == 0
        if not fits or len({x.dtype for x in (q, k, cos, sin)}) > 1 or any(x.stride(-1) != 1 for x in (q, k, cos, sin)):
            return self._plain(q, k, cos, sin, *more, **options)
        return self._rotate(q, k, cos, sin)


def _rotates(forward: Callable) -> bool:
    """Whether an attention's forward is given angles."""
    plain = inspect.unwrap(forward)
    return isinstance(plain, types.FunctionType) and bool(
        {"cos", "position_embeddings"} & set(plain.__code__.co_varnames)
    )


def _unusual(weight: Tensor) -> bool:
    """Whether weights are none that a module could be tried with: not there, packed, or broken."""
    return weight.is_meta or not weight.is_floating_point() or not bool(weight.isfinite().all())


def _random(like: Tensor, *shape: int) -> Tensor:
    """`[1, *shape]` of the dtype and on the device of `like`; nobody else's random numbers change. Raises ValueError
    where there is no memory.
    """
    if like.is_meta:  # kernels would be launched all the same
        raise ValueError("weights on the meta device cannot be tried")
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)).to(like)


def _eps(module: nn.Module) -> float | None:
    return next(
        (value for name in ("variance_epsilon", "eps") if isinstance(value := getattr(module, name, None), float)), None
    )


def _settings(module: nn.Module) -> tuple:
    """What may tell a module from another one of its type: numbers and names that it holds."""
    return tuple(
        sorted(
            (name, repr(value))
            for name, value in vars(module).items()
            if isinstance(value, int | float | str | None) and name != "layer_idx"
        )
    )


def _agree(ours: Tensor, module: Callable[..., Tensor], *inputs: Tensor) -> bool:
    """Whether a module gives the same, up to a few roundings."""
    theirs = module(*inputs)
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    eps, off, theirs = torch.finfo(ours.dtype).eps, ours.float() - theirs.float(), theirs.float()
    # neither holds for NaN
    return float(off.abs().max()) <= 8 * eps * float(theirs.abs().max()) and float(off.norm()) <= max(
        0.5 * eps, 1e-6
    ) * float(theirs.norm())
