"""What the parts of a round cost on the device, for `scripts.bench_generate`: each is recorded and replayed by itself.

The parts are those of `specdec.rounds.round.Round`: draft, verify, accept, commit. On a GPU each becomes a CUDA
graph (see scripts/common/gpu_timing.py), whatever the mode of the generator, so its time holds no launch gaps; on a CPU
the wall clock times the same calls."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from attention.paged.device_batch import DeviceSequences
from scripts.common.gpu_timing import CALLS, time_eager, time_graph, time_on_cpu
from specdec import Batch, ModelRunner, Rows, RunnerOutput, SpeculativeGenerator, TokenTree, greedy
from specdec.acceptance import lossless
from specdec.cuda_graph import CapturedGraph
from specdec.drafters.base import prompt_reader
from specdec.model.prefill import extend
from specdec.planning.policy import DRAFTERS_OWN, PLAIN
from specdec.requests.request import build_request
from specdec.rounds.captured import CapturedRounds, take_all_pages
from specdec.rounds.round import Round
from specdec.trees.draft import Draft

PARTS = ("draft", "verify", "accept", "commit")


def clock(device: torch.device, mode: str = "graph") -> Callable[[Callable[[], None]], float]:
    """A function from a call to its median seconds: replays of a CUDA graph, launches of its kernels for `mode`
    "eager", or the wall clock.
    """
    timer = time_on_cpu if device.type == "cpu" else time_eager if mode == "eager" else time_graph
    return lambda call: timer(lambda _: call(), 2 if device.type == "cpu" else CALLS, 0.1)[0].seconds


class StandingRound:
    """A round over rows that stand still: the same state before every part, however often it runs. See `opened`."""

    def __init__(self, round: Round, rows: Rows, most_new: int):
        self._round, self._rows, self._most_new, self._batch = round, rows, most_new, Batch(rows, most_new=most_new)
        self._begin = rows.lengths.clone(), rows.alive.clone()
        self._faults: list = []

    def draft(self) -> Draft:
        """Propose."""
        self._batch = Batch(self._rows, most_new=self._most_new)
        draft = self._round.draft(self._batch)
        self._faults = self._batch.faults
        return draft

    def verify(self, draft: Draft) -> RunnerOutput:
        """Run the target over the draft."""
        return self._round.verify(self._batch, draft)

    def accept(self, draft: Draft, out: RunnerOutput):
        """Apply the acceptance rule."""
        self._batch.faults = list(self._faults)
        return self._round.accept(self._batch, draft, out)

    def commit(self, draft: Draft, verdict, emitted: Tensor) -> None:
        """Move what was accepted, append it to the text, and go back to where the round began (two small copies that no
        real round makes)."""
        self._round.commit(self._batch, draft, verdict, emitted)
        self._rows.lengths.copy_(self._begin[0])
        self._rows.alive.copy_(self._begin[1])

    def whole(self) -> Tensor:
        """All of it -> what the host would read."""
        draft = self.draft()
        verdict, emitted, packed, _ = self.accept(draft, self.verify(draft))
        self.commit(draft, verdict, emitted)
        return packed


@contextmanager
def opened(generator: SpeculativeGenerator, ids: Tensor, mask: Tensor, new_tokens: int,
           **sampling) -> Iterator[StandingRound]:  # fmt: skip
    """A round after the texts `ids`, `mask` `[B, S]`, with room for `new_tokens` more; all pages are given back.

    sampling: settings such as `temperature`, with which rounds sample exactly unless `do_sample` is False; none: rounds
        are greedy."""
    target, drafter = generator.target, generator.drafter
    options = dict(max_new_tokens=new_tokens, do_sample=bool(sampling)) | sampling
    request = build_request(target, ids, mask, None, None, None, 0, **options)
    features, room = None if drafter is None else drafter.traits.features, 1
    if drafter is not None:
        room += max(drafter.traits.max_tokens, drafter.traits.target_tokens)
    target.reserve([limit + room for limit in request.limits])
    rows = CapturedRounds(target).rows(request, len(ids), max(request.limits) + room)
    rows.begin(request)
    for row in rows.members:
        row.sequence = target.cache.add()
    live, session = [row.sequence for row in rows.members], None
    try:
        rows.feature_room = 1 if drafter is None else drafter.traits.feature_room
        session = None if drafter is None else drafter.start(rows, drafter.traits.max_tokens)
        batch = Batch(rows, rows.members)
        give = prompt_reader(session, rows)
        texts = [rows.tokens[row.slot, : row.length - 1] for row in rows.members]
        extend(target, live, texts, None if give is None else features, give)
        last = target.forward(live, batch.last_tokens()[:, 0], [1] * len(live), features=features)
        if features is not None:
            rows.keep_features(last.features[:, None], batch.index)
        if session is not None:  # what it drafts here is dropped: its own cache is to hold the texts
            session.propose(batch, None)
            session.commit(batch, [()] * len(ids))
        shortest, needed = min(row.length for row in rows.members), 1 if session is None else session.min_length(None)
        if shortest < needed:
            raise ValueError(f"captured rounds need texts of {needed} tokens, got {shortest}")
        take_all_pages(rows, room, session)
        shape = PLAIN if session is None else DRAFTERS_OWN
        rule = lossless if request.do_sample else greedy
        yield StandingRound(Round(rule, session, shape, features, room - 1), rows, needed)
    finally:
        if session is not None:
            session.release(rows.members)
        for sequence in live:
            target.cache.free(sequence)


@torch.inference_mode()
def take_apart(generator: SpeculativeGenerator, ids: Tensor, mask: Tensor, new_tokens: int) -> dict:
    """Device seconds of each of `PARTS` and of the `whole` round after the texts `ids`; on a GPU also what recording
    the round takes.

    `capture_seconds` and `capture_bytes` (all that the card has less of afterwards) are None on a CPU.
    """
    device = generator.target.device
    seconds = clock(device)
    with opened(generator, ids, mask, new_tokens) as one:
        one.whole()  # compiles what is not compiled yet
        draft = one.draft()
        out = one.verify(draft)
        verdict, emitted, _, _ = one.accept(draft, out)
        calls = (
            one.draft,
            lambda: one.verify(draft),
            lambda: one.accept(draft, out),
            lambda: one.commit(draft, verdict, emitted),
        )
        found = {name: seconds(lambda call=call: _drop(call())) for name, call in zip(PARTS, calls, strict=True)}
        if device.type == "cpu":
            return found | {
                "whole": seconds(lambda: _drop(one.whole())),
                "capture_seconds": None,
                "capture_bytes": None,
            }
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free, began = torch.cuda.mem_get_info()[0], time.perf_counter()
        recorded = CapturedGraph(one.whole, device)
        torch.cuda.synchronize()
        captured = {
            "capture_seconds": time.perf_counter() - began,
            "capture_bytes": free - torch.cuda.mem_get_info()[0],
        }
        # launches in a row, as in a run: the device always has the next round waiting
        return found | captured | {"whole": time_eager(lambda _: recorded(), CALLS)[0].seconds}


def _drop(_) -> None:
    """The clock overwrites what a call returns; the parts are still needed."""


@torch.inference_mode()
def forward_seconds(
    runner: ModelRunner, batch: int, context: int, shapes: dict[str, TokenTree], seconds: Callable
) -> dict[str, float]:
    """Seconds of a forward over the nodes of each tree of `shapes`, in `batch` rows that hold `context` tokens."""
    widest = max(tree.size for tree in shapes.values())
    capacity = 1 << (context + widest - 1).bit_length()
    runner.reserve([context + widest] * batch)
    live = [runner.cache.add() for _ in range(batch)]
    try:
        tokens = torch.randint(
            runner.vocab_size, (batch, context + widest), generator=torch.Generator().manual_seed(0)
        ).to(runner.device)
        runner.extend(live, list(tokens))
        rows = DeviceSequences(runner.cache, capacity, torch.ones(batch, dtype=torch.bool, device=runner.device))
        rows.load(live, [context] * batch)

        def call(tree: TokenTree) -> None:
            rows.lengths.fill_(context)
            runner.forward_rows(rows, tokens[:, : tree.size], tree)

        found = {}
        for name, tree in shapes.items():
            call(tree)
            found[name] = seconds(lambda tree=tree: call(tree))
        return found
    finally:
        for sequence in live:
            runner.cache.free(sequence)
