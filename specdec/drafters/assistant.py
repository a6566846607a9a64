"""Gemma 4's assistant: a few layers without keys of their own, which read the target's last state and its pages.

A step reads [embedding of a token; state], the target's state before its last token, then what the step above gave. Its
layers attend to the keys and values that the target's last full and last sliding layer hold of the text; every step of
a draft is at the position of the last token. So it has no cache, and nothing to catch up with.

It is what transformers 5.24 (`SinglePositionMultiTokenCandidateGenerator`) runs, but for two things: a rejected token's
keys are never read, and tokens outside the chosen clusters are never drafted."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attention.hf.twin import SLOT, make_twin
from attention.kv.layout import KeyValueLayer, SharedLayer
from attention.paged.api import attend
from attention.paged.batch import AttentionBatch, build_batch
from specdec.drafters.base import DrafterTraits, StatelessSession
from specdec.drafters.model import ModelDraftSession
from specdec.drafters.model_state import require_equal, see
from specdec.loading import load_model
from specdec.model.features import Features
from specdec.model.runner import ModelRunner
from specdec.requests.batch import Batch
from specdec.requests.rows import Row, Rows
from specdec.trees.draft import Draft
from specdec.trees.tensors import Tree
from specdec.trees.tree import TokenTree, require_length, require_width, tree_to_draft

MODEL_TYPES = ("gemma4_assistant", "gemma4_unified_assistant")
NAME = "specdec_assistant"  # no mask function has this name, so that a model builds no mask
FULL, SLIDING = KINDS = ("full_attention", "sliding_attention")


class AssistantDrafter:
    """Drafts a chain of `num_tokens`, or `tree`, with `model`, a `Gemma4AssistantForCausalLM` of transformers.

    sample: whether to draw tokens, with sampling, from its own distribution, not the most likely ones. The host runs
    its rounds, and the first round of a text has no draft: the target's state comes with a round.

    Raises ValueError for another model or shape and, in `validate`, for a target of other sizes, vocabulary, device or
    dtype, or without both kinds of layers."""

    def __init__(self, model, num_tokens: int = 4, tree: TokenTree | None = None, sample: bool = True):
        if model.config.model_type not in MODEL_TYPES:
            raise ValueError(f"the assistant must be one of {', '.join(MODEL_TYPES)}, got {model.config.model_type}")
        require_length(num_tokens)
        self.model, self._sample, self._steps = model.eval(), sample, AssistantSteps(model)
        self.tree = tree_to_draft(num_tokens, tree)
        depth, longest = self.tree.max_depth, model.config.get_text_config().max_position_embeddings
        self.traits = DrafterTraits(self.tree.size - 1, "tree", own_depth=depth, features=Features(), tree=self.tree,
                                    max_length=longest)  # fmt: skip

    def validate(self, target: ModelRunner) -> None:
        """Raise ValueError, naming both values, unless the assistant can read the states and pages of `target`."""
        model, text = self.model, self.model.config.get_text_config()
        theirs = target.model.config.get_text_config()
        require_equal("hidden size (backbone_hidden_size)", model.config.backbone_hidden_size, theirs.hidden_size)
        require_equal("vocabulary size", text.vocab_size, target.vocab_size)
        require_equal("device", model.device, target.device)
        require_equal("dtype", model.dtype, target.dtype)
        if target.ranks.several:
            raise ValueError(f"no assistant reads pages that are split over {target.ranks.count} ranks yet")
        places = layers_read(target)
        for layer in model.model.layers:
            attention, kind = layer.self_attn, layer.self_attn.layer_type
            kept = target.adapter.layout.layers[places[kind]]
            if isinstance(kept, SharedLayer):
                kept = target.adapter.layout.layers[kept.owner]
            if not isinstance(kept, KeyValueLayer):
                raise ValueError(f"the target's last {kind} layer keeps a {type(kept).__name__}, not keys and values")
            require_equal(f"head dim of {kind} layers", attention.head_dim, kept.head_dim)
            if text.num_attention_heads % kept.num_kv_heads:
                raise ValueError(
                    f"{text.num_attention_heads} heads of the assistant do not share the {kept.num_kv_heads} kv heads "
                    f"of the target's {kind} layers"
                )
        require_width(self.tree, target.vocab_size)

    def start(self, rows: Rows, max_tokens: int) -> StatelessSession:
        """Begin to draft, from the target's pages."""
        reads = tuple(parameter.data_ptr() for parameter in self.model.parameters())
        drafting = ModelDraftSession(AssistantState(self._steps, rows.target), self.tree,
                                     self._sample and rows.do_sample, max_length=self.traits.max_length)  # fmt: skip
        return StatelessSession(partial(_propose, drafting), reads)

    def describe(self) -> str:
        """Which layers it reads, and how it chooses tokens."""
        config, count = self.model.config, len(self.model.model.layers)
        chosen = (
            f"tokens of the best {config.centroid_intermediate_top_k} of {config.num_centroids} clusters"
            if config.use_ordered_embeddings
            else "all tokens"
        )
        return (
            f"Gemma 4 assistant of {count} layers over the target's last full and last sliding layer, with windows one "
            f"token longer, as in transformers; its first state is the target's after the final norm; {chosen}"
        )


