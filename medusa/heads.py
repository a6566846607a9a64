"""Medusa heads: K small networks that guess the tokens after the next one from one hidden state (Cai et al. 2024, 2.1).

Head k maps the hidden state h that the model's output layer reads to logits of the token k + 2 places on (k from 0; the
model itself gives place 1). Each of its R residual blocks is h <- h + SiLU(W h + b); then an output layer follows. W
and b start at zero and the output as the model's own, with its bias where it has one (phi, gptj) and the scale and cap
that the model gives its logits (Granite, Gemma 2), so an untrained head repeats the model's logits exactly."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from medusa.base_model import with_base
from medusa.config import MedusaConfig
from medusa.files import WEIGHTS
from medusa.logits import LogitMap, measure
from medusa.published import read_heads
from specdec.model.fusion.projections import FusedProjections, changed, fuse_projections, join, shallow_copy
from specdec.model.output_layer import place_of, plain_weight, sizes_of


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

    `dtype` is that in which an output layer without a weight of its own computes (None: PyTorch's default).

    >>> lm_head = nn.Linear(8, 32, bias=False)
    >>> heads = MedusaHeads(MedusaConfig(num_heads=2, num_layers=1, hidden_size=8, vocab_size=32), lm_head)
    >>> heads(torch.ones(5, 8), lm_head).shape
    torch.Size([2, 5, 32])
    """

    def __init__(self, config: MedusaConfig, lm_head: nn.Module | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        self.config = config
        self.heads = nn.ModuleList(_head(config) for _ in range(config.num_heads))
        self.first: FusedProjections | None = None  # the first block's product of all heads
        if lm_head is not None:
            self._start_as(lm_head, dtype or torch.get_default_dtype())

    @classmethod
    def for_model(
        cls, model, num_heads: int = 4, num_layers: int = 1, output: str = "own", rank: int | None = None
    ) -> "MedusaHeads":
        """Untrained heads for a transformers causal language model, in its dtype and on its device.

        Three tokens run through the model, to see what it does to its output layer's results. Raises ValueError, naming
        the architecture, where heads could not repeat its logits."""
        logit_map, states = measure(model)
        lm_head = model.get_output_embeddings()
        (vocab, hidden), (device, dtype) = sizes_of(lm_head), place_of(model)
        bias = output == "own" and getattr(lm_head, "bias", None) is not None
        config = MedusaConfig(num_heads, num_layers, hidden, vocab, output, rank, bias=bias)
        config = replace(config, logit_scale=logit_map.scale, logit_cap=logit_map.cap)
        heads = cls(with_base(config, model), lm_head, dtype).to(device=device, dtype=dtype)
        with torch.no_grad():
            ours, theirs = heads.logits(0, states, lm_head).float(), logit_map(lm_head(states)).float()
        if (ours - theirs).norm() > 0.02 * theirs.norm():
            raise ValueError(
                f"{type(lm_head).__name__}, the output layer of {type(model).__name__}, does more than multiply by its "
                'weight, so heads cannot start with a copy of it; output="shared" uses the layer itself'
            )
        return heads

    @torch.no_grad()
    def _start_as(self, lm_head: nn.Module, dtype: torch.dtype) -> None:
        if sizes_of(lm_head) != (self.config.vocab_size, self.config.hidden_size):
            raise ValueError(
                f"the output layer is {list(sizes_of(lm_head))}, these heads are for "
                f"[{self.config.vocab_size}, {self.config.hidden_size}]"
            )
        if self.config.output != "own":
            return
        biased = getattr(lm_head, "bias", None) is not None
        if self.config.bias != biased:
            raise ValueError(f"the output layer has {'a' if biased else 'no'} bias, the heads have bias={not biased}")
        plain = plain_weight(lm_head, dtype)
        for head in self._sequences():
            own = cast(nn.Linear, head[-1])
            own.weight.copy_(plain)
            if self.config.bias:
                own.bias.copy_(cast(Tensor, lm_head.bias))

    @property
    def logit_map(self) -> LogitMap:
        """What turns results of output layers into logits."""
        return LogitMap(self.config.logit_scale, self.config.logit_cap)

    def _sequences(self) -> list[nn.Sequential]:
        """Each head's residual blocks, and its output layer unless that is the model's."""
        return [cast(nn.Sequential, head) for head in self.heads]

    def state(self, head: int, hidden: Tensor) -> Tensor:
        """`hidden [..., H]` after the residual blocks of one head, `[..., H]`."""
        return self._sequences()[head][: self.config.num_layers](hidden)

    def states(self, hidden: Tensor, count: int | None = None) -> Tensor:
        """`hidden [..., H]` after the residual blocks of the first `count` heads (None: of all), `[K, ..., H]`."""
        count = self.config.num_heads if count is None else count
        if self.first is None:
            return torch.stack([self.state(head, hidden) for head in range(count)])
        products = self.first.multiply(hidden, count).unflatten(-1, (count, -1))
        states = _residual(hidden.unsqueeze(-2), products).movedim(-2, 0)
        if self.config.num_layers == 1:
            return states
        pairs = zip(self._sequences()[:count], states, strict=True)
        return torch.stack([head[1 : self.config.num_layers](state) for head, state in pairs])

    def fuse_projections(self, product: Callable) -> "MedusaHeads":
        """A twin on the same weights that multiplies with `product`, and by the first blocks of all heads at once.

        See `specdec.model.fusion.projections`."""
        twin = cast(MedusaHeads, shallow_copy(self))
        twin.heads = cast(nn.ModuleList, fuse_projections(self.heads, product))
        blocks = [cast(ResidualBlock, head[0]) for head in self._sequences()]
        if not any(changed(block) for block in blocks):
            twin.first = join([block.linear for block in blocks], product)
        return twin

    def project(self, head: int, state: Tensor, lm_head: nn.Module | None = None) -> Tensor:
        """Logits `[..., V]` of one head from its state. `lm_head` is the model's output layer, unused by "own" heads.

        Raises ValueError where it is needed and missing."""
        return self.logit_map(self._result(head, state, lm_head))

    def _result(self, head: int, state: Tensor, lm_head: nn.Module | None) -> Tensor:
        """What the output layer of one head makes of its state, `[..., V]`."""
        own = self._sequences()[head][self.config.num_layers :]  # empty for shared heads
        if self.config.output == "own":
            return own(state)
        if lm_head is None:
            raise ValueError(f'heads with output="{self.config.output}" need the model\'s output layer')
        return lm_head(state) if self.config.output == "shared" else lm_head(state) + own(state)

    def output_parameters(self, head: int, lm_head: nn.Module | None = None) -> list[nn.Parameter]:
        """The weights that `project` uses and that require gradients."""
        theirs = [lm_head] if self.config.output != "own" and lm_head is not None else []
        modules = [*list(self._sequences()[head])[self.config.num_layers :], *theirs]
        return [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]

    def logits(self, head: int, hidden: Tensor, lm_head: nn.Module | None = None) -> Tensor:
        """Logits `[..., V]` of one head from `hidden [..., H]`."""
        return self.project(head, self.state(head, hidden), lm_head)

    def forward(self, hidden: Tensor, lm_head: nn.Module | None = None, count: int | None = None) -> Tensor:
        """Logits `[K, ..., V]` of the first `count` heads (None: of all) from `hidden [..., H]`.

        The model's output layer is read once for all."""
        states = self.states(hidden, count)
        if self.config.output == "own":
            return self.logit_map(torch.stack([self._result(head, state, None) for head, state in enumerate(states)]))
        if lm_head is None or self.config.output == "shared":
            return self.project(0, states, lm_head)
        pairs = zip(self._sequences()[: len(states)], states, strict=True)
        return self.logit_map(lm_head(states) + torch.stack([head[-1](state) for head, state in pairs]))

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
        weights = {name: weight.contiguous() for name, weight in self.heads.state_dict().items()}
        save_file(weights, folder / WEIGHTS, {"format": "pt"})
        (folder / WEIGHTS).chmod(0o644)  # safetensors makes it readable for its owner alone
        if card is not None:
            (folder / "README.md").write_text(card)

    @classmethod
    def from_pretrained(cls, name: str | Path, dtype: torch.dtype | None = None) -> "MedusaHeads":
        """Heads from a folder or the hub: ours, or published ones in any layout of `medusa.layouts`.

        Weights are safetensors, or a legacy .pt that is read with `weights_only=True`; heads in a whole model are read
        without it. Raises FileNotFoundError for a folder without config or weights, ValueError naming a missing,
        surplus or misshapen weight, or an unknown layout."""
        config, weights, folder = read_heads(name)
        heads = cls(config)
        expected = heads.heads.state_dict()
        missing, surplus = expected.keys() - weights.keys(), weights.keys() - expected.keys()
        for what, names in (("lack", missing), ("have unknown", surplus)):
            if names:
                raise ValueError(f"the heads in {folder} {what} weights: {', '.join(sorted(names)[:4])}")
        for key, weight in weights.items():
            if weight.shape != expected[key].shape:
                raise ValueError(
                    f"weight {key} in {folder} is {list(weight.shape)}, its config asks for {list(expected[key].shape)}"
                )
        heads.heads.load_state_dict(weights)
        return heads.to(dtype or next(iter(weights.values())).dtype)

    def push_to_hub(self, repo: str, card: str | None = None, files: Sequence[Path] = (), **options) -> str:
        """Upload what `save_pretrained` writes to the hub, and `files` beside it; returns the commit's address.

        A `repo` without an owner is the user's own; `options` go to `huggingface_hub.HfApi.create_repo`."""
        from tempfile import TemporaryDirectory

        from huggingface_hub import HfApi

        api = HfApi()
        repo = api.create_repo(repo, exist_ok=True, **options).repo_id  # with the owner, which an upload needs
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, card)
            for path in files:
                shutil.copy(path, folder)
            return str(api.upload_folder(repo_id=repo, folder_path=folder))


def _head(config: MedusaConfig) -> nn.Sequential:
    """The residual blocks of one head, and its output layer unless that is the model's."""
    layers: list[nn.Module] = [ResidualBlock(config.hidden_size) for _ in range(config.num_layers)]
    if config.output == "own":
        layers.append(nn.Linear(config.hidden_size, config.vocab_size, bias=config.bias))
    elif config.rank is not None:
        layers.append(LowRank(config.hidden_size, config.vocab_size, config.rank))
    return nn.Sequential(*layers)
