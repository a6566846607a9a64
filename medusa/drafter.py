"""Medusa heads as a drafter: one hidden state gives K rows of candidates for a static tree (Cai et al. 2024, 2.2).

After a round the target has run up to the last accepted node and drawn the next token y. The heads read its hidden
state there and nothing else: head 0 guesses the token after y, head 1 the one after that. The root of the tree is y; a
node at depth d and of rank r among its siblings gets the r-th choice of head d - 1, whatever its parent holds. The
choice is deterministic, so `tree_exact` makes sampling exact and `Typical` is Medusa's own rule."""

from functools import lru_cache, partial
from typing import cast

import torch
from torch import Tensor

from medusa.base_model import check_base
from medusa.heads import MedusaHeads
from specdec.cuda_graph import keep_alive
from specdec.drafters.base import DrafterTraits, StatelessSession
from specdec.generation.generators import GenerationOutput, SpeculativeGenerator
from specdec.model.features import Features
from specdec.model.output_layer import place_of
from specdec.model.runner import ModelRunner
from specdec.requests.batch import Batch
from specdec.requests.rows import Rows
from specdec.sampling.draws import best, top
from specdec.trees.draft import Draft
from specdec.trees.tree import TokenTree, require_width


class MedusaDrafter:
    """Drafts `tree` with `heads`, one head for each level; by default 4, 3, 2 and 1 children on the first four levels.

    Raises ValueError for a tree deeper than there are heads and, in `validate`, for a target of another hidden or
    vocabulary size, device or dtype; `validate` warns of a target that the heads were not made for."""

    def __init__(self, heads: MedusaHeads, tree: TokenTree | None = None):
        count = heads.config.num_heads
        widths = [max(1, 4 - depth) for depth in range(min(count, 4))]
        self.tree = (TokenTree.from_widths(widths) if tree is None else tree).by_level()
        if not 1 <= self.tree.max_depth <= count:
            raise ValueError(f"{count} heads draft trees of depth 1 to {count}, got depth {self.tree.max_depth}")
        self.heads = heads.eval()
        self.traits = DrafterTraits(self.tree.size - 1, "tree", max_depth=count, captured=True, features=Features(),
                                    own_depth=self.tree.max_depth, tree=self.tree)  # fmt: skip

    def validate(self, target: ModelRunner) -> None:
        """Raise ValueError unless the heads are for a model of this shape; warn where it is another one."""
        check_base(self.heads.config, target.model)
        (device, dtype), ours = place_of(target.model), next(self.heads.parameters())
        for what, mine, theirs in (("device", ours.device, device), ("dtype", ours.dtype, dtype)):
            if mine != theirs:
                raise ValueError(
                    f"the {what} is {mine} for the heads and {theirs} for the target; heads.to(...) moves and casts"
                )
        if device != target.device:  # of a model on several
            raise ValueError(
                f"the target's output layer is on {device}, and hidden states come to {target.device}: heads "
                "need both on one device"
            )
        require_width(self.tree, target.vocab_size)

    def describe(self) -> str:
        """Whose heads these are and of which shape."""
        config = self.heads.config
        whose = config.base_model or "an unnamed model"
        made = f"{config.num_heads} Medusa heads of {config.num_layers} blocks, made for {whose}"
        scaled = "" if config.logit_scale == 1.0 else f", logits times {config.logit_scale}"
        return f"{made}; output layers: {config.output}{' with a bias' if config.bias else ''}{scaled}"

    def start(self, rows: Rows, max_tokens: int) -> StatelessSession:
        """Begin to draft."""
        heads = cast(MedusaHeads, rows.target.fused(self.heads))  # may move weights
        reads = tuple(parameter.data_ptr() for parameter in heads.parameters())
        return StatelessSession(partial(propose, heads, self.tree), reads)


def propose(heads: MedusaHeads, own: TokenTree, batch: Batch, tree: TokenTree | None = None) -> Draft:
    """The heads' best candidates on `tree` (None: `own`); nothing in the first round, before the target has run
    the prompt."""
    root, features = batch.last_tokens(), batch.features
    if features is None:
        return Draft(TokenTree.chain(0), root)
    tree = own if tree is None else tree.by_level()
    logits = heads(features, batch.rows.target.output_layer, tree.max_depth)  # [K, A, V]
    most = max(tree.ranks) + 1
    choices = best(logits)[..., None] if most == 1 else top(logits, most)[1]
    if tree.is_chain:
        return Draft(tree, torch.cat([root, choices[..., 0].t()], 1))
    head, choice = keep_alive(_choices(tree, root.device))
    return Draft(tree, torch.cat([root, choices.transpose(0, 1)[:, head, choice]], 1))  # of [A, K, choices]


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def _choices(tree: TokenTree, device: torch.device) -> tuple[Tensor, Tensor]:
    """The head of each node below the root and which of its choices, `[N - 1]` each."""
    heads = torch.tensor([depth - 1 for depth in tree.depths[1:]], device=device)
    return heads, torch.tensor(tree.ranks[1:], device=device)


class MedusaGenerator:
    """Decodes `target` with Medusa heads: a `SpeculativeGenerator`, whose `options` it takes, over a `MedusaDrafter`.

    Sampled output follows the target's distribution exactly; with `rule=Typical()`, Medusa's own, it does not. `tree`
    "auto" chooses among chains and parts of the drafter's default tree; `SpeculativeGenerator(target,
    MedusaDrafter(heads, calibrated), tree="auto")` among parts of a calibrated one."""

    def __init__(self, target, heads: MedusaHeads, tree: TokenTree | str | None = None, **options):
        if isinstance(tree, str):
            tree, options["tree"] = None, tree
        self._generator = SpeculativeGenerator(target, MedusaDrafter(heads, tree), **options)
        self.target = self._generator.target

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options) -> GenerationOutput:
        """See `SpeculativeGenerator.generate`; the same options."""
        return self._generator.generate(input_ids, attention_mask, **options)
