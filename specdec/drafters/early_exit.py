"""The target's first layers draft, with its own head and its own cache.

Source: Schuster et al. 2022 (CALM) for early exits; Zhang et al. 2024 (Draft & Verify) and Elhoushi et al. 2024
(LayerSkip) for drafting so. A model trained with early exits drafts far better than one that was not."""

import copy
from collections.abc import Sequence

from torch import Tensor, nn

from attention import UnsupportedArchitecture
from specdec.drafters.base import DrafterTraits
from specdec.drafters.model import ModelDraftSession
from specdec.drafters.model_state import run_anew, run_nodes, unseen
from specdec.model.fusion.projections import shallow_copy
from specdec.model.runner import ModelRunner
from specdec.requests.batch import Batch
from specdec.requests.rows import Row, Rows
from specdec.trees.tensors import Tree
from specdec.trees.tree import TokenTree, require_width


class EarlyExitDrafter:
    """Drafts a chain of `num_tokens`, or `tree`, with the first `num_layers` layers of `target`.

    There is no second model and no second cache: keys and values of accepted tokens are the target's own. `target` is a
    model or a `ModelRunner`; `sample` is that of `ModelDrafter`. Raises ValueError for a number of layers outside
    1 … layers - 1 and, in `validate`, for a generator with another target."""

    def __init__(self, target, num_layers: int, num_tokens: int = 5, tree: TokenTree | None = None,
                 sample: bool = True):  # fmt: skip
        model = target.model if isinstance(target, ModelRunner) else target
        self._model = model
        self.runner = ModelRunner(first_layers(model, num_layers), mode="eager")
        self.runner.borrows_cache = True
        self.tree = (TokenTree.chain(num_tokens) if tree is None else tree).by_level()
        tokens = self.tree.size - 1
        self.traits = DrafterTraits(tokens, "tree", target_tokens=tokens, captured=True, own_depth=self.tree.max_depth,
                                    tree=self.tree)  # fmt: skip
        self._sample = sample

    def validate(self, target: ModelRunner) -> None:
        """Raise ValueError unless `target` runs the model whose first layers this drafter uses."""
        if target.model is not self._model:
            raise ValueError(
                f"the drafter uses layers of a {type(self._model).__name__} that is not the generator's target"
            )
        require_width(self.tree, target.vocab_size)

    def start(self, rows: Rows, max_tokens: int) -> ModelDraftSession:
        """Begin to draft, in the target's own cache."""
        self.runner.share_cache(rows.target)
        self.runner.match_mode(rows.target)
        return ModelDraftSession(_SharedState(self.runner), self.tree, self._sample and rows.do_sample)


class _SharedState:
    """A `DraftState` over the target's sequences, which `end_proposal` restores."""

    draft_room = 0  # the target's cache has room for drafted tokens: `DrafterTraits.target_tokens`

    def __init__(self, runner: ModelRunner):
        self.runner = runner
        self._before: list[int] = []

    def admit(self, rows: Rows, joining: Sequence[Row]) -> None:
        """Do nothing: the sequences are the target's."""

    def catch_up(self, batch: Batch) -> Tensor:
        """Run the tokens that the target has not seen through the first layers: in a captured round the last one."""
        if batch.captured:
            return run_anew(self, batch, 1)
        sequences = _of(batch.members)
        self._before = [self.runner.cache.length(sequence) for sequence in sequences]
        return self.runner.extend(sequences, unseen(self.runner, batch, sequences))

    def see(self, rows: Rows, members: Sequence[Row]) -> None:
        """Do nothing: the target has seen all but the last token."""

    def run(self, batch: Batch, tokens: Tensor, tree: Tree = None) -> Tensor:
        """See `DraftState.run`."""
        return run_nodes(self, batch, _of(batch.members), tokens, tree)

    def end_proposal(self, batch: Batch) -> None:
        """Drop the drafted tokens, whose keys and values the verification writes for all layers."""
        for row, length in zip(batch.members, self._before, strict=False):
            self.runner.cache.truncate(row.sequence, length)

    def truncate(self, rows: Sequence[Row], lengths: Sequence[int]) -> None:
        """Do nothing: the round truncates the target's sequences."""

    def pages_wanted(self, row: Row) -> int:
        """None: the target's cache has room for drafted tokens, `DrafterTraits.target_tokens`."""
        return 0

    def prefix_sequence(self, row: Row) -> int | None:
        """None: the target's own is shared already."""
        return None

    def with_pages(self, rows: Sequence[Row], lengths: Sequence[int]) -> list[int]:
        """The target's sequences, which have all their pages already."""
        return _of(rows)

    def release(self, rows: Sequence[Row]) -> None:
        """Do nothing: the loop frees the target's sequences."""


def _of(rows: Sequence[Row]) -> list[int]:
    return [row.sequence for row in rows]


def first_layers(model, num_layers: int):
    """A model of the first `num_layers` layers of `model` that shares all its weights; `model` stays as it is.

    The modules that contain the list of layers are copied shallowly, all others are the same objects.
    """
    total = model.config.get_text_config().num_hidden_layers
    if total < 2:
        raise ValueError(f"{type(model).__name__} has {total} layer, so there are no first ones to draft with")
    if not 1 <= num_layers < total:
        raise ValueError(f"num_layers must lie between 1 and {total - 1}, got {num_layers}")
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    names = [name for name, module in lists if len(module) == total]
    if len(names) != 1:
        raise ValueError(
            f"{type(model).__name__} must have one list of {total} layers, got {len(names)}: {', '.join(names)}"
        )
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    text.num_hidden_layers = num_layers
    if getattr(text, "layer_types", None):
        try:
            text.layer_types = text.layer_types[:num_layers]
        except AttributeError as error:
            raise UnsupportedArchitecture(
                f"{type(model).__name__} cannot be cut to {num_layers} layers: {error}"
            ) from error
    short = outer = shallow_copy(model)
    *path, last = names[0].split(".")
    for name in path:
        inner = shallow_copy(getattr(outer, name))
        outer._modules[name] = inner
        outer = inner
    outer._modules[last] = nn.ModuleList(list(getattr(outer, last))[:num_layers])
    for module in (short, *(short.get_submodule(".".join(path[: i + 1])) for i in range(len(path)))):
        if hasattr(module, "config"):
            module.config = config if type(module.config) is type(config) else config.get_text_config()
    return short
