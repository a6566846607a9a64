"""Jobs, cold starts, and rows of calls: what is decoded and how it is counted."""

from functools import partial

import pytest
import torch

import specdec
from specdec.evaluation.measure import Bench, jobs_of, run_all, run_job
from specdec.evaluation.methods import OURS, PLAIN, Decoded, Method, ours, ours_in_engine, theirs, timed
from specdec.evaluation.questions import Question
from specdec.evaluation.runs import calls, record_of, run_of
from specdec.evaluation.sampling import settings_for
from specdec.evaluation.summary import speedup, summarise, table_of, tokens_per_round
from specdec.evaluation.texts import Texts
from specdec.planning.adaptive import CostModel
from tests.families import build, noisy_copy

LONG = "return value + value\n" * 4


class Letters:
    """A tokenizer of few tokens, for small models."""

    chat_template = None

    def __call__(self, text, **_):
        ids = torch.tensor([[ord(letter) % 90 for letter in text]])
        return type("Encoded", (), {"input_ids": ids})

    def decode(self, tokens, **_):
        return "".join(chr(97 + token % 26) for token in tokens)


@pytest.fixture(scope="module")
def model():
    made = build("llama")
    made.generation_config.eos_token_id = None
    return made


def bench_of(model, methods, count=6):
    return Bench(methods, Texts(Letters(), plain=True), partial(settings_for, model), count)


QUESTIONS = [
    Question("a", 0, ("abc",)),
    Question("a", 1, ("abcdef",)),
    Question("a", 2, ("fed",)),
    Question("b", 0, (({"role": "user", "content": "x"},), ({"role": "user", "content": "y"},))),
]


def test_batches_turns_and_repeats_are_paired_by_call(model):
    drafter = specdec.ModelDrafter(noisy_copy("llama"), 2)
    plain = specdec.AutoregressiveGenerator(model, mode="eager")
    methods = {
        OURS: ours(plain), PLAIN: theirs(model),
        "draft": ours(specdec.SpeculativeGenerator(plain.target, drafter)),
        "assisted": theirs(model, assistant_model=noisy_copy("llama")),
    }  # fmt: skip
    jobs = jobs_of(QUESTIONS, [0.0], repeats=2, batches=(1, 2))
    assert len(jobs) == 2 * (4 + 3) and len({job.key for job in jobs}) == len(jobs)
    assert [q.number for q in jobs[5].questions] == [2, 0], "a batch is filled with prompts of its kind"
    runs = run_all(bench_of(model, methods), jobs)
    of = lambda name, batch: [r for r in runs if (r.method, r.batch) == (name, batch)]
    assert len(of("draft", 1)) == 2 * (3 + 2) and len(of("draft", 2)) == 2 * (4 + 4)
    assert not of("assisted", 2) and len(of("assisted", 1)) == len(of("draft", 1)), "they decode one prompt"
    assert {len(calls(of(name, 2))) for name in (OURS, PLAIN, "draft")} == {2 * (2 + 2)}
    assert {r.turn for r in runs if r.kind == "b"} == {0, 1}
    kept = [r for r in runs if r.pieces]
    assert {(r.kind, r.prompt, r.repeat, r.turn) for r in kept} == {("a", 0, 0, 0), ("b", 0, 0, 0)}
    assert {r.method for r in kept} == {OURS, "draft"} and len(kept) == 2 * 2 * 2, "methods, kinds, batch sizes"
    assert all("".join(map("".join, r.pieces)) == Letters().decode(r.tokens) for r in kept)
    rows = summarise(runs)
    assert all(row["identical"] for row in rows)
    (row,) = [r for r in rows if (r["name"], r["kind"], r["batch"]) == ("draft", "all", 1)]
    assert row["tokens_per_round"] > 1 and row["prompts"] == 4 and row["calls"] == 10
    assert row["speedup_interval"][0] <= row["speedup"] <= row["speedup_interval"][1]
    assert "assisted" in table_of(rows) and "reused" not in table_of(rows)
    again = [run_of(record_of(run)) for run in runs]
    written = [dict(row) for row in summarise(again)]
    assert [row["tokens_per_round_interval"] for row in written] == [row["tokens_per_round_interval"] for row in rows]
    assert [row["identical"] for row in written] == [row["identical"] for row in rows]


