"""Rows stand beside each other without a word between them: each has its own limit, ends, seed and sampling numbers."""

import torch

import specdec
from specdec.acceptance import lossless
from specdec.planning.policy import PLAIN
from specdec.requests.batch import Batch
from specdec.requests.request import build_request
from specdec.requests.rows import Rows, append
from specdec.rounds.round import Round
from tests.families import build, ragged_prompts

IDS, MASK = ragged_prompts(3)


def rows_of(new_tokens=12, **options):
    """Rows of three ragged prompts over a model, with sequences in its cache."""
    target = specdec.ModelRunner(build("llama"))
    request = build_request(target, IDS, MASK, seed=7, max_new_tokens=new_tokens, **options)
    target.reserve([limit + 1 for limit in request.limits])
    rows = Rows.of(target, request)
    for row in rows.members:
        row.sequence = target.cache.add()
    return rows, request


def run(rows, rounds):
    """So many plain steps of the rows that are alive, and each row's new tokens."""
    step, starts = Round(lossless, None, PLAIN, None), [row.length for row in rows.members]
    for _ in range(rounds):
        if not rows.active:
            break
        step(Batch(rows, rows.active))
        for row in rows.active:
            row.new_tokens, row.length = [], int(rows.lengths[row.slot])
            row.ended = not bool(rows.alive[row.slot])
    pairs = zip(rows.members, starts, strict=True)
    return [rows.tokens[row.slot, start : row.length].tolist() for row, start in pairs]


@torch.inference_mode()
def test_each_row_is_sampled_with_its_own_numbers():
    temperatures, seed = (0.4, 1.0, 2.5), 7
    generator = specdec.AutoregressiveGenerator(build("llama"))
    rows, _ = rows_of(do_sample=True, temperature=0.9)
    rows.numbers.copy_(torch.tensor([temperatures]))
    texts = run(rows, 12)
    for row, temperature in enumerate(temperatures):
        out = generator.generate(IDS, MASK, max_new_tokens=12, do_sample=True, temperature=temperature, seed=seed)
        assert texts[row] == out.sequences[row, IDS.shape[1] :][: len(texts[row])].tolist()
    assert len({tuple(text) for text in texts}) == 3


@torch.inference_mode()
def test_each_row_ends_at_its_own_tokens_and_limit():
    whole, _ = rows_of(do_sample=True)
    texts = run(whole, 12)
    rows, _ = rows_of(do_sample=True)
    rows.ends[1], rows.limits[2] = texts[1][4], rows.limits[2] - 5
    rows.members[2].limit -= 5
    stop = texts[1].index(texts[1][4])
    assert run(rows, 12) == [texts[0], texts[1][: stop + 1], texts[2][:7]]


@torch.inference_mode()
def test_rows_that_are_moved_go_on_as_before():
    """Into others and among themselves; noise follows a row's number, not its place."""
    options = dict(do_sample=True, temperature=0.7)
    texts = run(rows_of(**options)[0], 12)
    rows, request = rows_of(**options)
    begun = run(rows, 5)
    other = Rows(rows.target, 4, rows.tokens.shape[1], rows.ends.shape[1], 1)
    other.take_over(rows, [rows.members[2], rows.members[0]])
    assert [row.slot for row in other.members] == [0, 1] and other.alive.tolist() == [True, True, False, False]
    other.take_over(other, [other.members[1]])
    assert run(other, 12) == [texts[0][5:]] and begun[0] == texts[0][:5] and request.limits[0] == other.members[0].limit


@torch.inference_mode()
def test_tokens_are_appended_to_the_rows_that_take_part():
    rows, _ = rows_of()
    before = rows.lengths.clone()
    emitted, counts = torch.tensor([[5, 6, 7], [8, 9, 10]]), torch.tensor([1, 0])
    append(rows, emitted, counts, torch.tensor([2, 0]))
    assert (rows.lengths - before).tolist() == [1, 0, 2]
    assert rows.tokens[2, before[2] : before[2] + 2].tolist() == [5, 6] and rows.tokens[0, before[0]] == 8


def test_captured_rounds_of_longer_drafts_have_more_room():
    rows, _ = rows_of()
    runner, capacity = rows.target, rows.tokens.shape[1]
    assert [rows.memory(runner, more).capacity for more in (0, 3, 0)] == [capacity, capacity + 3, capacity]
    assert rows.memory(runner, 3) is rows.memory(runner, 3)
