"""Medusa heads as a drafter: one hidden state, K rows of candidates, laid on a static sparse tree (Cai et al. 2024,
section 2.2).

After a round the target has run up to the last accepted node and drawn the token y behind it. Its hidden state there is
all that the heads read: head 0 guesses the token after y, head 1 the one after that. Node n of the tree, at depth d and
of rank r among its siblings, gets the r-th choice of head d - 1, whatever its parent holds; y is the root. The choice
is deterministic, so `tree_exact` makes sampling exact and `Typical` is Medusa's own rule."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from medusa.heads import MedusaHeads
from specdec.cuda_graph import keep_alive
from specdec.drafters.base import DrafterTraits
from specdec.generation.generators import GenerationOutput, SpeculativeGenerator
from specdec.model.runner import ModelRunner
from specdec.requests.batch import Batch
from specdec.requests.rows import Row, Rows
from specdec.sampling.draws import top
from specdec.trees.draft import Draft
from specdec.trees.tree import TokenTree, require_width


class MedusaDrafter:
    """Drafts `tree` with `heads`, which must be as many as the tree is deep (None: the widest tree of up to 4, 3, 2, 1
    … children a level).

    Raises ValueError for a tree deeper than the heads are many and, once it meets its target, for another hidden or
    vocabulary size, device or dtype."""

    def __init__(self, heads: MedusaHeads, tree: TokenTree | None = None):
        count = heads.config.num_heads
        self.tree = (
            TokenTree.from_widths([max(1, 4 - depth) for depth in range(min(count, 4))]) if tree is None else tree
        ).by_level()
        if not 1 <= self.tree.max_depth <= count:
            raise ValueError(f"{count} heads draft trees of depth 1 to {count}, got depth {self.tree.max_depth}")
        self.heads = heads.eval()
        self.traits = DrafterTraits(self.tree.size - 1, "tree", max_depth=count, captured=True, hidden=True)

    def validate(self, target: ModelRunner) -> None:
        """Raise ValueError unless the heads are for a model of this shape."""
        weight = target.model.get_output_embeddings().weight
        ours = next(self.heads.parameters())
        for what, mine, theirs in (
            ("[V, H]", (self.heads.config.vocab_size, self.heads.config.hidden_size), tuple(weight.shape)),
            ("device", ours.device, weight.device),
            ("dtype", ours.dtype, weight.dtype),
        ):
            if mine != theirs:
                raise ValueError(
                    f"the heads were made for another model: {what} is {mine} for the heads and {theirs} for the target"
                )
        require_width(self.tree, target.vocab_size)

    def start(self, rows: Rows, max_tokens: int) -> "MedusaSession":
        """Begin to draft; the rounds keep the hidden state of each row's last accepted node from now on."""
        return MedusaSession(rows.target.fused(self.heads), self.tree)  # which may move weights


class MedusaSession:
    """One call. All it needs lies in the batch."""

    states = ()

    def __init__(self, heads: MedusaHeads, tree: TokenTree):
        self._heads, self._tree = heads, tree

    @property
    def reads(self) -> tuple[int, ...]:
        """Where in memory the heads lie."""
        return tuple(parameter.data_ptr() for parameter in self._heads.parameters())

    def min_length(self, tree: TokenTree | None) -> int:
        """The heads read no text."""
        return 1

    def propose(self, batch: Batch, tree: TokenTree | None = None) -> Draft:
        """Each head's best candidates on the tree; nothing in a call's first round, whose prompt the target has not run
        yet."""
        root, hidden = batch.last_tokens(), batch.hidden
        if hidden is None:
            return Draft(TokenTree.chain(0), root)
        tree = self._tree if tree is None else tree.by_level()
        logits = self._heads(hidden, batch.rows.target.output_layer)  # [K, A, V]
        best = top(logits, max(tree.ranks) + 1)[1].transpose(0, 1)  # [A, K, choices]
        head, choice = keep_alive(_choices(tree, root.device))
        return Draft(tree, torch.cat([root, best[:, head, choice]], 1))

    def commit(self, batch: Batch, paths: Sequence[Sequence[int]]) -> None:
        """The rounds keep the hidden state."""

    def release(self, rows: Sequence[Row]) -> None:
        """No row holds anything here."""


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def _choices(tree: TokenTree, device: torch.device) -> tuple[Tensor, Tensor]:
    """Per node below the root: which head and which of its choices, `[N - 1]` each."""
    return torch.tensor([depth - 1 for depth in tree.depths[1:]], device=device), torch.tensor(
        tree.ranks[1:], device=device
    )


class MedusaGenerator:
    """Decodes `target` with Medusa heads: a `SpeculativeGenerator` over a `MedusaDrafter`. `options` are those of
    `SpeculativeGenerator`.

    With sampling the output is an exact sample of the target's; `rule=Typical()` is Medusa's own acceptance, which is
    not."""

    def __init__(self, target, heads: MedusaHeads, tree: TokenTree | None = None, **options):
        self._generator = SpeculativeGenerator(target, MedusaDrafter(heads, tree), **options)
        self.target = self._generator.target

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options) -> GenerationOutput:
        """See `SpeculativeGenerator.generate`; the same options."""
        return self._generator.generate(input_ids, attention_mask, **options)
