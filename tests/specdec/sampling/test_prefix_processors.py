"""Processors that look at the text, at all nodes of all rows at once, give the scores of transformers' own classes."""

import random

import pytest
import torch
from transformers.generation import logits_process as hf

from attention.dispatch import triton_available
from specdec.sampling import prefix_processors
from specdec.sampling.count_penalties import CountPenalties
from specdec.sampling.prefixes import Prefixes
from specdec.sampling.processors import Processors
from tests.attention.devices import DEVICE

SIZE = 7
WORDS = [[1], [2, 3], [3, 3], [0, 1, 2], [6, 5, 4, 3], [4, 4, 4, 4]]
BIASES = {(1,): 0.3, (2, 3): 0.7, (3,): -0.1, (3, 3): -2.5, (0, 1, 3): 0.1, (3, 2): 0.3, (4, 6, 1): 1e-3}
MAKES = {
    "repetition": lambda r: hf.RepetitionPenaltyLogitsProcessor(0.5 + r.random()),
    "repetition behind a prompt": lambda r: hf.RepetitionPenaltyLogitsProcessor(0.5 + r.random(), r.randrange(12)),
    "counts": lambda r: CountPenalties(r.random(), r.random(), r.randrange(7, 18)),
    **{f"{n}-grams": lambda r, n=n: hf.NoRepeatNGramLogitsProcessor(n) for n in (1, 2, 3, 4)},
    "bad words": lambda r: hf.NoBadWordsLogitsProcessor(WORDS, [0]),
    "sequence bias": lambda r: hf.SequenceBiasLogitsProcessor(BIASES),
    "token bias": lambda r: hf.SequenceBiasLogitsProcessor({(1,): 0.3}),
    "minimum length": lambda r: hf.MinLengthLogitsProcessor(r.randrange(14), [2, 5]),
    "minimum of new tokens": lambda r: hf.MinNewTokensLengthLogitsProcessor(r.randrange(9), r.randrange(5), [1]),
    "suppressed": lambda r: hf.SuppressTokensLogitsProcessor([1, 4]),
    "suppressed at the beginning": lambda r: hf.SuppressTokensAtBeginLogitsProcessor([1, 4], r.randrange(10)),
}
ROWS, CAPACITY, NODES = 3, 10, 5


def case(names, seed, padded, dtype=torch.float32):
    """Random texts with many repeats -> (processors, logits, prefixes)."""
    chance, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    draw = lambda low, high, *shape: torch.randint(low, high, shape, generator=generator)
    size, deepest = chance.choice([3, SIZE]), chance.randrange(5)
    tokens, lengths = draw(0, size, ROWS, CAPACITY), draw(1, CAPACITY + 1, ROWS)
    paths, depths = draw(0, size, ROWS, NODES, deepest), draw(0, deepest + 1, ROWS, NODES)
    padding = [torch.full((chance.randrange(7),), chance.randrange(SIZE)) for _ in range(ROWS)]
    lists = [[*(MAKES[name](chance) for name in names), hf.TemperatureLogitsWarper(0.7)] for _ in range(ROWS)]
    processors = Processors(lists, padding, [[*[padded] * len(names), False]] * ROWS, SIZE)
    logits = torch.randn(ROWS, NODES, SIZE, generator=generator).to(dtype)
    return processors, logits, Prefixes.of(tokens, lengths, paths, depths)


def by_reference(processors, logits, prefixes):
    """Every node by itself."""

    def text(m):
        row, node = divmod(m, NODES)
        own, path = prefixes.tokens[row, : prefixes.lengths[row]], prefixes.paths[row, node]
        return torch.cat([own, path[: prefixes.depths[row, node]]])[None]

    return processors(logits.flatten(0, 1), [row for row in range(ROWS) for _ in range(NODES)], text).view(logits.shape)


def at_once(processors, logits, prefixes):
    numbers = torch.tensor(processors.numbers, dtype=torch.float64).view(-1, ROWS)
    scores = processors.lead(logits, numbers, prefixes).flatten(0, 1)
    spread = numbers[: processors.warper_numbers, :, None].expand(-1, -1, NODES).flatten(1)
    return processors.warp(scores, spread).view(logits.shape)


@pytest.mark.covering
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", MAKES)
def test_scores_are_those_of_transformers(name, padded):
    changed = 0
    for seed in range(60):
        for dtype in (torch.float32, torch.float64, torch.bfloat16)[: 1 if seed % 5 else 3]:
            given = case([name], seed, padded, dtype)
            processors, logits, _ = given
            before = logits.clone()
            assert len(processors.leading) == 1 and not processors.node_by_node and processors.need_host == []
            scores, expected = at_once(*given), by_reference(*given)
            assert scores.dtype == expected.dtype and scores.equal(expected) and logits.equal(before)
            changed += not scores.equal(logits / 0.7)
    assert changed > 10


