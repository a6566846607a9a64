"""Where the rows of a call stand: for the host, and for rounds that run without it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attention.dispatch import resolve
from attention.paged.device_batch import DeviceSequences
from specdec.acceptance import Acceptance
from specdec.model.runner import ModelRunner
from specdec.requests.request import Request
from specdec.sampling.draws import highest
from specdec.sampling.noise import RoundNoise, noise_of_rows, round_noise, row_key
from specdec.sampling.processors import Processors
from specdec.trees.draft import Draft


@dataclass(slots=True)
class DraftContext:
    """The state of one `generate` call, written by the loop and read by drafters. Row numbers are those of the user's
    batch.

    `tokens [B, capacity]` holds each row's prompt and accepted tokens; the first `lengths[row]` of them are valid, and
    `new_tokens[row]` are the last round's as a list; those of rounds that run without the host are in `tokens` only
    after the last of them. `limits[row]` is the length at which a row ends; `sequences[row]` its sequence in the
    target's cache.

    A drafter that sets `wants_hidden` when it starts finds, from a call's second round on, `hidden [B, H]`: what the
    target's output layer read at the node that each row's last token was drawn from."""

    target: ModelRunner
    tokens: Tensor
    lengths: list[int]
    limits: list[int]
    rounds: list[int]
    processors: Processors
    do_sample: bool
    seed: int
    sequences: dict[int, int]
    new_tokens: list[list[int]]
    faults: list[tuple[Tensor, str]] = field(default_factory=list)
    wants_hidden: bool = False
    hidden: Tensor | None = None

    @classmethod
    def of(cls, target: ModelRunner, request) -> "DraftContext":
        """The state in which a call with this `specdec.requests.request.Request` begins; no row has a sequence in the
        cache yet.
        """
        tokens = torch.zeros(len(request.prompts), max(request.limits), dtype=torch.int64, device=target.device)
        for row, prompt in enumerate(request.prompts):
            tokens[row, : len(prompt)] = prompt
        lengths = [len(prompt) for prompt in request.prompts]
        return cls(
            target,
            tokens,
            lengths,
            request.limits,
            [0] * len(lengths),
            request.processors,
            request.do_sample,
            request.seed,
            {},
            [[] for _ in lengths],
        )

    def noise(self, rows: Sequence[int]) -> RoundNoise:
        """The random numbers of the current round of `rows`."""
        return round_noise(self.seed, rows, [self.rounds[row] for row in rows], self.tokens.device)

    def lengths_before(self, rows: Sequence[int]) -> list[int]:
        """The length of each row before the last round."""
        return [self.lengths[row] - len(self.new_tokens[row]) for row in rows]

    def last_tokens(self, rows: Sequence[int]) -> Tensor:
        """`[A, 1]`: the last accepted token of each row."""
        where = torch.tensor([[row, self.lengths[row] - 1] for row in rows], dtype=torch.int64).to(
            self.tokens.device, non_blocking=True
        )
        return self.tokens[where[:, 0], where[:, 1]][:, None]

    def text(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """`[A, L]`: the tokens of each row, which begin with those that are valid, and `[A, 1]`: how many these are."""
        chosen = torch.tensor([[row, self.lengths[row]] for row in rows]).to(self.tokens.device, non_blocking=True)
        return self.tokens[chosen[:, 0], : max(self.lengths[row] for row in rows)], chosen[:, 1:]

    def keep_hidden(self, hidden: Tensor, rows: Sequence[int]) -> None:
        """Remember `hidden [A, H]` for the next round."""
        if self.hidden is None:
            self.hidden = hidden.new_zeros(len(self.lengths), hidden.shape[1])
        self.hidden[torch.tensor(rows).to(hidden.device, non_blocking=True)] = hidden

    def hidden_of(self, rows: Sequence[int]) -> Tensor | None:
        """`[A, H]`, or None in a call's first round."""
        return (
            None if self.hidden is None else self.hidden[torch.tensor(rows).to(self.hidden.device, non_blocking=True)]
        )

    def report_fault(self, about: Tensor, what: str) -> None:
        """Report, without waiting for the device, `about` which rows of this round are broken; the loop raises
        ValueError.

        Either which they are, `[A]` bool, or numbers `[A, n]` that break their row unless they are all finite.
        """
        self.faults.append((about, what))

    def process(
        self,
        logits: Tensor,
        rows: Sequence[int],
        path: Callable[[int, int], Tensor],
        whose: str,
        going: Tensor | None = None,
    ) -> Tensor:
        """Scores `[A, n, V]` of n nodes in each of `rows`: `logits` through the processors; `path(a, i) [d]` are the
        drafted tokens before.

        `going [A, n]` bool: nodes behind which a text can go on (None: all), see `Processors.may_follow`. Processors
        that look at the text never hear of the others, nor of what lies behind a row's limit: their scores are -inf. So
        is every score where the processors leave no token: nothing can be drafted there. Broken logits of `whose`
        model, and scores that are NaN or infinite, are complained about."""
        return process(self, logits, rows, path, whose, going)