def make_assistant(target: ModelRunner, path: str | None, **options: Any) -> AssistantDrafter:
    """The assistant in a folder or on the hub, in the target's dtype and on its device."""
    if path is None:
        raise ValueError("a Gemma 4 assistant needs its folder or hub id: gemma4-assistant:path=DIR")
    return AssistantDrafter(load_model(path, target.dtype, target.device), **options)


def layers_read(target: ModelRunner) -> dict[str, int]:
    """The number of the target's last layer of each kind. Raises ValueError for a target that lacks one."""
    kinds = list(getattr(target.model.config.get_text_config(), "layer_types", None) or ())
    if missing := [kind for kind in KINDS if kind not in kinds]:
        raise ValueError(f"an assistant reads a {missing[0]} layer, which the {type(target.model).__name__} lacks")
    return {kind: max(number for number, one in enumerate(kinds) if one == kind) for kind in KINDS}


def _propose(drafting: ModelDraftSession, batch: Batch, tree: TokenTree | None = None) -> Draft:
    if batch.features is None:
        return Draft(TokenTree.chain(0), batch.last_tokens())
    return drafting.propose(batch, tree)


class AssistantSteps:
    """Steps of an assistant over pages of its target; its own configuration and modules stay as they are."""

    def __init__(self, model):
        from transformers import AttentionInterface  # takes seconds

        AttentionInterface.register(NAME, _attend)
        self.model, self._twin = model, make_twin(model.model)
        self._twin.attend_through(NAME)

    @torch.inference_mode()
    def __call__(self, embedded: Tensor, states: Tensor, positions: Tensor, batch: AttentionBatch,
                 layers: dict[str, int]) -> tuple[Tensor, Tensor]:  # fmt: skip
        """`embedded [T, h]`, `states [T, h]` at `positions [T]` -> logits `[T, V]`, states of the next step `[T, h]`.

        batch: of T queries, each of which sees all that a sequence of the target holds; h: width of the target."""
        model, slot = self.model, self._twin.slot
        nothing = embedded.new_empty(1, 1, 1, 1)  # in place of keys and values, which are in pages
        slot.batch = batch, layers
        try:
            hidden = self._twin.model(
                inputs_embeds=model.pre_projection(torch.cat([embedded, states], -1))[:, None],
                position_ids=positions[:, None], attention_mask=dict.fromkeys(KINDS), use_cache=False, return_dict=True,
                shared_kv_states=dict.fromkeys(KINDS, (nothing, nothing)),
            ).last_hidden_state[:, 0]  # fmt: skip
        finally:
            slot.batch = None
        return self._logits(hidden), model.post_projection(hidden)

    def _logits(self, hidden: Tensor) -> Tensor:
        """`hidden [T, h']` -> logits `[T, V]`, -inf for tokens of clusters that are not chosen."""
        model = self.model
        clusters = model.masked_embedding
        if clusters is None:
            return model.lm_head(hidden)
        chosen = clusters.centroids(hidden).topk(clusters.centroid_intermediate_top_k, -1).indices
        tokens = clusters.token_ordering.long().view(clusters.num_centroids, -1)[chosen].flatten(1)  # [T, k]
        found = torch.einsum("td,tkd->tk", hidden, model.lm_head.weight[tokens])
        return found.new_full((len(hidden), model.vocab_size), float("-inf")).scatter_(1, tokens, found)