def test_several_follow_each_other_in_the_order_of_the_list():
    for seed in range(60):
        names = random.Random(seed).sample([*MAKES], 4)
        given = case(names, seed, bool(seed % 2))
        assert len(given[0].leading) == 4 and at_once(*given).equal(by_reference(*given))


@pytest.mark.skipif(not triton_available(torch.device(DEVICE)), reason="needs triton")
@pytest.mark.parametrize("name", ["repetition", "repetition behind a prompt", "1-grams", "3-grams"])
def test_the_kernels_do_the_same(name, monkeypatch):
    """On a GPU or in Triton's interpreter; texts of more than one block, paths that end earlier, padding."""
    from specdec.sampling import prefix_kernel

    monkeypatch.setattr(prefix_kernel, "BLOCK", 4)
    for seed in range(4):
        dtype = (torch.float32, torch.bfloat16)[seed // 2]
        processors, logits, prefixes = case([name], seed, bool(seed % 2), dtype)
        (one,), numbers = processors.leading, torch.tensor(processors.numbers, dtype=torch.float64).view(-1, ROWS)
        own, front = numbers[processors.warper_numbers :].to(DEVICE).split([one.count, one.front])
        of_text = prefixes.tokens, prefixes.lengths, prefixes.paths, prefixes.depths
        seen = Prefixes(*(x.to(DEVICE) for x in of_text)).behind(front.long())
        logits, found = logits.to(DEVICE), []
        for impl, before in (("reference", None), ("triton", logits), ("triton", None)):
            found.append(logits.float().clone())
            prefix_processors.KINDS[one.kind].apply(one, found[-1], own, seen, before, impl=impl)
        assert found[1].equal(found[0]) and found[2].equal(found[0])


def test_requests_with_the_same_kinds_share_a_captured_round():
    kinds = lambda *lists: Processors(lists).kinds()
    strict, mild = (
        [hf.RepetitionPenaltyLogitsProcessor(x), hf.MinLengthLogitsProcessor(int(9 * x), 2)] for x in (2.0, 1.1)
    )
    assert kinds(strict) == kinds(mild) == kinds(strict, mild) and kinds(strict) != kinds(strict[::-1])
    ngrams, words = hf.NoRepeatNGramLogitsProcessor, hf.NoBadWordsLogitsProcessor
    assert kinds([ngrams(2)]) != kinds([ngrams(3)]) and kinds([words([[5, 6]])]) == kinds([words([[3, 4]])])
    assert kinds([words([[5, 6]])]) != kinds([words([[3, 4], [5]])])


def test_what_is_not_known_or_out_of_place_is_left_to_the_host():
    class Mine(hf.NoRepeatNGramLogitsProcessor):
        pass

    warm, penalty, odd = hf.TemperatureLogitsWarper(0.5), hf.RepetitionPenaltyLogitsProcessor(1.5), Mine(2)
    of_host = {
        "a subclass": ([[odd, warm]], ["Mine"]),
        "behind known ones": ([[penalty, odd, warm]], ["Mine"]),
        "the order": ([[warm, penalty]], ["RepetitionPenaltyLogitsProcessor"]),
        "rows differ": ([[penalty], []], ["RepetitionPenaltyLogitsProcessor"]),
        "a token too many": ([[hf.NoBadWordsLogitsProcessor([[SIZE]])]], ["NoBadWordsLogitsProcessor"]),
    }
    for name, (lists, named) in of_host.items():
        processors = Processors(lists, vocab_size=SIZE)
        assert processors.node_by_node and processors.leading == () and processors.need_host == named, name
    many = hf.SequenceBiasLogitsProcessor({(i, 0): 0.1 for i in range(9)})
    assert Processors([[many]]).node_by_node
    assert not Processors([[hf.NoBadWordsLogitsProcessor([[i, 0] for i in range(9)])]]).node_by_node
    odd_padding = [torch.tensor([1, 2, 1, 2])]
    assert Processors([[hf.NoRepeatNGramLogitsProcessor(2)]], odd_padding, [[True]]).node_by_node
    assert not Processors([[hf.NoRepeatNGramLogitsProcessor(2)]], odd_padding, [[False]]).node_by_node


def test_a_slot_without_a_row_may_hold_any_numbers():
    """Those of another request, whose tokens and biases lay elsewhere."""
    for name in MAKES:
        processors, logits, prefixes = case([name], 1, True)
        for number in (float("inf"), -float("inf"), 1e18, -7.0):
            numbers = torch.full((len(processors.numbers), ROWS), number, dtype=torch.float64)
            assert processors.lead(logits, numbers, prefixes).shape == logits.shape


def test_no_kind_of_transformers_is_known_twice():
    from specdec.sampling import warpers

    assert not prefix_processors.KINDS.keys() & warpers.KINDS.keys()