def test_calls_of_a_drafter_with_a_memory_start_cold_or_say_what_they_reuse(model):
    memory = specdec.SuffixMemory()
    generator = specdec.SpeculativeGenerator(model, specdec.SuffixDrafter(4, memory=memory), mode="eager")
    plain = ours(specdec.AutoregressiveGenerator(generator.target))
    found = {}
    for warm in (False, True):
        memory.clear()
        bench = bench_of(model, {OURS: plain, "suffix": ours(generator, warm)}, 24)
        runs = [run for job in jobs_of(QUESTIONS[:1], [0.0], repeats=3) for run in run_job(bench, job)]
        found[warm] = [(r.reused, r.rounds.proposed, r.rounds.accepted) for r in runs if r.method == "suffix"]
        assert ("reused" in table_of(summarise(runs))) == warm
    assert found[False][0] == found[False][1] == found[False][2]
    assert [reused for reused, *_ in found[True]] == [0, 1, 2]
    assert sum(found[True][2][2]) > sum(found[False][2][2]), "the memory would have flattered a repeat"


def test_an_engines_prefixes_start_cold_or_say_what_they_reuse(model):
    question = [Question("a", 0, (LONG,))]
    plain = ours(specdec.AutoregressiveGenerator(model, mode="eager"))
    for warm in (False, True):
        engine = specdec.Engine(specdec.ModelRunner(model, page_size=16, mode="eager"), memory=1 << 22)
        bench = bench_of(model, {OURS: plain, "engine": ours_in_engine(engine, warm)})
        runs = [run for job in jobs_of(question, [0.0], repeats=3) for run in run_job(bench, job)]
        reused = [r.reused for r in runs if r.method == "engine"]
        assert reused[0] == 0 and (reused[1:] == [0, 0]) != warm
        assert len({r.digest for r in runs}) == 1
        engine.close()


def test_an_engine_at_work_is_not_reset(model):
    engine = specdec.Engine(specdec.ModelRunner(model, mode="eager"), memory=1 << 22)
    engine.submit([1, 2, 3], max_new_tokens=2)
    with pytest.raises(ValueError, match="1 requests are at work"):
        engine.forget_texts()
    engine.close()


def test_acceptance_that_auto_learned_is_forgotten_but_not_its_times(model):
    generator = specdec.SpeculativeGenerator(
        model, specdec.ModelDrafter(noisy_copy("llama"), 2), tree="auto", mode="eager"
    )
    machine, new = generator._automatic._machines.setdefault(1, CostModel()), CostModel().usual
    generator.generate(torch.tensor([[3, 4, 5, 6]]), max_new_tokens=24)
    assert machine.usual != new and machine.step
    generator.forget_texts()
    assert machine.usual == new and machine.step


def test_what_transformers_assistant_learned_is_put_back():
    model, assistant = build("llama"), noisy_copy("llama")
    method = theirs(model, assistant_model=assistant)
    before = assistant.generation_config.num_assistant_tokens
    assistant.generation_config.num_assistant_tokens = 77
    method.reset()
    assert assistant.generation_config.num_assistant_tokens == before


def test_time_that_goes_into_timing_is_no_time_of_the_call():
    method = Method(lambda *_: Decoded(((1,),), untimed=5.0), lambda settings: {})
    _, seconds = timed(method, torch.ones(1, 1), torch.ones(1, 1), 1, 0, {})
    assert -5.0 < seconds < -4.9


def test_intervals_are_over_prompts_not_calls(model):
    """Many repeats of two prompts do not make an interval."""
    methods = {OURS: ours(specdec.AutoregressiveGenerator(model, mode="eager"))}
    runs = [run for job in jobs_of(QUESTIONS[:2], [0.0], repeats=3) for run in run_job(bench_of(model, methods), job)]
    assert speedup(runs, runs) is None and tokens_per_round(runs) is None
    with pytest.raises(ValueError, match="nothing was decoded by another"):
        summarise(runs, "another")
