"""MTP modules as one network that learns: what is their own, without the ends that they share with their target."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from specdec.drafters.mtp.drafter import MtpDrafter, MtpModule
from specdec.drafters.mtp.layouts import layout_named
from specdec.drafters.mtp.network import new_module
from specdec.training.network import plain_weight


@dataclass(frozen=True, slots=True)
class MtpSizes:
    """The tokens that modules draft, which are all of the target's."""

    target_vocab_size: int

    @property
    def draft_vocab_size(self) -> int:
        """How many they are."""
        return self.target_vocab_size


class MtpNetwork(nn.Module):
    """The weights of MTP modules of a target, which learn together; h: width of their states.

    One module is repeated at every depth; of several each is one depth. Converting this network to another dtype
    converts the modules' own weights in place, and neither buffers, such as rotary frequencies, nor anything of the
    target's. A deep copy copies the same.

    normed, zero_first: as in `MtpDrafter`.

    Raises ValueError for no module, modules of several targets, an output layer with a bias, and several modules with
    output layers of their own."""

    def __init__(self, modules: Sequence[MtpModule], normed: bool = True, zero_first: bool = False):
        super().__init__()
        if not modules or any(module.model is not modules[0].model for module in modules):
            raise ValueError(f"a network has MTP modules of one target, at least one, got {len(modules)}")
        self.parts, self.normed, self.zero_first = tuple(modules), normed, zero_first
        self.draft_tokens = None  # all are drafted
        heads: dict[int, Any] = {id(head): head for head in (part.network.get_output_embeddings() for part in modules)}
        if len(heads) > 1:
            raise ValueError(f"{len(modules)} MTP modules with output layers of their own are not trained together")
        if any(getattr(head, "bias", None) is not None for head in heads.values()):
            raise ValueError(
                f"the output layer of a {type(self.target).__name__} has a bias, which is not trained with"
            )
        shared = {id(parameter) for parameter in self.target.parameters()}
        own = [p for part in modules for p in part.network.parameters() if id(p) not in shared]
        self.weights = nn.ParameterList({id(p): p for p in own}.values())
        self.config = MtpSizes(self.output_weight.shape[0])

    @property
    def target(self) -> Any:
        """The model that the modules are of."""
        return self.parts[0].model

    @property
    def output_weight(self) -> Tensor:
        """The weight `[V, h]` of the output layer, the target's or the modules' own."""
        head: Any = self.parts[0].network.get_output_embeddings()
        return plain_weight(head) if head is self.target.get_output_embeddings() else head.weight

    def drafter(self, num_tokens: int) -> MtpDrafter:
        """A drafter of chains of so many tokens."""
        several = len(self.parts) > 1
        return MtpDrafter(self.parts if several else self.parts[0], num_tokens, normed=self.normed,
                          zero_first=self.zero_first)  # fmt: skip

    def describe(self) -> dict:
        """What tells it from others, as `Learner.describe` has it."""
        readings = {"normed": self.normed, "zero_first": self.zero_first}
        return readings | {"layout": self.parts[0].layout.name, "modules": len(self.parts)}

    def __deepcopy__(self, memo: dict) -> "MtpNetwork":
        target = self.target
        for kept in (target, target.get_input_embeddings(), target.get_output_embeddings()):
            memo[id(kept)] = kept
        parts = [replace(part, network=copy.deepcopy(part.network, memo)) for part in self.parts]
        return MtpNetwork(parts, self.normed, self.zero_first)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MtpNetwork":
        with torch.no_grad():
            for parameter in self.weights:
                parameter.data = fn(parameter.data)  # also seen by the modules; raises for another device
        return self


def new_mtp(model, layout: str = "deepseek-v3", normed: bool = True, zero_first: bool = False) -> MtpNetwork:
    """One untrained MTP module in float32 for the target `model`, a transformers causal language model.

    Its decoder layer is of the model's own class, its embeddings and output layer are the model's. Weights are drawn
    from torch's default generator.

    layout: "deepseek-v3" (GLM-4.5's too), "mimo-7b", "mimo-v2", "qwen3-next" or "nemotron-h": the order of what the
        projection reads, and the names in a file. Raises ValueError for another one."""
    told = layout_named(layout)
    return MtpNetwork([MtpModule(model, new_module(model, told), told)], normed, zero_first)
