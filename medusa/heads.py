"""Medusa heads: K small networks that guess the tokens after the next one from one hidden state (Cai et al. 2024,
section 2.1).

Head k maps the hidden state h that the model's output layer reads to logits of the token k + 2 places on (k from 0; the
model itself gives place 1). Each of its R residual blocks is h <- h + SiLU(W h + b); then an output layer follows. W
and b start at zero and the output as the model's own, with its bias where it has one (phi, gptj), so an untrained head
repeats the model's logits exactly."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from specdec.loading import local_folder
from specdec.model.fusion.projections import FusedProjections, changed, fuse_projections, join, shallow_copy

OUTPUTS = ("own", "shared", "low_rank")
FORMAT = 1
WEIGHTS, LEGACY = "medusa_lm_head.safetensors", "medusa_lm_head.pt"


@dataclass(frozen=True, slots=True)
class MedusaConfig:
    """Shape and origin of a set of heads.

    `output`: "own" gives every head a matrix [V, H] of its own, "shared" uses the model's output layer for all, and
    "low_rank" adds to the model's a product of rank `rank` a head. With `bias` each own output layer has a bias `[V]`
    too; shared and low-rank heads get the model's with its output layer. Raises ValueError for a number below 1, an
    unknown output, a rank without "low_rank" or a bias without "own"."""

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

    def __post_init__(self):
        for name in ("num_heads", "num_layers", "hidden_size", "vocab_size"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {getattr(self, name)!r}")
        if self.output not in OUTPUTS:
            raise ValueError(f"output must be one of {', '.join(OUTPUTS)}, got {self.output!r}")
        if (self.rank is not None) != (self.output == "low_rank") or (
            self.rank is not None and not 1 <= self.rank <= self.hidden_size
        ):
            raise ValueError(
                f'rank goes with output="low_rank" and lies in 1 … {self.hidden_size}, got {self.rank} with '
                f"{self.output!r}"
            )
        if self.bias and self.output != "own":
            raise ValueError(f'bias=True goes with output="own", got {self.output!r}, which takes the model\'s')
        if self.format != FORMAT:
            raise ValueError(f"heads of format {self.format} are not known here, only {FORMAT}")


class ResidualBlock(nn.Module):
    """h + SiLU(W h + b), the identity at the start."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.linear = nn.Linear(hidden_size, hidden_size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[..., H]` -> `[..., H]`."""
        return _residual(hidden, self.linear(hidden))


def _residual(hidden: Tensor, product: Tensor) -> Tensor:
    return hidden + nn.functional.silu(product)


