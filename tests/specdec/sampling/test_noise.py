from functools import cache

import pytest
import torch
from scipy.stats import chisquare, kstest

from attention.dispatch import triton_available
from specdec.sampling.noise import RoundNoise, Stream, noise_of_rows, round_noise, row_key
from tests.attention.devices import DEVICE

CPU = torch.device("cpu")
WORD = 1 << 64
GOLDEN = 0x9E3779B97F4A7C15
ROWS, COUNT = 20_000, 10  # 200k draws


def noise(seed=0, rows=(0, 1, 2), rounds=None):
    return round_noise(seed, rows, [3] * len(rows) if rounds is None else rounds, CPU)


def splitmix64(state):
    """The output of SplitMix64 in `state` (Steele, Lea and Flood 2014), in Python integers."""
    z = state % WORD
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % WORD
    z = (z ^ z >> 27) * 0x94D049BB133111EB % WORD
    return z ^ z >> 31


def test_the_reference_gives_the_published_sequence():
    assert [splitmix64(1234567 + n * GOLDEN) for n in (1, 2, 3)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]
    assert splitmix64(GOLDEN) == 0xE220A8397B1DCDAF


@pytest.mark.parametrize("stream", Stream)
def test_numbers_equal_the_splitmix64_reference(stream):
    keys = [0, 1, -1, 1234567, 2**63 - 1, -(2**63)]
    counters = [(stream << 40) + index for index in range(1, 6)]
    expected = [
        [(splitmix64(splitmix64(key + counter * GOLDEN)) >> 11) / 2**53 for counter in counters] for key in keys
    ]
    assert RoundNoise(torch.tensor(keys)).uniform(stream, 5).tolist() == expected


def test_numbers_made_ahead_are_the_same():
    keys = torch.tensor([0, -5, 2**62])
    for stream in Stream:
        for ahead, count in ((4, 4), (4, 2), (4, 7), (1, 0)):
            assert RoundNoise(keys, ahead).uniform(stream, count).equal(RoundNoise(keys).uniform(stream, count))


@pytest.mark.skipif(not triton_available(torch.device(DEVICE)), reason="needs triton")
def test_the_kernel_makes_the_same_numbers():
    keys, rounds = torch.tensor([0, -5, 2**62, -(2**63)], device=DEVICE), torch.tensor([0, 3, 2**33, 7], device=DEVICE)
    ours, theirs = (noise_of_rows(keys, rounds, 6, impl) for impl in ("triton", "reference"))
    for stream in Stream:
        for count in (3, 6, 40):
            assert ours.uniform(stream, count).equal(theirs.uniform(stream, count))
    for count in (1, 5, 40):
        assert ours.along(count).equal(theirs.along(count))


