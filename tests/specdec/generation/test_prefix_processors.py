"""Processors that look at the text, at all nodes at once: what they give node by node on the host, with every drafter.

Tokens and statistics, greedy and sampled, in eager and in captured rounds."""

import pytest

import specdec
from specdec.sampling import prefix_processors
from tests.families import VOCAB, build, ragged_prompts
from tests.matrix import DRAFTERS, require_free, traits_of
from tests.specdec.rounds.test_captured import generators

IDS, MASK = ragged_prompts(4)
WIDTH = IDS.shape[1]
SAID = (
    specdec.AutoregressiveGenerator(build("llama")).generate(IDS, MASK, max_new_tokens=16).sequences[:, WIDTH:].tolist()
)
PENALISED = dict(repetition_penalty=1.1, no_repeat_ngram_size=2)
LENGTHS = dict(min_new_tokens=6, min_length=WIDTH + 3, eos_token_id=[SAID[0][4], SAID[1][9], SAID[2][7]])
WORDS = dict(
    bad_words_ids=[[SAID[0][1]], SAID[1][2:4], SAID[2][3:6], SAID[3][:2]],
    sequence_bias=[[[SAID[0][2]], -30.0], [SAID[1][1:3], 3.0], [[5, SAID[1][2]], 1.0]],
    suppress_tokens=[SAID[3][5]],
    begin_suppress_tokens=[SAID[2][0]],
    presence_penalty=0.2,
    frequency_penalty=0.3,
)
LAST = [token for token in range(VOCAB) if token not in IDS][:14]  # as many as a row may say, each once
ONCE = dict(
    eos_token_id=None, suppress_tokens=[token for token in range(VOCAB) if token not in LAST], no_repeat_ngram_size=1
)
KINDS_OF_DRAFT = ("none", "chain", "tree", "dynamic tree", "Medusa heads", "merged chains")  # one drafter for each
CASES = [
    pytest.param(
        name, PENALISED | LENGTHS | WORDS, True, marks=() if name in KINDS_OF_DRAFT else (pytest.mark.thorough,)
    )
    for name in ("none", *DRAFTERS)
]
CASES += [(name, PENALISED, False) for name in KINDS_OF_DRAFT]
CASES += [("tree", options, False) for options in (LENGTHS, WORDS, dict(no_repeat_ngram_size=1), PENALISED | WORDS)]
CASES += [(name, ONCE, True) for name in ("chain", "tree", "dynamic tree", "Medusa heads", "merged trees")]


def same(one, other, *more):
    assert one.sequences.equal(other.sequences)
    for mine, theirs in zip(one.stats.rows, other.stats.rows, strict=True):
        for name in ("proposed", "accepted", "emitted", "depths", "shapes", *more):
            assert getattr(mine, name) == getattr(theirs, name), name


@pytest.mark.covering(cases=8)
@pytest.mark.parametrize(("drafter", "options", "do_sample"), CASES)
def test_texts_are_those_of_the_host(drafter, options, do_sample, monkeypatch):
    """Rows end one after the other, so that the rest moves into fewer rows."""
    options = dict(max_new_tokens=14, seed=3, pad_token_id=1) | options
    options |= dict(do_sample=True, top_k=12, temperature=0.8) if do_sample else {}
    run = lambda generator: generator.generate(IDS, MASK, **options)
    host, captured = generators(drafter)
    eager, captured = run(host), run(captured)
    with monkeypatch.context() as patch:
        patch.setattr(prefix_processors, "KINDS", {})
        found = run(host)
    assert captured.stats.host is None or not traits_of(drafter).captured
    same(captured, eager, "ranks")
    same(eager, found)  # ranks past a row's limit differ: the host leaves scores there alone
    assert do_sample or [row[:14] for row in SAID] != found.sequences[:, WIDTH:].tolist()


@pytest.mark.parametrize("drafter", ["none", "tree", "Medusa heads"])
def test_a_row_for_which_no_token_is_left_is_named(drafter, monkeypatch):
    """A token more than there are: the texts are those of the host up to there, and so is the complaint."""
    said = []
    for known in (prefix_processors.KINDS, {}):
        monkeypatch.setattr(prefix_processors, "KINDS", known)
        for generator in generators(drafter):
            with pytest.raises(ValueError, match="left the target model no finite score in row") as raised:
                generator.generate(IDS, MASK, max_new_tokens=15, pad_token_id=1, **ONCE)
            said.append(str(raised.value))
            require_free(generator)
    assert len(set(said)) == 1
