"""Suffix decoding: what is drafted equals counts by hand; what is remembered changes no text."""

import itertools
import threading
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import specdec
from specdec.drafters.paths import paths_of
from specdec.drafters.suffix_memory import memories_of
from tests.families import build, noisy_copy, ragged_prompts
from tests.matrix import DRAFTERS, speculative

TEXTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=14), min_size=1, max_size=3)
ANSWERS = st.lists(st.lists(st.integers(0, 2), max_size=9), max_size=6)


def matches_in(text, places, ending, deepest):
    """(tokens that match there, place) of `places` in `text`."""
    for place in places:
        n = 0
        while n < min(deepest, len(ending), place + 1) and text[place - n] == ending[-1 - n]:
            n += 1
        if n:
            yield n, place


def counted_by_hand(text, answers, deepest, factor, least, depth):
    """Node -> how many of the longest matches it follows, as (path down to it); and all nodes' number of matches."""
    found = [(n, text[place + 1 :]) for n, place in matches_in(text, range(len(text) - 1), text, deepest)]
    for answer in answers:
        found += [(n, answer[at + 1 :]) for n, at in matches_in(answer, range(len(answer) - 1), text, deepest)]
    longest = max((n for n, _ in found), default=0)
    rest = [tail[: min(depth, max(1, int(factor * longest)))] for n, tail in found if n == longest]
    counts = Counter(tuple(tail[: d + 1]) for tail in rest for d in range(len(tail)))
    return {path: n for path, n in counts.items() if n >= least * len(rest)}


def drafts_of(drafter, texts, vocab_size=99):
    """The paths that are drafted for each text; behind the end of a shorter one lie 7s."""
    longest = max(map(len, texts))
    padded = torch.tensor([text + [7] * (longest - len(text)) for text in texts])
    lengths = torch.tensor([[len(text)] for text in texts])
    rows = SimpleNamespace(target=SimpleNamespace(vocab_size=vocab_size))
    draft = drafter.propose(SimpleNamespace(size=len(texts), text=lambda: (padded, lengths), rows=rows))
    draft.tree.check()
    assert draft.tokens[:, 0].tolist() == [text[-1] for text in texts]
    for paths, depths, there in zip(*paths_of(draft), strict=True):
        pairs = zip(paths.tolist(), depths.tolist(), there.tolist(), strict=True)
        yield {tuple(path[:depth]) for path, depth, one in pairs if one}


@settings(max_examples=80, deadline=None, derandomize=True)
@given(TEXTS, ANSWERS, st.integers(1, 4), st.sampled_from([0.5, 1.0, 2.5]), st.sampled_from([0.0, 0.3, 0.6]))
def test_a_tree_holds_all_likely_continuations_of_the_longest_matches(texts, answers, deepest, factor, least):
    """Those of the text and of the memory count together where they match equally long."""
    memory = specdec.SuffixMemory(max_match=6)
    for answer in answers:
        memory.add(answer)
    drafter = specdec.SuffixDrafter(200, deepest, factor, least, tree=True, occurrences=99, memory=memory)
    for text, drafted in zip(texts, drafts_of(drafter, texts), strict=True):
        assert drafted == counted_by_hand(text, answers, deepest, factor, least, drafter.depth).keys()


@settings(max_examples=80, deadline=None, derandomize=True)
@given(TEXTS, ANSWERS, st.integers(1, 4), st.sampled_from([1.0, 2.5]), st.sampled_from([0.0, 0.3, 0.6]))
def test_a_chain_follows_the_most_frequent_token_at_each_depth(texts, answers, deepest, factor, least):
    memory = specdec.SuffixMemory(max_match=6)
    for answer in answers:
        memory.add(answer)
    drafter = specdec.SuffixDrafter(6, deepest, factor, least, occurrences=99, memory=memory)
    for text, drafted in zip(texts, drafts_of(drafter, texts), strict=True):
        counts = counted_by_hand(text, answers, deepest, factor, least, drafter.depth)
        by_depth = sorted(drafted, key=len)
        assert [len(path) for path in by_depth] == [*range(1, len(drafted) + 1)], "one node a depth"
        for path in by_depth:
            assert path[:-1] in {(), *by_depth}
            assert counts[path] == max(n for other, n in counts.items() if other[:-1] == path[:-1])
        end = by_depth[-1] if by_depth else ()
        assert len(end) == 6 or all(path[:-1] != end for path in counts), "nothing likely may be left out"


