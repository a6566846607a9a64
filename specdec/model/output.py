"""What a forward of a model returns."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class RunnerOutput:
    """`logits [M, V]` of the kept tokens and, on request, `features [M, sum of widths]` (see `Features`)."""

    logits: Tensor
    features: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> "RunnerOutput":
        """`function` applied to each tensor."""
        return RunnerOutput(function(self.logits), None if self.features is None else function(self.features))
