"""The rows of a call: the text of each so far, where it ends and how it is sampled.

The state is in tensors at fixed addresses, which captured rounds read and write; `Row` is the host's copy of one row,
updated once a round.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attention.dispatch import resolve
from attention.gpu import to_device
from attention.paged.device_batch import DeviceSequences
from specdec.model.round_runner import RoundRunner
from specdec.model.runner import ModelRunner
from specdec.requests.kept import keep_accepted, shifted
from specdec.requests.request import Request
from specdec.sampling.noise import row_key


@dataclass(slots=True, eq=False)
class Row:
    """The host's copy of one row, equal to itself only.

    number: its row in the user's batch, from which its noise follows.
    slot: its place in the tensors of `Rows`.
    length: tokens so far.
    limit: the length at which it ends.
    sequence: its sequence in the target's cache; -1: none.
    ends: tokens that end it.
    criteria: stopping criteria, called after each token that is kept.
    padding [n]: what stood before its prompt in the user's batch; criteria see it.
    new_tokens: the last round's.
    ahead: tokens that rounds which are launched and not read yet may add at most.
    fixed: tokens at its begin that no draft model may run again: a prompt whose images they have seen.
    """

    number: int
    slot: int
    length: int
    limit: int
    sequence: int = -1
    ends: frozenset[int] = frozenset()
    criteria: tuple[Callable, ...] = ()
    padding: Tensor | None = None
    new_tokens: list[int] = field(default_factory=list)
    ended: bool = False
    ahead: int = 0
    fixed: int = 0

    @property
    def reach(self) -> int:
        """The most tokens that it may have once the rounds that are launched are read."""
        return min(self.length + self.ahead, self.limit)

    @property
    def can_run_again(self) -> int:
        """Tokens at its end that draft models may run again."""
        return self.length - self.fixed

    @property
    def length_before(self) -> int:
        """Its length before the last round."""
        return self.length - len(self.new_tokens)


class Rows:
    """`num_rows` slots for rows of up to `capacity` tokens.

    tokens [B, capacity] int64: prompt and accepted tokens, valid up to lengths
    lengths, limits [B] int64: tokens so far, the length at which a row ends
    keys [B] int64: a row's `row_key`, from which its noise follows
    alive [B] bool: rows that have not ended; slots without a row are not
    ends [B, K] int64: tokens that end a row, filled up with -1
    numbers [P, B] float64: sampling parameters, see `Processors.numbers`
    features [B, K, W]: of the last K = `feature_room` tokens that the target has run, once they are kept
    """

    def __init__(self, target: ModelRunner, num_rows: int, capacity: int, num_ends: int = 1, num_numbers: int = 0):
        make = lambda *shape, dtype=torch.int64: torch.ones(*shape, dtype=dtype, device=target.device)
        with torch.inference_mode(False):  # these tensors outlive the call
            self.tokens, self.lengths, self.limits = make(num_rows, capacity), make(num_rows), make(num_rows)
            self.keys, self.ends = make(num_rows), make(num_rows, num_ends)
            self.alive = make(num_rows, dtype=torch.bool)
            self.numbers = make(num_numbers, num_rows, dtype=torch.float64)
        self.target = target
        self.features: Tensor | None = None
        self.feature_room = 1
        self.members: list[Row] = []
        self._memories: dict[tuple[int, int], tuple[RoundRunner, DeviceSequences]] = {}

    @classmethod
    def of(cls, target: ModelRunner, request: Request, room: int = 1) -> "Rows":
        """Exactly the rows of `request`, with `room` for what the last round emits past a limit."""
        capacity, numbers = max(request.limits) + room, len(request.processors.numbers)
        rows = cls(target, len(request.prompts), capacity, max(1, len(request.eos)), numbers)
        rows.begin(request)
        return rows

    @property
    def size(self) -> int:
        """B."""
        return len(self.lengths)

    @property
    def active(self) -> list[Row]:
        """The rows that have not ended."""
        return [row for row in self.members if not row.ended]

    def clear(self, request: Request) -> None:
        """Empty all slots, for rows that are sampled as those of `request` are."""
        self.processors, self.do_sample, self.features_valid = request.processors, request.do_sample, False
        self.members = []
        self.alive.zero_()

    def begin(self, request: Request) -> None:
        """Put the rows of `request` into the first slots; the other slots are empty."""
        self.clear(request)
        count, padding = len(request.prompts), self.size - len(request.prompts)
        lengths, limits = [len(prompt) for prompt in request.prompts], request.limits
        spans = zip(lengths, limits, request.padding, strict=True)
        self.members = [
            Row(i, i, length, limit, -1, request.eos, request.criteria, front)
            for i, (length, limit, front) in enumerate(spans)
        ]
        texts = to_device(torch.cat(request.prompts), self.tokens.device)
        for row, prompt in enumerate(texts.split(lengths)):
            self.tokens[row, : len(prompt)] = prompt
        keys, ends = [row_key(request.seed, row) for row in range(count)], sorted(request.eos)
        columns = (lengths, 1), (limits, 1), (keys, 0), ([1] * count, 0)
        packed = to_device(torch.tensor([[*values, *[fill] * padding] for values, fill in columns]), self.tokens.device)
        for mine, given in zip((self.lengths, self.limits, self.keys, self.alive), packed, strict=True):
            mine.copy_(given)
        self.ends.copy_(to_device(torch.tensor([*ends, *[-1] * (self.ends.shape[1] - len(ends))]), self.ends.device))
        if len(self.numbers):
            numbers = torch.tensor(request.processors.numbers, dtype=torch.float64)
            self.numbers[:, :count] = to_device(numbers, self.numbers.device)

    def take_over(self, others: "Rows", rows: Sequence[Row]) -> None:
        """Put some rows of `others`, which may be `self`, into the first slots; the other slots are empty."""
        slots = self._slots_of(rows)
        count = len(rows)
        self.tokens[:count, : others.tokens.shape[1]] = others.tokens[slots]
        for name in ("lengths", "limits", "keys", "ends"):
            getattr(self, name)[:count] = getattr(others, name)[slots]
        self.numbers[:, :count] = others.numbers[:, slots]
        self.features_valid, self.feature_room = others.features_valid, others.feature_room
        if others.features is not None:
            self._room_for(others.features)[:count] = others.features[slots]
        alive = others.alive[slots]
        self.alive.zero_()
        self.alive[:count] = alive
        self.processors, self.do_sample = others.processors, others.do_sample
        self.members = list(rows)
        for slot, row in enumerate(rows):
            row.slot = slot

    def join(self, row: Row, tokens: Sequence[int], key: int, numbers: Sequence[float]) -> None:
        """Put a row with the text `tokens` into a free slot, where it takes no part in rounds until `wake`.

        key: its `row_key`; numbers: its column of `numbers`. Raises ValueError where there is no free slot, or the row,
        its end tokens or its numbers do not fit."""
        free = sorted(set(range(self.size)) - {member.slot for member in self.members})
        (num_ends, num_numbers), capacity = (self.ends.shape[1], len(self.numbers)), self.tokens.shape[1]
        if not free or row.limit > capacity or len(row.ends) > num_ends or len(numbers) != num_numbers:
            raise ValueError(
                f"{len(free)} free slots of {capacity} tokens, {num_ends} end tokens and {num_numbers} numbers cannot "
                f"take a row of up to {row.limit} tokens, {len(row.ends)} end tokens and {len(numbers)} numbers"
            )
        slot = row.slot = free[0]
        device, row.length = self.tokens.device, len(tokens)
        ends = [*sorted(row.ends), *[-1] * (num_ends - len(row.ends))]
        packed = to_device(torch.tensor([row.length, row.limit, key, 0, *ends, *tokens]), device)
        state = self.lengths, self.limits, self.keys, self.alive
        for mine, given in zip(state, packed[: len(state)], strict=True):
            mine[slot] = given
        self.ends[slot], self.tokens[slot, : len(tokens)] = packed[4 : 4 + num_ends], packed[4 + num_ends :]
        if num_numbers:
            self.numbers[:, slot] = to_device(torch.tensor(numbers, dtype=torch.float64), device)
        self.members.append(row)

    def wake(self, rows: Sequence[Row]) -> None:
        """Let rows that have joined take part in rounds."""
        if rows:
            self.alive.index_fill_(0, self._slots_of(rows), True)

    def leave(self, rows: Sequence[Row]) -> None:
        """Empty the slots of rows."""
        if rows:
            self.end(rows)
            self.members = [row for row in self.members if row not in rows]

    def end(self, rows: Sequence[Row]) -> None:
        """Mark rows as ended for a reason that only the host knows."""
        self.alive.index_fill_(0, self._slots_of(rows), False)

    def _slots_of(self, rows: Sequence[Row]) -> Tensor:
        return to_device(torch.tensor([row.slot for row in rows], dtype=torch.int64), self.tokens.device)

    def keep_features(self, features: Tensor, index: Tensor | None, counts: Tensor | None = None,
                      path: Tensor | None = None) -> None:  # fmt: skip
        """Keep `features [A, n, W]` of tokens that the target has run, the last ones of each row.

        index [A]: their slots (None: all; rows that have ended keep their old ones).
        counts [A], path [A, E]: they are of a draft's nodes, of which the root and the first `counts` of `path` stay.
        """
        of_all, self.features_valid = self._room_for(features), True
        if index is None and counts is not None and path is not None:
            keep_accepted(of_all, features, path, counts, self.alive)
            return
        mine = of_all if index is None else of_all[index]
        room = mine.shape[1]
        if counts is not None and path is not None:
            new = shifted(mine, features, path, counts)
        elif features.shape[1] >= room:
            new = features[:, -room:]
        else:
            new = torch.cat([mine, features], 1)[:, -room:]
        if index is None:
            of_all.copy_(torch.where(self.alive[:, None, None], new, of_all))
        else:
            of_all[index] = new

    def add_features(self, row: Row, features: Tensor) -> None:
        """Keep the last of `features [n, W]` of tokens of one row that the target has run outside its rounds."""
        of_row = self._room_for(features[None])[row.slot]
        of_row.copy_(torch.cat([of_row, features])[-self.feature_room :])

    def _room_for(self, features: Tensor) -> Tensor:
        if self.features is None:
            shape = self.size, self.feature_room, features.shape[2]
            with torch.inference_mode(False):
                self.features = torch.zeros(shape, dtype=features.dtype, device=features.device)
        return self.features

    def memory(self, runner: RoundRunner, more: int = 0) -> DeviceSequences:
        """The block tables, for captured rounds, of all slots in `runner`'s cache: of `capacity` + `more` tokens."""
        held = self._memories.get((id(runner), more))
        if held is None or held[1].cache is not runner.cache:
            sequences = DeviceSequences(runner.cache, self.tokens.shape[1] + more, self.alive)
            held = self._memories[id(runner), more] = (runner, sequences)
        return held[1]


