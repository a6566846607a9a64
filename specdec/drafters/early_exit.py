"""The target's first layers draft, with its own head and its own cache.

Source: Schuster et al. 2022 (CALM) for early exits; Zhang et al. 2024 (Draft & Verify) and Elhoushi et al. 2024
(LayerSkip) for drafting so. A model trained with early exits drafts far better than one that was not."""

import copy

from torch import nn

from attention import UnsupportedArchitecture
from specdec.drafters.model import ModelDraftSession
from specdec.drafters.shared_cache import (
    borrowing_runner,
    require_own_target,
    shared_cache_traits,
    start_in_shared_cache,
)
from specdec.model.decoder_layers import name_of_layers
from specdec.model.fusion.projections import shallow_copy
from specdec.model.runner import ModelRunner
from specdec.requests.rows import Rows
from specdec.trees.tree import TokenTree


class EarlyExitDrafter:
    """Drafts a chain of `num_tokens`, or `tree`, with the first `num_layers` layers of `target`.

    There is no second model and no second cache: keys and values of accepted tokens are the target's own. `target` is a
    model or a `ModelRunner`; `sample` is that of `ModelDrafter`. Raises ValueError for a number of layers outside
    1 … layers - 1 and, in `validate`, for a generator with another target."""

    def __init__(self, target, num_layers: int, num_tokens: int = 5, tree: TokenTree | None = None,
                 sample: bool = True):  # fmt: skip
        self._model = target.model if isinstance(target, ModelRunner) else target
        self.runner = borrowing_runner(first_layers(self._model, num_layers))
        self.tree = (TokenTree.chain(num_tokens) if tree is None else tree).by_level()
        self.traits = shared_cache_traits(self.tree)
        self._sample = sample

    def validate(self, target: ModelRunner) -> None:
        """Raise ValueError unless `target` runs the model whose first layers this drafter uses."""
        require_own_target(self._model, target, self.tree, self.runner)

    def start(self, rows: Rows, max_tokens: int) -> ModelDraftSession:
        """Begin to draft, in the target's own cache."""
        return start_in_shared_cache(self.runner, rows, self.tree, self._sample)


def first_layers(model, num_layers: int):
    """A model of the first `num_layers` layers of `model` that shares all its weights; `model` stays as it is.

    The modules that contain the list of layers are copied shallowly, all others are the same objects.
    """
    total = model.config.get_text_config().num_hidden_layers
    if total < 2:
        raise ValueError(f"{type(model).__name__} has {total} layer, so there are no first ones to draft with")
    if not 1 <= num_layers < total:
        raise ValueError(f"num_layers must lie between 1 and {total - 1}, got {num_layers}")
    layers = name_of_layers(model)
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    if getattr(text, "hidden_size_per_layer_input", None):
        raise UnsupportedArchitecture(
            f"{type(model).__name__} cannot be cut to {num_layers} layers: one projection makes further inputs of all "
            "its layers (hidden_size_per_layer_input)"
        )
    text.num_hidden_layers = num_layers
    if getattr(text, "layer_types", None):
        try:
            text.layer_types = text.layer_types[:num_layers]
        except AttributeError as error:
            raise UnsupportedArchitecture(
                f"{type(model).__name__} cannot be cut to {num_layers} layers: {error}"
            ) from error
    short = outer = shallow_copy(model)
    *path, last = layers.split(".")
    for name in path:
        inner = shallow_copy(getattr(outer, name))
        outer._modules[name] = inner
        outer = inner
    outer._modules[last] = nn.ModuleList(list(getattr(outer, last))[:num_layers])
    for module in (short, *(short.get_submodule(".".join(path[: i + 1])) for i in range(len(path)))):
        if hasattr(module, "config"):
            module.config = config if type(module.config) is type(config) else config.get_text_config()
    return short
