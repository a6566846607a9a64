"""Random numbers as a pure function of (seed, row, length, stream, index), without any hidden state.

A round is known by the length of the row's text before it. A row draws the same numbers whatever batch it runs in and
whatever the other rows do, and draft noise and acceptance noise are separate streams. Where drafts are chosen
deterministically, the number that draws a token follows from its place in the text alone (`RoundNoise.along`): drafts,
on which something that outlives the call may have an effect, change no text. The generator is SplitMix64's finaliser on
a counter (Steele, Lea and Flood 2014), computed in int64 on the device."""

from collections.abc import Callable, Sequence
from enum import IntEnum

import torch
from torch import Tensor

from attention.dispatch import resolve

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
MIX_1, MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


class Stream(IntEnum):
    """Independent uses of randomness within one round."""

    DRAFT = 1
    ACCEPT = 2
    NEXT = 3


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _mix_int(z: int) -> int:
    z = (z ^ z >> 30) * MIX_1 & MASK
    z = (z ^ z >> 27) * MIX_2 & MASK
    return z ^ z >> 31


def _mix(z: Tensor) -> Tensor:
    # `>>` on int64 copies the sign bit down; the masks make it a logical shift
    z = (z ^ (z >> 30 & (1 << 34) - 1)) * _signed(MIX_1)
    z = (z ^ (z >> 27 & (1 << 37) - 1)) * _signed(MIX_2)
    return z ^ (z >> 31 & (1 << 33) - 1)


class RoundNoise:
    """The random numbers of one round: `keys [A]`, one per row.

    The first `ahead` numbers of all streams are computed together, in fewer operations. `make(count)`, if given, makes
    those of all streams, and then `along`, `[A, streams + 1, count]`. `keys_along(count)` are the keys `[A, count]` of
    rounds at this length and the next ones."""

    def __init__(self, keys: Tensor, ahead: int = 0, make: Callable[[int], Tensor] | None = None,
                 keys_along: Callable[[int], Tensor] | None = None):  # fmt: skip
        self._keys, self._ahead, self._make, self._keys_along = keys, ahead, make, keys_along
        self._made: Tensor | None = None

    def uniform(self, stream: Stream, count: int) -> Tensor:
        """`[A, count]` float64 in [0, 1), the same at every call with the same stream."""
        if self._make is not None:
            return self._launched(int(stream) - 1, count)
        counters = torch.arange(1, max(count, self._ahead) + 1, device=self._keys.device)
        if count > self._ahead:
            return self._numbers(counters + (int(stream) << 40))
        if self._made is None:
            first = torch.arange(len(Stream), device=counters.device) + 1 << 40
            self._made = self._numbers((counters + first[:, None]).flatten()).unflatten(1, (len(Stream), -1))
        return self._made[:, int(stream) - 1, :count]

    def along(self, count: int) -> Tensor:
        """`[A, count]` float64 in [0, 1): the first number of `Stream.NEXT` in rounds at this length and the next ones.

        Raises ValueError where these are not known."""
        if self._make is not None:
            return self._launched(len(Stream), count)
        if self._keys_along is None:
            raise ValueError("the noise of one round knows no numbers of others: use round_noise or noise_of_rows")
        return _to_uniform(self._keys_along(count) + _signed(((int(Stream.NEXT) << 40) + 1) * GOLDEN & MASK))

    def _launched(self, place: int, count: int) -> Tensor:
        if self._made is None or self._made.shape[2] < count:
            assert self._make is not None
            self._made = self._make(max(count, self._ahead))
        return self._made[:, place, :count]

    def _numbers(self, counters: Tensor) -> Tensor:
        return _to_uniform(self._keys[:, None] + counters * _signed(GOLDEN))


def _to_uniform(z: Tensor) -> Tensor:
    z = _mix(_mix(z))
    return (z >> 11 & (1 << 53) - 1).double() * 2.0**-53


def row_key(seed: int, row: int) -> int:
    """The part of the key, an int64, that all rounds of a row share."""
    return _signed(_mix_int(_mix_int(seed & MASK) + GOLDEN * (row + 1) & MASK))


def noise_of_rows(keys: Tensor, lengths: Tensor, ahead: int = 64, impl: str | None = None) -> RoundNoise:
    """`round_noise` on the device, for `row_key`s `keys [A]` and texts of `lengths [A]`.

    >>> a = noise_of_rows(torch.tensor([row_key(0, 1)]), torch.tensor([2])).uniform(Stream.NEXT, 3)
    >>> bool((a == round_noise(0, [1], [2], torch.device("cpu")).uniform(Stream.NEXT, 3)).all())
    True
    """
    if resolve(impl, keys.device) == "triton":
        from specdec.sampling.noise_kernel import launch_noise

        return RoundNoise(keys, ahead, lambda count: launch_noise(keys, lengths, len(Stream), count))
    return _of_keys(keys, lengths, ahead)


def round_noise(seed: int, rows: Sequence[int], lengths: Sequence[int], device: torch.device) -> RoundNoise:
    """The noise of `rows`, row i in the round after a text of `lengths[i]` tokens.

    >>> a = round_noise(0, [0, 1], [5, 2], torch.device("cpu")).uniform(Stream.DRAFT, 3)
    >>> b = round_noise(0, [1], [2], torch.device("cpu")).uniform(Stream.DRAFT, 3)
    >>> bool((a[1] == b[0]).all())
    True
    """
    pairs = torch.tensor([(row_key(seed, row), n) for row, n in zip(rows, lengths, strict=True)], dtype=torch.int64)
    keys, places = pairs.view(-1, 2).to(device, non_blocking=True).unbind(1)
    return _of_keys(keys, places)


def _of_keys(keys: Tensor, lengths: Tensor, ahead: int = 0) -> RoundNoise:
    key_at = lambda place: _mix(keys[:, None] + place * _signed(GOLDEN))  # of a round
    first = (lengths + 1)[:, None]
    along = lambda count, first=first: key_at(first + torch.arange(count, device=keys.device))
    return RoundNoise(key_at(first)[:, 0], ahead, keys_along=along)