def test_a_budget_keeps_the_likeliest_nodes_and_occurrences_the_latest():
    text = [1, 5, 1, 6, 1, 6, 1, 7, 1, 7, 1]
    most = lambda **options: next(
        drafts_of(specdec.SuffixDrafter(tree=True, max_match=1, factor=1.0, **options), [text])
    )
    assert most(num_tokens=2) == {(6,), (7,)} and most(num_tokens=3) == {(5,), (6,), (7,)}
    assert most(occurrences=2) == {(7,)} and most(occurrences=3) == {(7,), (6,)}


def test_nothing_is_proposed_that_the_target_has_no_token_for():
    """A memory may have been fed by a target with more tokens."""
    memory = specdec.SuffixMemory()
    memory.add([1, 2, 3, 40, 5])
    drafter = specdec.SuffixDrafter(8, factor=9.0, memory=memory)
    assert [*drafts_of(drafter, [[1, 2]])] == [{(3,), (3, 40), (3, 40, 5)}]
    assert [*drafts_of(drafter, [[1, 2]], vocab_size=40)] == [{(3,)}]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.integers(0, 2), max_size=7), max_size=14), st.integers(1, 4), st.integers(3, 12))
def test_a_memory_stays_sorted_and_within_its_bounds(answers, max_answers, max_tokens):
    """After every answer: the places of the answers that it holds, in the order of the tokens before them."""
    memory = specdec.SuffixMemory(max_answers, max_tokens, max_match=3)
    for number, answer in enumerate(answers):
        memory.add(answer)
        stats, table = memory.stats, memory.table(torch.device("cpu"))
        assert stats.answers <= max_answers and stats.tokens <= max_tokens
        assert stats.added - stats.evicted == stats.answers
        held = [table.tokens[start : start + length].tolist() for start, length in memory._spans.values()]
        past = [one[-max_tokens:] for one in answers[: number + 1]]
        assert all(one in past for one in held) and (len(answer) < 2 or answer[-max_tokens:] == held[-1])
        places = sorted(start + i for start, length in memory._spans.values() for i in range(length - 1))
        order = table.order[: len(places)].tolist()
        assert sorted(order) == places and (table.order[len(places) :] == len(table.order) - 1).all()

        windows = [[int(table.tokens[max(place - back, 0)]) for back in range(3)] for place in order]
        # beyond the beginning of an answer lies another, whose tokens never count
        known = [window[: window.index(-1) + 1] if -1 in window else window for window in windows]
        assert all(a[: len(b)] <= b[: len(a)] for a, b in itertools.pairwise(known))


def test_what_goes_first_has_been_of_no_use_for_longest():
    memory = specdec.SuffixMemory(max_answers=3, max_match=2)
    for answer in ([1, 2, 3], [4, 5, 6], [7, 8, 9], [0, 1, 2, 0]):  # the last repeats two tokens of the first
        memory.add(answer)
    held = lambda: {
        tuple(memory.table(torch.device("cpu")).tokens[s : s + n].tolist()) for s, n in memory._spans.values()
    }
    assert held() == {(4, 5, 6), (7, 8, 9), (0, 1, 2, 0)}, "the first had gone before it could be of use"
    memory.add([3, 4, 5])
    memory.add([9, 4, 5])
    assert held() == {(0, 1, 2, 0), (3, 4, 5), (9, 4, 5)} and memory.stats.evicted == 3
    memory.add([7, 3, 4, 5])
    memory.add([2, 2])
    assert held() == {(3, 4, 5), (7, 3, 4, 5), (2, 2)}, "which the one before has used last"
    memory.clear()
    assert (
        memory.stats == specdec.SuffixMemory().stats
        and next(drafts_of(specdec.SuffixDrafter(memory=memory), [[2]])) == set()
    )