def append(rows: Rows, emitted: Tensor, counts: Tensor, index: Tensor | None = None, impl: str | None = None) -> None:
    """Append the first `counts [A]` + 1 of `emitted [A, E + 1]` to the rows in the slots `index [A]` (None: all).

    A row ends with the first token that is one of its `ends`, or at its limit; from then on `alive` is False and the
    row does not change."""
    if index is not None:
        of_all = emitted.new_full((rows.size, emitted.shape[1]), 0)
        emitted = of_all.index_copy(0, index, emitted)
        counts = counts.new_full((rows.size,), -1).index_copy(0, index, counts)
    if resolve(impl, emitted.device) == "triton":
        from specdec.requests.append_kernel import launch_append

        run = launch_append
    else:
        run = append_reference
    run(rows.tokens, rows.lengths, rows.limits, rows.alive, emitted, counts, rows.ends)


def append_reference(tokens: Tensor, lengths: Tensor, limits: Tensor, alive: Tensor, emitted: Tensor, counts: Tensor,
                     ends: Tensor) -> None:  # fmt: skip
    """`append` in place on the tensors of `Rows`; rows with `counts` -1 take no part in the round."""
    width = emitted.shape[1]
    place = torch.arange(width, device=emitted.device)
    takes_part = alive & (counts >= 0)
    kept = torch.minimum(counts + 1, limits - lengths)
    first_end = torch.where((emitted[..., None] == ends[:, None]).any(-1), place, width).amin(1)
    ended = takes_part & (first_end < kept)
    kept = torch.where(ended, first_end + 1, kept) * takes_part
    columns = lengths[:, None] + place
    tokens.scatter_(1, columns, torch.where(place < kept[:, None], emitted, tokens.gather(1, columns)))
    lengths += kept
    alive &= ~ended & (lengths < limits)