class LowRank(nn.Module):
    """A correction of rank r to the model's output layer, zero at the start: x -> up(down(x))."""

    def __init__(self, hidden_size: int, vocab_size: int, rank: int):
        super().__init__()
        self.down = nn.Linear(hidden_size, rank, bias=False)
        self.up = nn.Linear(rank, vocab_size, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[..., H]` -> `[..., V]`."""
        return self.up(self.down(hidden))


class MedusaHeads(nn.Module):
    """The heads of one model. `head(h)` of every head reads what the model's output layer `lm_head` reads.

    >>> lm_head = nn.Linear(8, 32, bias=False)
    >>> heads = MedusaHeads(MedusaConfig(num_heads=2, num_layers=1, hidden_size=8, vocab_size=32), lm_head)
    >>> heads(torch.ones(5, 8), lm_head).shape
    torch.Size([2, 5, 32])
    """

    def __init__(self, config: MedusaConfig, lm_head: nn.Module | None = None):
        super().__init__()
        self.config = config
        make = lambda: [ResidualBlock(config.hidden_size) for _ in range(config.num_layers)]
        outputs = {
            "own": lambda: [nn.Linear(config.hidden_size, config.vocab_size, bias=config.bias)],
            "shared": list,
            "low_rank": lambda: [LowRank(config.hidden_size, config.vocab_size, config.rank)],
        }[config.output]
        self.heads = nn.ModuleList(nn.Sequential(*make(), *outputs()) for _ in range(config.num_heads))
        self.first: FusedProjections | None = None  # the first block's product of all heads
        if lm_head is not None:
            self._start_as(lm_head)

    @classmethod
    def for_model(
        cls, model, num_heads: int = 4, num_layers: int = 1, output: str = "own", rank: int | None = None
    ) -> "MedusaHeads":
        """Untrained heads for a transformers causal language model, in its dtype and on its device."""
        lm_head = model.get_output_embeddings()
        vocab, hidden = lm_head.weight.shape
        name, revision = getattr(model.config, "_name_or_path", ""), getattr(model.config, "_commit_hash", None)
        bias = output == "own" and getattr(lm_head, "bias", None) is not None
        config = MedusaConfig(num_heads, num_layers, hidden, vocab, output, rank, str(name), revision, bias=bias)
        return cls(config, lm_head).to(device=lm_head.weight.device, dtype=lm_head.weight.dtype)

    @torch.no_grad()
    def _start_as(self, lm_head: nn.Module) -> None:
        if tuple(lm_head.weight.shape) != (self.config.vocab_size, self.config.hidden_size):
            raise ValueError(
                f"the output layer is {list(lm_head.weight.shape)}, these heads are for "
                f"[{self.config.vocab_size}, {self.config.hidden_size}]"
            )
        if self.config.output != "own":
            return
        biased = getattr(lm_head, "bias", None) is not None
        if self.config.bias != biased:
            raise ValueError(f"the output layer has {'a' if biased else 'no'} bias, the heads have bias={not biased}")
        for head in self.heads:
            head[-1].weight.copy_(lm_head.weight)
            if self.config.bias:
                head[-1].bias.copy_(lm_head.bias)

    def state(self, head: int, hidden: Tensor) -> Tensor:
        """What the residual blocks of one head make of `hidden [..., H]`."""
        return self.heads[head][: self.config.num_layers](hidden)

    def states(self, hidden: Tensor) -> Tensor:
        """What the residual blocks of all heads make of `hidden [..., H]`: `[K, ..., H]`."""
        if self.first is None:
            return torch.stack([self.state(head, hidden) for head in range(self.config.num_heads)])
        states = _residual(
            hidden.unsqueeze(-2), self.first.multiply(hidden).unflatten(-1, (self.config.num_heads, -1))
        ).movedim(-2, 0)
        if self.config.num_layers == 1:
            return states
        return torch.stack(
            [head[1 : self.config.num_layers](state) for head, state in zip(self.heads, states, strict=True)]
        )

    def fuse_projections(self, product: Callable) -> "MedusaHeads":
        """A twin with the same weights that multiplies by `product`, and by the first blocks of all heads at once: see
        `specdec.model.fusion.projections`.
        """
        twin = shallow_copy(self)
        twin.heads = fuse_projections(self.heads, product)
        if not any(changed(head[0]) for head in self.heads):
            twin.first = join([head[0].linear for head in self.heads], product)
        return twin

    def project(self, head: int, state: Tensor, lm_head: nn.Module | None = None) -> Tensor:
        """Logits `[..., V]` of one head from its state. `lm_head` is the model's output layer, which "own" heads do
        without.
        """
        if self.config.output != "own" and lm_head is None:
            raise ValueError(f'heads with output="{self.config.output}" need the model\'s output layer')
        if self.config.output == "shared":
            return lm_head(state)
        own = self.heads[head][self.config.num_layers](state)
        return own if self.config.output == "own" else lm_head(state) + own

    def output_parameters(self, head: int, lm_head: nn.Module | None = None) -> list[nn.Parameter]:
        """The weights that `project` uses and that are to be learned."""
        modules = [
            *self.heads[head][self.config.num_layers :],
            *([lm_head] if self.config.output != "own" and lm_head is not None else []),
        ]
        return [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]

    def logits(self, head: int, hidden: Tensor, lm_head: nn.Module | None = None) -> Tensor:
        """Logits `[..., V]` of one head from `hidden [..., H]`."""
        return self.project(head, self.state(head, hidden), lm_head)

    def forward(self, hidden: Tensor, lm_head: nn.Module | None = None) -> Tensor:
        """Logits `[K, ..., V]` of all heads. A model's output layer that they share is read once for all of them."""
        states = self.states(hidden)
        if self.config.output == "own":
            return torch.stack([self.project(head, state) for head, state in enumerate(states)])
        if lm_head is None or self.config.output == "shared":
            return self.project(0, states, lm_head)
        return lm_head(states) + torch.stack([self.heads[head][-1](state) for head, state in enumerate(states)])

    def save_pretrained(self, folder: str | Path, card: str | None = None) -> None:
        """Write config.json, the weights as safetensors, and with `card` a README.md."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = asdict(self.config) | {
            "medusa_num_heads": self.config.num_heads,
            "medusa_num_layers": self.config.num_layers,
            "base_model_name_or_path": self.config.base_model,
        }
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        save_file(
            {name: weight.contiguous() for name, weight in self.heads.state_dict().items()},
            folder / WEIGHTS,
            {"format": "pt"},
        )
        (folder / WEIGHTS).chmod(0o644)  # safetensors makes it readable for its owner alone
        if card is not None:
            (folder / "README.md").write_text(card)

    @classmethod
    def from_pretrained(cls, name: str | Path, dtype: torch.dtype | None = None) -> "MedusaHeads":
        """Heads from a folder or the hub: ours, or a published Medusa checkpoint (safetensors, or a legacy .pt read
        without running code).

        Raises FileNotFoundError for a folder without config or weights, ValueError naming a missing, surplus or
        misshapen weight."""
        folder = _fetch(name)
        given = json.loads((folder / "config.json").read_text())
        weights = _read(folder)
        heads = cls(_config(given, weights))
        expected = heads.heads.state_dict()
        for what, names in (
            ("lack", expected.keys() - weights.keys()),
            ("have unknown", weights.keys() - expected.keys()),
        ):
            if names:
                raise ValueError(f"the heads in {folder} {what} weights: {', '.join(sorted(names)[:4])}")
        for key, weight in weights.items():
            if weight.shape != expected[key].shape:
                raise ValueError(
                    f"weight {key} in {folder} is {list(weight.shape)}, its config asks for {list(expected[key].shape)}"
                )
        heads.heads.load_state_dict(weights)
        return heads.to(dtype or next(iter(weights.values())).dtype)

    def push_to_hub(self, repo: str, card: str | None = None, **options) -> str:
        """Upload what `save_pretrained` writes to the hub; `options` go to `huggingface_hub.HfApi.create_repo`. Returns
        the commit's address.

        A `repo` without an owner is the user's own.
        """
        from tempfile import TemporaryDirectory

        from huggingface_hub import HfApi

        api = HfApi()
        repo = api.create_repo(repo, exist_ok=True, **options).repo_id  # with the owner, which an upload needs
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, card)
            return str(api.upload_folder(repo_id=repo, folder_path=folder))


def _fetch(name: str | Path) -> Path:
    path = local_folder(name)
    if path is None:
        from huggingface_hub import snapshot_download

        path = Path(snapshot_download(str(name), allow_patterns=["config.json", WEIGHTS, LEGACY]))
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"heads directory {path} has no config.json")
    return path


def _read(folder: Path) -> dict[str, Tensor]:
    if (folder / WEIGHTS).is_file():
        return load_file(folder / WEIGHTS)
    if (folder / LEGACY).is_file():
        weights = torch.load(folder / LEGACY, map_location="cpu", weights_only=True)
        return {name.removeprefix("medusa_head."): weight for name, weight in weights.items()}
    raise FileNotFoundError(f"heads directory {folder} has neither {WEIGHTS} nor {LEGACY}")


def _config(given: dict, weights: dict[str, Tensor]) -> MedusaConfig:
    """Our own config, or what a published one says and its weights show."""
    if "format" in given:
        names = MedusaConfig.__dataclass_fields__
        return MedusaConfig(**{name: given[name] for name in names if name in given})
    missing = [name for name in ("medusa_num_heads", "medusa_num_layers") if name not in given]
    last = f"0.{given.get('medusa_num_layers')}.weight"
    if missing or last not in weights:
        raise ValueError(f"the config lacks {', '.join(missing)}" if missing else f"the heads lack the weight {last}")
    vocab, hidden = weights[last].shape
    heads = 1 + max(int(name.split(".")[0]) for name in weights)
    # published configs sometimes promise fewer heads than their weights hold
    bias, base = last.replace("weight", "bias") in weights, given.get("base_model_name_or_path", "")
    return MedusaConfig(heads, given["medusa_num_layers"], hidden, vocab, base_model=base, bias=bias)
