"""Positions that are ahead of, or after, the places of tokens (M-RoPE after images), in every kind of batch."""

import torch

from attention import PagedKVCache
from attention.paged.batch import StaticBatch, build_batch
from attention.paged.device_batch import DeviceSequences
from attention.recording import Recording
from tests.attention.devices import DEVICE

PARENTS = ((0, 1, 1), [[1], [3], [5]])  # depths and ancestor bits


def sequences_of(lengths, shifts):
    cache = PagedKVCache(num_layers=1, num_pages=32, page_size=4, num_kv_heads=1, head_dim=8, device=DEVICE)
    sequences = [cache.add() for _ in lengths]
    cache.append(sequences, lengths)
    cache.shifts |= {one: shift for one, shift in zip(sequences, shifts, strict=True) if shift}
    return cache, sequences


def test_batches_of_the_host_and_of_fixed_size():
    cache, sequences = sequences_of([9, 5, 12], [-3, 0, 40])
    batch = build_batch(cache, sequences, [2, 1, 3], [None, None, PARENTS])
    assert batch.positions.tolist() == [7, 8, 4, 9, 10, 10]
    assert batch.shifted_positions.tolist() == [4, 5, 4, 49, 50, 50]
    static = StaticBatch(cache, 4, num_tokens=8, num_pages=4)
    for some in (sequences, sequences[1:], sequences[:1]):
        static.load(some, [2] * len(some))
        expected = build_batch(cache, some, [2] * len(some)).shifted_positions
        assert static.batch.shifted_positions[: len(expected)].equal(expected)
    cache.shifts[sequences[0]] = -50  # of padding alone: no table of positions is read outside
    assert build_batch(cache, sequences[:1], [2]).shifted_positions.tolist() == [0, 0]
    assert build_batch(cache, sequences[1:2], [2]).shifts is None  # which costs nothing


def test_sequences_that_the_device_counts():
    """Tables follow rows that come and go, also between replays of a recording in which they were made."""
    cache, sequences = sequences_of([12, 12, 12], [-3, 0, 7])
    made, alive = [], torch.ones(2, dtype=torch.bool, device=DEVICE)

    def run():
        made[:] = made or [DeviceSequences(cache, 12, alive)]
        made[0].lengths.fill_(5)
        return made[0].append(2).shifted_positions

    recording = Recording(run) if DEVICE == "cpu" else None
    for some, expected in ((sequences[:2], [2, 3, 5, 6]), (sequences[1:], [5, 6, 12, 13]), (sequences[2:], [12, 13])):
        if recording is None:
            run()
        made[0].load(some, [5] * len(some))
        if recording is not None:
            recording.replay()
        assert (run() if recording is None else recording.result)[: len(expected)].tolist() == expected
    made[0].follow([0, 1], [sequences[0], sequences[2]])
    assert made[0].shifts.tolist() == [-3, 7]


def test_a_fork_has_its_shift_and_a_freed_sequence_none():
    cache, (first, *_) = sequences_of([9, 5], [-3, 0])
    twin = cache.fork(first)
    cache.free(first)
    assert cache.shifts == {twin: -3}
    cache.free(twin)
    assert cache.shifts == {}
