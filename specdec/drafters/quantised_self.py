"""The target drafts for itself with weights rounded to few bits, in its own cache.

Source: Zhang et al. 2024 (Draft & Verify) for a target that drafts for itself; Tiwari et al. 2025 (QuantSpec) for
drafting with its weights in 4 bits."""

from specdec.drafters.model import ModelDraftSession
from specdec.drafters.shared_cache import (
    borrowing_runner,
    require_own_target,
    shared_cache_traits,
    start_in_shared_cache,
)
from specdec.model.quantised_copy import QuantisedCopy
from specdec.model.runner import ModelRunner
from specdec.requests.rows import Rows
from specdec.trees.tree import TokenTree


class QuantisedSelfDrafter:
    """Drafts a chain of `num_tokens`, or `tree`, with `target`, whose linear layers are rounded to `bits`, 4 or 8.

    There is no second cache, and no prompt is run for drafting: keys and values of accepted tokens are the target's
    own, those of drafted tokens lie behind them until the verification overwrites them. `target` is a model or a
    `ModelRunner`; `sample` is that of `ModelDrafter`; `group` and `output_layer` are those of `QuantisedCopy`, which
    rounds to the nearest, without calibration. On a GPU few rows are multiplied by a kernel that reads the packed
    weights; a CPU multiplies by a matrix that is made anew in each product, which is slower than the target itself.

    Beside the target's memory it takes that of the packed weights: for each rounded weight 4.25 bits (groups of 128) or
    8 bits, so a quarter or half of the target's 16-bit layers. `copy.kept` says which layers stay as they are, and why;
    `generator.explain()` says it too. Weights of the target that are written to are rounded anew at the next call.

    Raises ValueError for bits or a group that there are not, for a target without a layer that can be rounded, in
    `validate` for a generator with another target, and in `start` where modules of the target were exchanged.

    >>> import torch, specdec
    >>> pair = specdec.load_tiny_pair()  # whose widths no groups of 128 fill
    >>> drafter = specdec.QuantisedSelfDrafter(pair.target, num_tokens=3, group=32)
    >>> out = specdec.SpeculativeGenerator(pair.target, drafter).generate(torch.tensor([[5, 6]]), max_new_tokens=8)
    >>> out.lengths
    tensor([8])
    """

    def __init__(self, target, num_tokens: int = 5, tree: TokenTree | None = None, sample: bool = True, bits: int = 4,
                 group: int | None = None, output_layer: bool = False):  # fmt: skip
        self._model = target.model if isinstance(target, ModelRunner) else target
        self.tree = (TokenTree.chain(num_tokens) if tree is None else tree).by_level()
        self.traits = shared_cache_traits(self.tree)
        self.copy = QuantisedCopy(self._model, bits, group, output_layer)
        self.runner = borrowing_runner(self.copy.model)
        self.runner.remarks = self.copy.kept_layers()
        self._sample = sample

    def validate(self, target: ModelRunner) -> None:
        """Raise ValueError unless `target` runs the model whose weights were rounded."""
        require_own_target(self._model, target, self.tree, self.runner)

    def start(self, rows: Rows, max_tokens: int) -> ModelDraftSession:
        """Begin to draft, in the target's own cache, with the weights that the target has now."""
        self.copy.refresh()
        return start_in_shared_cache(self.runner, rows, self.tree, self._sample)
