"""Which model a set of heads belongs to: its name, its sizes and a few of its numbers, compared before heads draft.

Some numbers of weights spread over the model tell models apart that have one name or one shape (a base model and its
chat version, a model and itself after Medusa-2). They are compared with a tolerance, so that casts between dtypes
agree; weights that are renamed, quantised or elsewhere are left out. Heads without them compare names."""

import re
import warnings
from dataclasses import replace

import torch
from torch import Tensor

from medusa.config import MedusaConfig
from specdec.model.output_layer import sizes_of

WEIGHTS, NUMBERS = 8, 8  # weights that are looked at, besides the output layer, and numbers of each
OF, OUTPUT = "of", "output layer"  # keys beside the names of weights: whose numbers they are, and where it has none
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TOLERANCE, LEAST = 2**-7, 1e-6  # two roundings to bfloat16; what float16 loses of tiny numbers


def with_base(config: MedusaConfig, model, name: str | None = None) -> MedusaConfig:
    """`config` with the name, the revision and some numbers of `model`: for heads that now belong to it.

    `name`: where the model is from now on, if not where it was loaded from."""
    base = str(getattr(model.config, "_name_or_path", "")) if name is None else name
    revision = getattr(model.config, "_commit_hash", None) if name is None else None
    weights = _candidates(model)
    names = [name for name in weights if name != OUTPUT]
    spread = {names[place * (len(names) - 1) // (WEIGHTS - 1)] for place in range(WEIGHTS)} if names else set()
    numbers = {name: _numbers(weight) for name, weight in weights.items() if name == OUTPUT or name in spread}
    shown = {name: " ".join(f"{number:.4g}" for number in some.tolist()) for name, some in numbers.items()}
    return replace(config, base_model=base, base_revision=revision, base_weights={OF: base} | shown)


def check_base(config: MedusaConfig, model) -> None:
    """Warn unless heads of `config` were made for `model`; raise ValueError, naming both, where the sizes differ."""
    theirs = sizes_of(model.get_output_embeddings())
    ours, here = (config.vocab_size, config.hidden_size), _name(model)
    base = config.base_model or "an unnamed model"
    if ours != theirs:
        raise ValueError(
            f"the heads were made for another model: [V, H] is {ours} for the heads of {base} and {theirs} for {here}"
        )
    # numbers of another model than the one that the config names by now say nothing
    stored = dict(config.base_weights or {})
    numbers = stored if stored.pop(OF, None) == config.base_model else {}
    same = _same_weights(numbers, model)
    how = "and are used with" if same is None else "whose weights differ from those of"
    if same is None and config.base_model and getattr(model.config, "_name_or_path", ""):
        same = _last(config.base_model) == _last(here)
    if same is False:
        warnings.warn(
            f"the heads were made for {base}, {how} {here}: the text stays right, but fewer drafts will be accepted",
            stacklevel=3,
        )


def _name(model) -> str:
    return str(getattr(model.config, "_name_or_path", "")) or f"an unnamed {type(model).__name__}"


def _last(name: str) -> str:
    """The last part of a path or hub id; of a folder in the hub's cache the model's name.

    >>> _last("org/Some-Model"), _last("/cache/models--org--some-model/snapshots/1234"), _last("runs/some-model/")
    ('some-model', 'some-model', 'some-model')
    """
    parts = [part for part in re.split(r"[/\\]", name.lower()) if part] or [""]
    cached = [part.split("--")[-1] for part in parts if part.startswith("models--")]
    return (cached or parts)[-1]


def _candidates(model) -> dict[str, Tensor]:
    """The plain matrices of a model by name, in its order, and that of its output layer."""
    own = getattr(model.get_output_embeddings(), "weight", None)  # a quantised layer may have none
    named = [*model.named_parameters(), *([] if own is None else [(OUTPUT, own)])]
    plain = lambda weight: weight.ndim > 1 and weight.dtype in FLOATS and type(weight.data) is Tensor
    return {name: weight.detach() for name, weight in named if plain(weight) and not weight.is_meta}


def _numbers(weight: Tensor) -> Tensor:
    """Some numbers of a weight, evenly spread."""
    places = (2 * torch.arange(NUMBERS, device=weight.device) + 1) * weight.numel() // (2 * NUMBERS)
    return weight.reshape(-1)[places].double().cpu()


def _same_weights(stored: dict[str, str], model) -> bool | None:
    """Whether the numbers of all weights that can be compared are the model's; None where there are none."""
    weights = _candidates(model)
    pairs = [(_stored(numbers), _numbers(weights[name])) for name, numbers in stored.items() if name in weights]
    close = [torch.isclose(a, b, rtol=TOLERANCE, atol=LEAST).all() if len(a) == len(b) else False for a, b in pairs]
    return all(close) if close else None


def _stored(numbers: str) -> Tensor:
    return torch.tensor([float(number) for number in numbers.split()], dtype=torch.float64)
