"""The rows' sequences in a draft model's own cache."""

import warnings
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from attention.hf.prompt import Prompts, placeholders, why_text_alone
from specdec.drafters.base import DraftSession
from specdec.drafters.own_sequences import OwnSequences
from specdec.drafters.reach import any_within
from specdec.drafters.vocabulary import require_one_vocabulary, resized
from specdec.model.image_prompts import run_image_prompts
from specdec.model.runner import ModelRunner
from specdec.requests.batch import Batch
from specdec.requests.rows import Row, Rows
from specdec.trees.tensors import Tree, TreeMask


class ModelState:
    """A `DraftState` whose sequences hold a prefix of their row's accepted tokens and, in a round, drafted nodes.

    Its logits are over the target's vocabulary (see `vocabulary.resized`) and lie on the target's device, wherever the
    draft model runs. Texts longer than the draft model's positions
    must not be run (`reach.propose_within`); a call that may have some warns."""

    reader = None

    def __init__(self, runner: ModelRunner, rows: Rows, max_tokens: int):
        self.runner, self.draft_room, self._vocab_size = runner, max_tokens, rows.target.vocab_size
        own = OwnSequences(runner, lambda length: max_tokens + min(length, runner.max_positions or length))
        self._own, self._of, self.truncate = own, own.of, own.truncate
        self.pages_wanted, self.with_pages, self.release = own.pages_wanted, own.with_pages, own.release
        runner.match_mode(rows.target)
        runner.require_rollback(max_tokens + 1)
        self.admit(rows, rows.members)

    def admit(self, rows: Rows, joining: Sequence[Row]) -> None:
        """See `DraftSession.admit`."""
        runner, longest = self.runner, max((row.limit for row in joining), default=0)
        if runner.max_positions is not None and longest > runner.max_positions:
            warnings.warn(
                f"the draft model, a {type(runner.model).__name__}, drafts for texts of up to {runner.max_positions} "
                f"tokens only ({runner.limit}): rows that become longer go on in plain steps",
                stacklevel=4,
            )
        self._own.add(joining)

    def see_images(self, rows: Rows, prompts: Prompts) -> None:
        """Run the prompts of all members of `rows` with their images, if the draft model takes such; see `sees`."""
        longest = int((prompts.mask != 0).sum(1).max())
        if sees(self.runner, rows.target, prompts) and longest <= (self.runner.max_positions or longest):
            run_image_prompts(self.runner, self._of(rows.members), prompts)
            for row in rows.members:
                row.fixed = row.length - 1

    def catch_up(self, batch: Batch) -> Tensor:
        """See `DraftState.catch_up`."""
        if batch.captured:
            logits = run_anew(self, batch, batch.most_new)
        else:
            sequences = self._of(batch.members)
            logits = self.runner.extend(sequences, unseen(self.runner, batch, sequences))
        return resized(logits.to(batch.device), self._vocab_size)

    def see(self, rows: Rows, members: Sequence[Row]) -> None:
        """See `DraftState.see`; not of texts that are too long, with which captured rounds start anew."""
        short = [row for row in members if any_within([row], self.runner.max_positions)]
        if short:
            see(self.runner, Batch(rows, short), self._of(short))

    def run(self, batch: Batch, tokens: Tensor, tree: Tree = None, above: Tensor | None = None) -> Tensor:
        """See `DraftState.run`."""
        return resized(run_nodes(self, batch, self._of(batch.members), tokens, tree), self._vocab_size)

    def end_proposal(self, batch: Batch) -> None:
        """Do nothing: drafted nodes stay until `truncate`."""

    def prefix_sequence(self, row: Row) -> int | None:
        """See `DraftState.prefix_sequence`."""
        return self._of([row])[0]


def see_images(session: DraftSession | None, rows: Rows, prompts: Prompts) -> None:
    """Let the draft models of a session see images that they can see; others read token ids alone."""
    for state in session.states if session is not None else ():
        if isinstance(state, ModelState):
            state.see_images(rows, prompts)


def sees(draft: ModelRunner, target: ModelRunner, prompts: Prompts) -> bool:
    """Whether a draft model takes images as the target does: the same inputs and placeholders, from the processor."""
    same = draft.device == target.device and placeholders(draft.model.config) == placeholders(target.model.config)
    usual = why_text_alone(draft.adapter) is None and not draft.recurrent and draft.cache.sees is None
    raw = "mm_encoder_outputs" not in prompts.inputs  # else they have been through the target's tower
    return same and usual and raw and prompts.inputs.keys() <= draft.adapter.prompts.parameters.keys()