def process(context: DraftContext, logits: Tensor, rows: Sequence[int], path: Callable[[int, int], Tensor], whose: str,
            going: Tensor | None = None) -> Tensor:  # fmt: skip
    """See `DraftContext.process`."""
    context.report_fault(highest(logits), f"the {whose} model produced NaN or infinite logits")
    nodes, processors, asked = logits.shape[1], context.processors, None
    if processors.need_prefix:
        room = [context.limits[row] - context.lengths[row] for row in rows]
        places = [(a, i) for a in range(len(rows)) for i in range(nodes)]
        asked = [len(path(a, i)) < room[a] for a, i in places]
        if going is not None:
            asked = [a and b for a, b in zip(asked, going.flatten().tolist(), strict=True)]

    def prefix(m):
        a, node = divmod(m, nodes)
        return torch.cat([context.tokens[rows[a], : context.lengths[rows[a]]], path(a, node)])[None]

    scores = processors(logits.flatten(0, 1), [row for row in rows for _ in range(nodes)], prefix, asked).unflatten(
        0, (len(rows), nodes)
    )
    if processors.change_scores:
        largest = highest(scores)  # -inf is no fault: nothing is drafted there
        about = torch.where(largest == float("-inf"), 0.0, largest)
        context.report_fault(
            about, f"the logits processors (or the temperature) left the {whose} model no finite score"
        )
    return scores