DETERMINISTIC = [
    "suffix",
    "suffix tree",
    "prompt lookup",
    "dynamic tree",
    "most likely tree",
    "Medusa heads",
    "merged trees",
]


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_seed_gives_the_text_of_plain_decoding_if_tokens_are_chosen(name):
    """Whatever is drafted, for rows that end at different times; of one drafter in captured rounds too."""
    model, prompts = build("llama"), ragged_prompts(4)
    options = dict(max_new_tokens=20, do_sample=True, temperature=0.7, top_p=0.9, seed=5, eos_token_id=[*range(3, 8)])
    wanted = specdec.AutoregressiveGenerator(model).generate(*prompts, **options).sequences
    for mode in ("eager", "graph") if name == "suffix tree" else ("eager",):
        generator = specdec.SpeculativeGenerator(model, DRAFTERS[name](model, noisy_copy("llama")), mode=mode)
        assert generator.generate(*prompts, **options).sequences.equal(wanted)


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_a_memory_changes_no_text_and_shortens_its_repetition(mode, do_sample):
    """The same call again: cold, then warm, then cold again, beside a generator without any memory."""
    model, memory, prompts = build("llama"), specdec.SuffixMemory(), ragged_prompts(3)
    generator = specdec.SpeculativeGenerator(model, specdec.SuffixDrafter(8, memory=memory), mode=mode)
    run = lambda one=generator: one.generate(*prompts, max_new_tokens=24, do_sample=do_sample, seed=3)
    alone = run(specdec.SpeculativeGenerator(model, specdec.SuffixDrafter(8), mode=mode))
    cold, warm = run(), run()
    assert memory.stats.added == 6 and memory.stats.tokens == 2 * int(alone.lengths.sum())
    memory.clear()
    again = run()
    assert all(out.sequences.equal(alone.sequences) for out in (cold, warm, again))
    assert [out.stats.remembered for out in (alone, cold, warm, again)] == [0, 0, 3, 0]
    assert again.stats.pooled.rounds == cold.stats.pooled.rounds == alone.stats.pooled.rounds
    assert warm.stats.pooled.tokens_per_round > 1.5 * cold.stats.pooled.tokens_per_round
    assert "remembered        3 answers" in str(warm.stats) and "remembered" not in str(cold.stats)
    assert warm.stats.as_dict()["remembered"] == 3


def test_an_engine_remembers_the_answers_that_ended():
    """Not of requests that were cancelled."""
    model, memory = build("llama"), specdec.SuffixMemory()
    ids, mask = ragged_prompts(4)
    prompts = [row[present.bool()] for row, present in zip(ids, mask, strict=True)]
    engine = specdec.Engine(model, specdec.SuffixDrafter(6, tree=True, memory=memory), tree=None)
    first = list(engine.run([{"prompt": prompt, "max_new_tokens": 20} for prompt in prompts]))
    assert memory.stats.added == 4 and memory.stats.tokens == sum(len(handle.tokens) for handle in first)
    gone = engine.submit(prompts[0], max_new_tokens=20)
    engine.step()
    engine.cancel(gone)
    assert memory.stats.added == 4
    for handle in first:
        again = engine.submit(handle.prompt, max_new_tokens=20)
        list(engine.run())
        assert again.tokens == handle.tokens and again.stats.rounds < handle.stats.rounds


def test_a_memory_is_found_in_merged_drafters_and_may_be_frozen():
    memory = specdec.SuffixMemory()
    merged = specdec.MergedDrafter(specdec.SuffixDrafter(memory=memory), specdec.PromptLookupDrafter(2, 1))
    assert [*memories_of(merged)] == [memory] and [*memories_of(None)] == []
    generator = specdec.SpeculativeGenerator(build("llama"), merged)
    generator.generate(*ragged_prompts(2), max_new_tokens=6)
    assert memory.stats.answers == 2
    memory.frozen = True
    generator.generate(*ragged_prompts(2), max_new_tokens=6)
    assert memory.stats.added == 2


def test_generators_in_threads_share_a_memory():
    memory, prompts = specdec.SuffixMemory(max_answers=5), ragged_prompts(3)
    generators = [
        specdec.SpeculativeGenerator(build("llama"), specdec.SuffixDrafter(5, memory=memory)) for _ in range(2)
    ]
    wanted, failed = speculative("chain").generate(*prompts, max_new_tokens=12).sequences, []

    def work(generator):
        for _ in range(5):
            if not generator.generate(*prompts, max_new_tokens=12).sequences.equal(wanted):
                failed.append(generator)

    threads = [threading.Thread(target=work, args=(generator,)) for generator in generators]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and memory.stats.added == 30 and memory.stats.answers == 5


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: specdec.SuffixDrafter(0), "0"),
        (lambda: specdec.SuffixDrafter(max_match=0), "max_match"),
        (lambda: specdec.SuffixDrafter(occurrences=-1), "-1"),
        (lambda: specdec.SuffixDrafter(factor=0), "factor"),
        (lambda: specdec.SuffixDrafter(min_probability=1.5), "1.5"),
        (lambda: specdec.SuffixDrafter(memory=specdec.SuffixMemory), "SuffixMemory"),
        (lambda: specdec.SuffixMemory(0), "max_answers"),
        (lambda: specdec.SuffixMemory(max_tokens=-3), "-3"),
    ],
)
def test_what_cannot_be_is_refused(make, named):
    with pytest.raises(ValueError, match=named):
        make()