class TokenState(Protocol):
    """What `run_anew` and `run_nodes` use of a `DraftState` whose model reads tokens."""

    @property
    def runner(self) -> ModelRunner:
        """The draft model."""

    @property
    def draft_room(self) -> int:
        """See `DraftState.draft_room`."""


def unseen(runner: ModelRunner, batch: Batch, sequences: Sequence[int]) -> list[Tensor]:
    """The accepted tokens `[n]` of each row that its sequence lacks, on the device of `runner`."""
    tokens, cache = _in_range(runner, batch, batch.rows.tokens), runner.cache
    pairs = zip(batch.members, sequences, strict=True)
    return [tokens[row.slot, cache.length(sequence) : row.length].to(runner.device) for row, sequence in pairs]


def see(runner: ModelRunner, batch: Batch, sequences: Sequence[int]) -> None:
    """Run the accepted tokens of each row but the last one that its sequence lacks."""
    texts = [text[:-1] for text in unseen(runner, batch, sequences)]
    lacking = [(sequence, text) for sequence, text in zip(sequences, texts, strict=True) if len(text)]
    if lacking:
        runner.extend(*zip(*lacking, strict=True))


def run_anew(state: TokenState, batch: Batch, count: int) -> Tensor:
    """Run the last `count` accepted tokens of all rows in a captured round -> logits `[B, V]` after the last one.

    A row that is longer than the model's positions, whose draft is dropped, starts anew with these tokens: it may have
    no pages for its length, and what lies in those that it has may never have been written.
    """
    runner, lengths = state.runner, batch.rows.lengths
    if runner.max_positions is not None and runner.max_positions < batch.rows.tokens.shape[1]:
        lengths = torch.where(lengths <= runner.max_positions, lengths, count)
    memory = batch.rows.memory(runner, state.draft_room)
    memory.lengths.copy_(lengths - count)
    tokens = _in_range(runner, batch, batch.recent(count))
    return runner.forward_rows(memory, tokens, last_only=True).logits[:, 0]


def run_nodes(state: TokenState, batch: Batch, sequences: Sequence[int], tokens: Tensor,
              tree: Tree = None) -> Tensor:  # fmt: skip
    """See `DraftState.run`; `sequences` are the rows' own, which captured rounds ignore.

    Where the draft model runs on another device than the target, tokens and tree go there and logits come back."""
    tokens = _in_range(state.runner, batch, tokens)
    if batch.captured:
        memory = batch.rows.memory(state.runner, state.draft_room)
        return state.runner.forward_rows(memory, tokens, tree).logits
    count, device = tokens.shape[1], state.runner.device
    counts, tree = [count] * len(sequences), TreeMask.of(tree).to(device)
    out = state.runner.forward(sequences, tokens.flatten().to(device), counts, tree=tree)
    return out.logits.to(batch.device).unflatten(0, (-1, count))


def _in_range(runner: ModelRunner, batch: Batch, tokens: Tensor) -> Tensor:
    """`tokens`, with the draft model's last one for ids that only the target's longer table has."""
    longer = batch.rows.target.vocab_size > runner.vocab_size
    return tokens.clamp(max=runner.vocab_size - 1) if longer else tokens


def require_draft_model(draft: ModelRunner, target: ModelRunner) -> None:
    """Raise ValueError unless `draft` can draft for `target`, whose dtype, positions and device may be others."""
    require_ranks(draft, target)
    require_one_vocabulary(draft.vocab_size, target.vocab_size)


def require_ranks(draft: ModelRunner, target: ModelRunner) -> None:
    """Raise ValueError for a draft model that is split over other ranks than the target; each may hold all of it."""
    if draft.ranks.several and draft.ranks.processes != target.ranks.processes:
        raise ValueError(
            f"the draft model's weights are split over the processes {list(draft.ranks.processes)}, the target's over "
            f"{list(target.ranks.processes) or 'none'}: split the draft model as the target is, or not at all"
        )


def require_equal(what: str, draft: object, target: object) -> None:
    """Raise ValueError unless the draft model has the same `what` as the target."""
    if draft != target:
        raise ValueError(
            f"draft and target model must have the same {what}, got {draft} for the draft and {target} for the target"
        )