class DeviceContext:
    """Up to `num_rows` rows of one request, read by drafters as they read a `DraftContext`, written by `advance`.

    `tokens [B, capacity]`, and `lengths`, `limits`, `rounds`, `keys` `[B]` int64; `alive [B]` bool: rows that have not
    ended. `sequences` are the rows in the target's cache. Rows behind those that `load` took up are padding: they run
    along, and nothing of them is kept."""

    def __init__(
        self, target: ModelRunner, request: Request, num_rows: int, capacity: int, hidden_size: int | None = None
    ):
        whole = lambda *shape: torch.ones(*shape, dtype=torch.int64, device=target.device)
        with torch.inference_mode(False):  # they outlive the call that makes them
            self.tokens, self.lengths, self.limits = whole(num_rows, capacity), whole(num_rows), whole(num_rows)
            self.rounds, self.keys = whole(num_rows), whole(num_rows)
            self.alive = torch.zeros(num_rows, dtype=torch.bool, device=target.device)
            self.hidden = (
                None
                if hidden_size is None
                else torch.zeros(num_rows, hidden_size, dtype=target.dtype, device=target.device)
            )
            self._ends = torch.tensor(sorted(request.eos), dtype=torch.int64, device=target.device)
        self.target, self.processors, self.do_sample = target, request.processors, request.do_sample
        self.sequences = DeviceSequences(target.cache, capacity, self.alive)
        self.faults: list[tuple[Tensor, str]] = []
        self._noise: RoundNoise | None = None  # of this round

    @property
    def rows(self) -> range:
        """All B of them."""
        return range(len(self.lengths))

    def begin(self) -> None:
        """A round begins; what one that failed left behind is forgotten."""
        self._noise, self.faults = None, []

    def load(self, context: DraftContext, rows: Sequence[int]) -> None:
        """Take up `rows` as the host knows them."""
        count, padding, device = len(rows), len(self.lengths) - len(rows), self.tokens.device
        self.tokens[:count, : context.tokens.shape[1]] = context.tokens[
            torch.tensor(rows).to(device, non_blocking=True)
        ]
        lengths = [context.lengths[row] for row in rows]
        self.sequences.load([context.sequences[row] for row in rows], lengths)
        keys = [row_key(context.seed, row) for row in rows]
        parts = (
            (lengths, 1),
            ([context.limits[row] for row in rows], 1),
            ([context.rounds[row] for row in rows], 0),
            (keys, 0),
        )
        whole = torch.tensor([[*values, *[fill] * padding] for values, fill in parts]).to(device, non_blocking=True)
        for mine, given in zip((self.lengths, self.limits, self.rounds, self.keys), whole, strict=True):
            mine.copy_(given)
        if self.hidden is not None:
            self.hidden[:count] = context.hidden_of(rows)

    def unload(self, context: DraftContext, rows: Sequence[int]) -> None:
        """Hand back to the host what `load` took up."""
        width = context.tokens.shape[1]
        context.tokens[torch.tensor(rows).to(self.tokens.device, non_blocking=True)] = self.tokens[: len(rows), :width]
        if self.hidden is not None:
            context.keep_hidden(self.hidden[: len(rows)], rows)

    def noise(self, rows: Sequence[int]) -> RoundNoise:
        """The random numbers of the current round."""
        if self._noise is None:
            self._noise = noise_of_rows(self.keys, self.rounds)
        return self._noise

    def last_tokens(self, rows: Sequence[int]) -> Tensor:
        """`[B, 1]`: the last accepted token of each row."""
        return self.tokens.gather(1, self.lengths[:, None] - 1)

    def recent(self, count: int) -> Tensor:
        """`[B, count]`: the last accepted tokens of each row."""
        place = self.lengths[:, None] + torch.arange(-count, 0, device=self.tokens.device)
        return self.tokens.gather(1, place.clamp(min=0))

    def text(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """As `DraftContext.text`, up to the capacity."""
        return self.tokens, self.lengths[:, None]

    def keep_hidden(self, hidden: Tensor, rows: Sequence[int]) -> None:
        """Remember `hidden [B, H]` for the next round."""
        self.hidden.copy_(torch.where(self.alive[:, None], hidden, self.hidden))

    def hidden_of(self, rows: Sequence[int]) -> Tensor:
        """`[B, H]`."""
        return self.hidden

    def report_fault(self, about: Tensor, what: str) -> None:
        """As `DraftContext.report_fault`."""
        self.faults.append((about, what))

    def process(
        self,
        logits: Tensor,
        rows: Sequence[int],
        path: Callable[[int, int], Tensor],
        whose: str,
        going: Tensor | None = None,
    ) -> Tensor:
        """As `DraftContext.process`, for processors that do not look at the prefix."""
        return process(self, logits, rows, path, whose, going)

    def advance(self, draft: Draft, verdict: Acceptance, emitted: Tensor) -> None:
        """Commit what was accepted to the target's cache, and `emitted [B, E + 1]` to the text, cut at each row's limit
        and end-of-text tokens.
        """
        if not draft.tree.is_chain:
            self.sequences.commit(self.lengths - 1, verdict.path, verdict.counts)
        append(self.tokens, self.lengths, self.limits, self.rounds, self.alive, emitted, verdict.counts, self._ends)


def append(
    tokens: Tensor,
    lengths: Tensor,
    limits: Tensor,
    rounds: Tensor,
    alive: Tensor,
    emitted: Tensor,
    counts: Tensor,
    ends: Tensor,
    impl: str | None = None,
) -> None:
    """Add the first `counts [B]` + 1 of `emitted [B, E + 1]` to texts `tokens [B, capacity]` of `lengths [B]`, all in
    place.

    A text ends with the first token that is one of `ends [K]`, or at its limit in `limits [B]`, and is then not `alive
    [B]` bool. Texts that are not change no more; `rounds [B]` counts those of the others."""
    if resolve(impl, tokens.device) == "triton":
        from specdec.requests.append_kernel import launch_append

        return launch_append(tokens, lengths, limits, rounds, alive, emitted, counts, ends)
    width = emitted.shape[1]
    place = torch.arange(width, device=emitted.device)
    kept = torch.minimum(counts + 1, limits - lengths)
    first_end = torch.where((emitted[..., None] == ends).any(-1), place, width).amin(1)
    ended = first_end < kept
    kept = torch.where(ended, first_end + 1, kept) * alive
    columns = lengths[:, None] + place
    tokens.scatter_(1, columns, torch.where(place < kept[:, None], emitted, tokens.gather(1, columns)))
    lengths += kept
    rounds += alive
    alive &= ~ended & (lengths < limits)
