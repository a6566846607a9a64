"""The shape and origin of a set of Medusa heads."""

from dataclasses import dataclass

from medusa.logits import LogitMap

OUTPUTS = ("own", "shared", "low_rank")
FORMAT = 1


@dataclass(frozen=True, slots=True)
class MedusaConfig:
    """Shape and origin of a set of heads.

    `output`: "own" gives every head a matrix `[V, H]` of its own, "shared" uses the model's output layer for all, and
    "low_rank" adds to the model's a product of rank `rank` a head. With `bias` each own output layer has a bias `[V]`
    too; shared and low-rank heads get the model's with its output layer. What comes out is scaled by `logit_scale` and
    capped at `logit_cap` as the model's own logits are (`medusa.logits.LogitMap`). `base_weights` are some numbers of
    the model that the heads were made for (`medusa.base_model`). Raises ValueError for a number below 1, an unknown
    output, a rank without "low_rank", a bias without "own", or a scale or cap that is not positive."""

    num_heads: int
    num_layers: int
    hidden_size: int
    vocab_size: int
    output: str = "own"
    rank: int | None = None
    base_model: str = ""
    base_revision: str | None = None
    format: int = FORMAT
    bias: bool = False
    logit_scale: float = 1.0
    logit_cap: float | None = None
    base_weights: dict[str, str] | None = None

    def __post_init__(self):
        for name in ("num_heads", "num_layers", "hidden_size", "vocab_size"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {getattr(self, name)!r}")
        if self.output not in OUTPUTS:
            raise ValueError(f"output must be one of {', '.join(OUTPUTS)}, got {self.output!r}")
        too_large_or_small = self.rank is not None and not 1 <= self.rank <= self.hidden_size
        if (self.rank is not None) != (self.output == "low_rank") or too_large_or_small:
            raise ValueError(
                f'rank goes with output="low_rank" and lies in 1 … {self.hidden_size}, got {self.rank} with '
                f"{self.output!r}"
            )
        if self.bias and self.output != "own":
            raise ValueError(f'bias=True goes with output="own", got {self.output!r}, which takes the model\'s')
        if self.format != FORMAT:
            raise ValueError(f"heads of format {self.format} are not known here, only {FORMAT}")
        LogitMap(self.logit_scale, self.logit_cap)  # checks both