@pytest.mark.parametrize("seed", [0, 7, -1, 2**64 - 1, 2**40])
def test_keys_hash_seed_then_row_then_round(seed):
    rows, rounds = [0, 3, 10**6], [0, 12, 2**33]
    keys = [
        splitmix64(splitmix64(splitmix64(seed) + GOLDEN * (row + 1)) + GOLDEN * (number + 1))
        for row, number in zip(rows, rounds, strict=True)
    ]
    signed = torch.tensor([key - WORD if key >= WORD // 2 else key for key in keys])
    assert torch.equal(noise(seed, rows, rounds).uniform(Stream.NEXT, 4), RoundNoise(signed).uniform(Stream.NEXT, 4))


@pytest.mark.parametrize("stream", Stream)
def test_a_row_draws_the_same_numbers_in_any_batch(stream):
    together = noise(5, [4, 9, 0], [1, 8, 2]).uniform(stream, 6)
    for place, (row, number) in enumerate([(4, 1), (9, 8), (0, 2)]):
        assert torch.equal(noise(5, [row], [number]).uniform(stream, 6)[0], together[place])
    assert torch.equal(noise(5, [0, 4], [2, 1]).uniform(stream, 6), together[[2, 0]])


def test_numbers_along_a_text_are_those_of_plain_steps_there():
    """Number i is the first of stream NEXT in a round whose text is i tokens longer; one key alone knows none."""
    rows, lengths = [4, 0, 7], [3, 11, 2**33]
    steps = [noise(5, rows, [n + i for n in lengths]).uniform(Stream.NEXT, 1) for i in range(6)]
    assert noise(5, rows, lengths).along(6).equal(torch.cat(steps, 1))
    with pytest.raises(ValueError, match="round_noise"):
        RoundNoise(torch.tensor([1])).along(2)


def test_asking_again_or_for_more_repeats_the_numbers():
    one = noise()
    first = one.uniform(Stream.DRAFT, 4)
    one.uniform(Stream.ACCEPT, 9)
    assert torch.equal(one.uniform(Stream.DRAFT, 4), first)
    assert torch.equal(one.uniform(Stream.DRAFT, 7)[:, :4], first)


def test_seeds_rows_rounds_streams_and_indices_all_give_other_numbers():
    values = torch.cat([
        noise(seed, [row], [number]).uniform(stream, 5).flatten()
        for seed in (0, 1, 2) for row in range(4) for number in range(4) for stream in Stream
    ])  # fmt: skip
    assert values.unique().numel() == values.numel() == 3 * 4 * 4 * 3 * 5


def test_rows_and_rounds_must_pair_up():
    with pytest.raises(ValueError):
        round_noise(0, [0, 1], [0], CPU)


@cache
def block(stream=Stream.DRAFT, seed=11, first_row=0, number=0):
    """200k numbers: `ROWS` rows in one round, `COUNT` each."""
    return noise(seed, range(first_row, first_row + ROWS), [number] * ROWS).uniform(stream, COUNT)


@pytest.mark.parametrize("stream", Stream)
def test_numbers_are_uniform_in_the_half_open_unit_interval(stream):
    values = block(stream)
    assert values.dtype == torch.float64 and values.shape == (ROWS, COUNT)
    assert values.min() >= 0 and values.max() < 1
    assert kstest(values.flatten().numpy(), "uniform").pvalue > 1e-4
    assert chisquare(torch.histc(values, 1000, 0, 1).numpy()).pvalue > 1e-4
    low_bits = (values * 2**53).long() % 256
    assert chisquare(torch.bincount(low_bits.flatten()).numpy()).pvalue > 1e-4


@cache
def rounds_of_one_row():
    """200k numbers of one row in 20000 consecutive rounds."""
    return noise(11, [0] * ROWS, range(ROWS)).uniform(Stream.DRAFT, COUNT)


PAIRS = {
    "draft and accept": lambda: (block(Stream.DRAFT), block(Stream.ACCEPT)),
    "draft and next": lambda: (block(Stream.DRAFT), block(Stream.NEXT)),
    "accept and next": lambda: (block(Stream.ACCEPT), block(Stream.NEXT)),
    "a round and the next, many rows": lambda: (block(), block(number=1)),
    "a round and the next, one row": lambda: (rounds_of_one_row()[:-1], rounds_of_one_row()[1:]),
    "neighbouring rows": lambda: (block(), block(first_row=1)),
    "neighbouring seeds": lambda: (block(), block(seed=12)),
    "neighbouring indices": lambda: (block()[:, :-1], block()[:, 1:]),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_numbers_are_independent_between(pair):
    one, other = (values.flatten() for values in PAIRS[pair]())
    correlation = torch.corrcoef(torch.stack([one, other]))[0, 1].abs()
    assert correlation < 4 / one.numel() ** 0.5
    joint = torch.bincount((one * 10).long() * 10 + (other * 10).long(), minlength=100)
    assert chisquare(joint.numpy()).pvalue > 1e-4


@pytest.mark.parametrize("seed", [0, 7, 2**63 + 5])
def test_rounds_that_no_host_counts_draw_the_same_numbers(seed):
    rows, rounds = [0, 1, 5, 1 << 20], [0, 3, 1, 1 << 33]
    keys = torch.tensor([row_key(seed, row) for row in rows])
    ahead = noise_of_rows(keys, torch.tensor(rounds), ahead=4)
    for stream in Stream:
        for count in (1, 4, 9):  # made ahead, and not
            assert torch.equal(
                ahead.uniform(stream, count),
                round_noise(seed, rows, rounds, torch.device("cpu")).uniform(stream, count),
            )
