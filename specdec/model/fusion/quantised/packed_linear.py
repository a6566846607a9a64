"""A linear layer of our own with weights in 8 or 4 bits."""

from dataclasses import replace

from torch import Tensor, nn

from specdec.model.fusion.quantised.linear import quantised_linear
from specdec.model.fusion.quantised.packed import PackedWeight
from specdec.model.fusion.quantised.reading import Reading, hooked, refused


class PackedLinear(nn.Module):
    """`x [..., in]` @ `weight [out, in]`.T + `bias [out]` -> `[..., out]`; `bias` may be another layer's own."""

    values: Tensor
    scales: Tensor

    def __init__(self, weight: PackedWeight, bias: nn.Parameter | None = None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("values", weight.values)
        self.register_buffer("scales", weight.scales)
        self.bias = bias
        self._form = weight

    @property
    def packed(self) -> PackedWeight:
        """Its weight, in the buffers `values` and `scales`."""
        return replace(self._form, values=self.values, scales=self.scales)

    def forward(self, x: Tensor) -> Tensor:
        """By a kernel for few rows on a GPU, else by the reference (`quantised_linear`)."""
        return quantised_linear(x, self.packed, self.bias)

    def extra_repr(self) -> str:
        """What `print` shows of it."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self._form.kind}"


def read_packed_linear(layer: nn.Module) -> Reading | None:
    """What is to be said of a `PackedLinear`; None for any other layer."""
    if type(layer) is not PackedLinear:
        return None
    kind = layer.packed.kind
    if "forward" in vars(layer) or hooked(layer):
        return refused(kind, "it has hooks, or a forward of its own")
    return Reading(kind, lambda: layer.packed)
