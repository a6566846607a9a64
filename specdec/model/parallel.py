"""Tensor parallelism: several processes (ranks) hold parts of one model's weights, and run every forward together.

transformers splits the weights and joins the products (`tp_plan="auto"` under torchrun), so that all ranks have the
same logits. Here it is made sure that they stay together: all of them make the same calls, and what depends on time,
chance or free memory is decided by the first rank. A row's noise is a function of its seed and needs no message."""

import hashlib
import re
from collections.abc import Iterator
from datetime import timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn

from attention.hf.split import is_split

if TYPE_CHECKING:  # importing it takes seconds
    from transformers import PreTrainedModel

Value = TypeVar("Value")
TIMEOUT = timedelta(minutes=5)  # of a message between ranks: after that the others raise
TENSOR_PARALLEL = {"tp", "ep"}  # names of mesh dimensions whose ranks run the same tokens; older releases give none
# projections whose output is divided by heads, and whether these are the kv heads
BY_HEADS = {"k_proj": True, "v_proj": True, "q_proj": False, "query_key_value": False, "qkv_proj": True}


class Ranks:
    """The ranks that hold a model's weights; a single one where they are not split.

    mesh: of `torch.distributed`, with one dimension (None: a single rank).
    count, index: how many ranks there are, and which of them this process is.

    >>> alone = Ranks(None)
    >>> alone.count, alone.index, alone.decided(0.25)
    (1, 0, 0.25)
    """

    def __init__(self, mesh: Any):
        self._mesh = mesh
        self.count: int = 1 if mesh is None else mesh.size()
        self.index: int = 0 if mesh is None else mesh.get_local_rank()

    @property
    def several(self) -> bool:
        """Whether there is more than one rank."""
        return self.count > 1

    @property
    def processes(self) -> tuple[int, ...]:
        """The ranks' numbers among all processes; none for a single rank."""
        return () if self._mesh is None else tuple(self._mesh.mesh.flatten().tolist())

    @cached_property
    def _messages(self):
        """A process group for messages between hosts, so that none waits for a GPU; made by all ranks together."""
        import torch.distributed as dist

        return dist.new_group(self.processes, TIMEOUT, "gloo", use_local_synchronization=True)

    def decided(self, value: Value) -> Value:
        """The first rank's `value`, which can be pickled. All ranks call this together."""
        if self.count == 1:
            return value
        import torch.distributed as dist

        held = [value]
        dist.broadcast_object_list(held, self.processes[0], self._messages)
        return held[0]

    def all_of(self, value: Value) -> list[Value]:
        """The `value` of each rank."""
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        held: list[Any] = [None] * self.count
        dist.all_gather_object(held, value, self._messages)
        return held

    def require_same(self, what: str, value: object) -> None:
        """Raise ValueError, on all ranks, unless each has the same `value`, which is compared by its `repr`."""
        if self.count == 1:
            return
        digest = hashlib.blake2b(repr(value).encode(), digest_size=8).hexdigest()
        digests = self.all_of(digest)
        if len(set(digests)) > 1:
            raise ValueError(
                f"{what} must be the same on all {self.count} ranks of a model whose weights are split over them; by "
                f"rank they have the digests {', '.join(digests)}"
            )

    def follow(self, x: Tensor) -> Tensor:
        """The first rank's `x`, of integers, through the model's own process group: the host does not wait."""
        if self.count == 1:
            return x
        import torch.distributed as dist

        sent = x.contiguous().clone()
        dist.broadcast(sent, self.processes[0], self._mesh.get_group())
        return sent


def ranks_of(model: nn.Module) -> Ranks:
    """The ranks over which the weights of `model` are split.

    Raises ValueError for weights that are split otherwise than by tensor or expert parallelism, heads that the ranks
    cannot share, and norms over a width of which each rank has a part only."""
    meshes: dict[tuple[int, ...], Any] = {}
    for weight in model.parameters():
        if is_split(weight):
            mesh: Any = weight.device_mesh  # type: ignore[attr-defined]
            names = set(mesh.mesh_dim_names or ())
            if mesh.ndim != 1 or not names <= TENSOR_PARALLEL:
                raise ValueError(
                    f"{type(model).__name__} is split over processes in the dimensions {mesh.mesh_dim_names}, shape "
                    f"{list(mesh.shape)}; only tensor parallelism (tp_plan) can decode"
                )
            meshes.setdefault(tuple(mesh.mesh.flatten().tolist()), mesh)
    if len(meshes) > 1:
        raise ValueError(f"{type(model).__name__} is split over different ranks: {sorted(meshes)}")
    ranks = Ranks(next(iter(meshes.values()), None))
    if ranks.several:
        _require_whole_heads(model, ranks.count)  # type: ignore[arg-type]
        _require_whole_norms(model, ranks.count)  # type: ignore[arg-type]
    return ranks


def _divided(model: "PreTrainedModel") -> Iterator[tuple[str, nn.Module]]:
    """The names of modules whose outputs stay divided between the ranks, and the modules."""
    plan = {re.sub(r"\.\d+(?=\.|$)", ".*", name): style for name, style in (model.tp_plan or {}).items()}
    for name, module in model.named_modules():
        if plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name)) == "colwise":
            yield name, module


def _require_whole_heads(model: "PreTrainedModel", count: int) -> None:
    """Raise ValueError where an attention layer's heads are divided and do not come out even."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    for name, _ in _divided(model):
        leaf = name.rpartition(".")[2]
        of_kv = BY_HEADS.get(leaf)
        number = kv_heads if of_kv else heads
        if of_kv is not None and isinstance(number, int) and number % count:
            kind = "kv heads" if of_kv else "attention heads"
            raise ValueError(
                f"{type(model).__name__} has {number} {kind}, which {count} ranks cannot share evenly ({name}): use a "
                f"number of ranks that divides {number}"
            )


def _require_whole_norms(model: "PreTrainedModel", count: int) -> None:
    """Raise ValueError for a norm over the whole width of q or k, say, where each rank has some of its heads only.

    Its weight is as wide as the undivided output of a projection beside it; or it is itself divided."""
    modules, heads = dict(model.named_modules()), model.config.get_text_config().num_attention_heads
    tell = f"{type(model).__name__} over {count} ranks: with {heads} attention heads divided between them, "
    for name, module in _divided(model):
        parent = name.rpartition(".")[0]
        for beside, norm in modules[parent].named_children():
            weight = norm._parameters.get("weight")
            if weight is not None and weight.ndim == 1 and len(weight) == getattr(module, "out_features", None):
                raise ValueError(
                    f"{tell}{parent}.{beside} normalises all {len(weight)} numbers of {name}, of which a rank has "
                    f'{len(weight) // count}; a tp_plan with "colwise_gather_output" for it would do'
                )
    for name, module in modules.items():
        weight = module._parameters.get("weight")
        if weight is not None and weight.ndim == 1 and is_split(weight):
            if any(placement.is_shard() for placement in weight.placements):  # type: ignore[attr-defined]
                raise ValueError(f"{tell}the weight of {name}, of {len(weight)} numbers, is divided too")