class AssistantState:
    """A `DraftState` for `ModelDraftSession` alone, which holds the states of the nodes of a proposal and no memory."""

    reader = None
    draft_room = 0

    def __init__(self, steps: AssistantSteps, target: ModelRunner):
        self.runner, self._steps, self._layers = target, steps, layers_read(target)
        self._hidden: Tensor | None = None  # [A, n, h]: of the nodes of the last run

    def catch_up(self, batch: Batch) -> Tensor:
        """See `DraftState.catch_up`: the first step, from the target's state."""
        assert batch.features is not None
        see(self.runner, batch, [row.sequence for row in batch.members])
        return self._step(batch, batch.last_tokens(), batch.features[:, None])[:, 0]

    def run(self, batch: Batch, tokens: Tensor, tree: Tree = None, above: Tensor | None = None) -> Tensor:
        """See `DraftState.run`; a node sees the text, not the nodes above it, of which its state tells."""
        assert self._hidden is not None and above is not None
        above = above.expand(len(tokens), -1)
        return self._step(batch, tokens, self._hidden.gather(1, above[..., None].expand(-1, -1, self._hidden.shape[2])))

    def _step(self, batch: Batch, tokens: Tensor, states: Tensor) -> Tensor:
        """`tokens [A, n]`, `states [A, n, h]` -> logits `[A, n, V]`."""
        count, target = tokens.shape[1], self.runner
        sequences = [row.sequence for row in batch.members for _ in range(count)]
        places = torch.tensor([row.length - 1 for row in batch.members for _ in range(count)], device=tokens.device)
        over = build_batch(target.cache, sequences, [1] * len(sequences))  # as if the last cached token asked
        embedded = target.model.get_input_embeddings()(tokens.flatten())
        logits, hidden = self._steps(embedded, states.flatten(0, 1).to(embedded.dtype), places, over, self._layers)
        self._hidden = hidden.unflatten(0, tokens.shape)
        return logits.unflatten(0, tokens.shape)

    def end_proposal(self, batch: Batch) -> None:
        """Forget the nodes' states."""
        self._hidden = None

    def admit(self, rows: Rows, joining: Sequence[Row]) -> None:
        """Do nothing: nothing is kept for a row."""

    def see(self, rows: Rows, members: Sequence[Row]) -> None:
        """Do nothing."""

    def truncate(self, rows: Sequence[Row], lengths: Sequence[int]) -> None:
        """Do nothing."""

    def pages_wanted(self, row: Row) -> int:
        """None."""
        return 0

    def prefix_sequence(self, row: Row) -> int | None:
        """None."""
        return None

    def with_pages(self, rows: Sequence[Row], lengths: Sequence[int]) -> list[int]:
        """The target's sequences."""
        return [row.sequence for row in rows]

    def release(self, rows: Sequence[Row]) -> None:
        """Do nothing."""


def _attend(module, query: Tensor, key: Tensor, value: Tensor, attention_mask, scaling=None, dropout=0.0,
            sliding_window=None, **kwargs) -> tuple[Tensor, None]:  # fmt: skip
    """The attention function that transformers calls: `query [T, H, 1, D]` -> `([T, 1, H, D], None)`."""
    batch, layers = vars(module)[SLOT].batch
    paged, place = batch.at(layers[module.layer_type])
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = None if sliding_window is None else sliding_window + 1
    out = attend(query[:, :, 0], place.layer, paged, scale, paged.cache.narrowed(window), None, None)
    assert isinstance(out, Tensor)  # without return_lse
    return out[:, None], None
