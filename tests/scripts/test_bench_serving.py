"""The serving benchmark runs from end to end on a toy; its arithmetic, its traces and its verdicts are right."""

import json

import pytest
import torch

import specdec
from scripts import bench_serving
from scripts.bench_serving import main
from scripts.generate_bench.models import load
from scripts.serving_bench import side_by_side
from scripts.serving_bench.bars import bars
from scripts.serving_bench.drive import Delivery, run_pass
from scripts.serving_bench.experiments import EXPERIMENTS, workload
from scripts.serving_bench.measures import Pass, RequestRecord, figures, over_passes, percentiles
from scripts.serving_bench.methods import PARTIAL, PEER, PLAIN, TOTAL, Bench, check_method, engine_options
from scripts.serving_bench.options import options_of, settings_of
from scripts.serving_bench.roofline import Card, card_of_model, least_seconds, work_of
from scripts.serving_bench.servers import make_engine
from scripts.serving_bench.special import covered
from scripts.serving_bench.workload import (
    Request,
    poisson_arrivals,
    random_requests,
    read_trace,
    salted,
    shortened,
    text_requests,
)
from specdec.cli.results import read_result

torch.set_num_threads(1)
SMOKE = ["--preset", "smoke", "--mode", "eager"]


def record(number, arrival, events, wanted=None, finished=True, prompt=10):
    tokens = [0] * sum(count for _, count in events)
    return RequestRecord(number, prompt, wanted or len(tokens), arrival, list(events), tokens, finished)


# ---- figures


def test_times_of_a_request_count_from_its_arrival():
    one = record(0, 1.0, [(1.5, 1), (2.0, 3), (2.25, 1)])
    assert one.first_token_seconds == 0.5 and one.latency_seconds == 1.25
    assert one.gaps == [0.5, 0.25] and one.spread_gaps == pytest.approx([1 / 6, 1 / 6, 1 / 6, 0.25])
    assert one.seconds_per_token == pytest.approx(0.75 / 4)
    assert record(0, 0.0, [(1.0, 4)]).seconds_per_token is None, "all tokens at once"
    waiting = record(0, 0.0, [], wanted=4, finished=False)
    assert (waiting.first_token_seconds, waiting.latency_seconds, waiting.seconds_per_token) == (None, None, None)


def test_percentiles_interpolate_between_the_nearest_values():
    assert percentiles([0.0, 10.0]) == {"p50": 5.0, "p90": 9.0, "p99": 9.9}
    assert percentiles([7.0]) == {"p50": 7.0, "p90": 7.0, "p99": 7.0} and percentiles([]) is None


def test_goodput_asks_for_both_limits_and_throughput_for_useful_tokens_alone():
    records = [
        record(0, 0.0, [(0.5, 1), (1.0, 1)]),  # both met
        record(1, 0.0, [(0.5, 1), (2.0, 1)]),  # a token of 1.5 s
        record(2, 0.0, [(1.5, 1), (1.6, 1)]),  # the first one after 1.5 s
        record(3, 1.0, [(2.0, 1)]),  # no second token
        record(4, 0.0, [(1.0, 4)], wanted=2),  # two of them nobody asked for
        record(5, 0.0, [(0.1, 1)], wanted=9, finished=False),
    ]
    found = figures(Pass(records, [[(0, 1)], []], {"extra": 3}), first_token_limit=1.0, token_limit=0.5)
    assert (found["seconds"], found["requests"], found["finished"], found["tokens"]) == (2.0, 6, 5, 10)
    assert found["tokens_per_second"] == 5.0 and found["requests_per_second"] == 2.5 and found["goodput"] == 1.5
    assert (found["steps"], found["extra"]) == (2, 3)
    whole = figures(Pass(records, []), 1.0, 0.5, streams=False)
    assert whole["goodput"] is whole["first_token"] is whole["itl"] is None and whole["latency"] == found["latency"]


def test_passes_give_medians_with_the_least_and_the_most():
    passes = [{"a": n, "b": {"p50": 2 * n}, "c": None, "d": ["x"]} for n in (3.0, 1.0, 2.0)]
    row = over_passes(passes)
    assert row["a"] == 2.0 and row["b"] == {"p50": 4.0} and row["c"] is None and row["d"] == ["x"]
    assert row["range"] == {"a": [1.0, 3.0]} and row["passes"] == 3


# ---- roofline


def test_prompts_run_in_the_last_steps_with_room_before_their_first_token():
    steps = [[], [(0, 1)], [(0, 1), (1, 1)], [(1, 1)]]
    run = Pass([record(0, 0.0, [(1, 1), (2, 1)], prompt=3), record(1, 0.0, [(2, 1), (3, 1)], prompt=7)], steps)
    # prompt 1: 6 tokens, of which step 1 has room for 4 beside a row, and step 0 for 1 of the other 2
    assert work_of(run, most=5) == [(0, 4, 4), (1, 4, 3 + 6), (2, 0, 4 + 7), (1, 0, 8)]
    twice = Pass([record(0, 0.0, [(1, 2)], prompt=3)], [[], [(0, 2)]])
    assert work_of(twice, most=5) == [(0, 2, 2), (1, 0, 3), (1, 0, 4)], "two rounds in one step"


def test_a_step_is_bound_by_weights_or_by_products_and_then_by_keys():
    card = Card(body_weights=100, head_weights=10, weight_bytes=220, kv_bytes=4, bandwidth=10.0, peak=50.0)
    assert card.step_seconds(1, 0, 0) == 22.0, "220 operations take 4.4 s, the weights 22"
    assert card.step_seconds(1, 9, 5) == pytest.approx(2 * (100 * 10 + 10) / 50 + 2.0)
    assert least_seconds(card, [(1, 0, 0), (1, 9, 5)]) == pytest.approx(22 + 40.4 + 2)


def test_the_card_of_a_model_counts_what_a_step_reads():
    model = load(options_of(SMOKE)).target
    card = card_of_model(model, {"read_bytes": 2.0, "copy_bytes": 3.0, "matmul_flops": 5.0})
    assert card.head_weights == 512 * 64 and (card.bandwidth, card.peak) == (3.0, 5.0)
    assert card.body_weights + 2 * card.head_weights == model.num_parameters()
    assert card.kv_bytes == 2 * 4 * 2 * 16 * 4 and card.weight_bytes == 4 * (card.body_weights + card.head_weights)


def test_idle_time_is_what_no_kernel_covers():
    assert covered([(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.5, 1.6)]) == (4.0, 6.0)
    with pytest.raises(ValueError, match="no kernel"):
        covered([])


# ---- requests


def test_lengths_and_arrivals_repeat_with_their_seed():
    one, other = (random_requests(200, (4, 64), (2, 32), 100, seed=5, prefix=3) for _ in range(2))
    assert one == other and len({request.prompt[:3] for request in one}) == 1
    assert {len(request.prompt) for request in one} <= set(range(7, 68))
    assert min(r.new_tokens for r in one) == 2 and max(r.new_tokens for r in one) >= 31
    below = sum(request.new_tokens <= 8 for request in one)
    assert 70 < below < 140, "half of them below the geometric middle"
    times = poisson_arrivals(500, 4.0, seed=1)
    assert times[0] == 0 and times == sorted(times) and 100 < times[-1] < 150
    with pytest.raises(ValueError, match="above 0, got 0"):
        poisson_arrivals(3, 0, 1)


def test_texts_come_in_turn_and_passes_have_a_token_of_their_own():
    requests = text_requests([[1, 2], [3]], 3, (4, 8), seed=0)
    assert [request.prompt for request in requests] == [(1, 2), (3,), (1, 2)]
    assert [request.prompt for request in salted(requests, 9)] == [(9, 1, 2), (9, 3), (9, 1, 2)]
    warm = shortened([Request((1,), 100), Request((2,), 1), Request((3,), 50)], 2, 20)
    assert [request.new_tokens for request in warm] == [20, 1]


def test_a_trace_is_read_in_the_order_of_arrival(tmp_path):
    pair = specdec.load_tiny_pair()
    path = tmp_path / "trace.jsonl"
    lines = [
        {"arrival": 2, "prompt": "import os", "output_tokens": 3},
        {"arrival": 0.5, "prompt": [5, 6], "output_tokens": 1},
        {"arrival": 1.0, "prompt_tokens": 4, "output_tokens": 2},
    ]
    path.write_text("\n\n".join(map(json.dumps, lines)))
    found = read_trace(path, pair.tokenizer, 100, seed=0)
    assert [request.arrival for request in found] == [0.5, 1.0, 2] and found[0].prompt == (5, 6)
    assert len(found[1].prompt) == 4 and found[2].prompt == tuple(pair.tokenizer("import os").input_ids)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2: Expecting"),
        ("[]", "line 2: a request is an object"),
        ('{"prompt_tokens": 3}', '"output_tokens" is missing'),
        ('{"output_tokens": 3}', 'either "prompt" or "prompt_tokens"'),
        ('{"prompt": [1], "prompt_tokens": 3, "output_tokens": 3}', 'either "prompt" or "prompt_tokens"'),
        ('{"prompt_tokens": 0, "output_tokens": 3}', '"prompt_tokens" must be a whole number from 1 on, got 0'),
        ('{"prompt_tokens": 2, "output_tokens": true}', '"output_tokens" must be a whole number'),
        ('{"prompt": [1, 200], "output_tokens": 3}', "ids from 0 to 99"),
        ('{"prompt": [], "output_tokens": 3}', "a request has a prompt"),
        ('{"prompt": "text", "output_tokens": 3}', "needs a model with a tokenizer"),
        ('{"prompt_tokens": 2, "output_tokens": 3, "arrival": -1}', "arrival must be seconds from 0 on, got -1"),
        ('{"prompt_tokens": 2, "output_tokens": 3, "arrival": "now"}', "\"arrival\" must be seconds, got 'now'"),
        ('{"prompt_tokens": 2, "output_tokens": 3, "temperature": 1}', "temperature"),
        (
            '{"prompt_tokens": 2, "output_tokens": 3, "arrival": 1}',
            "some requests have an arrival",
        ),
    ],
)
def test_a_broken_trace_is_refused_by_line(line, says, tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text('{"prompt_tokens": 2, "output_tokens": 3}\n' + line)
    with pytest.raises(ValueError, match="trace.jsonl") as raised:
        read_trace(path, None, 100, seed=0)
    assert says in str(raised.value)


def test_a_trace_without_requests_is_refused(tmp_path):
    (tmp_path / "trace.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no requests"):
        read_trace(tmp_path / "trace.jsonl", None, 100, seed=0)


# ---- driving


class Slow:
    """A server that gives each request a token a step, on nobody's clock."""

    streams = has_steps = True

    def __init__(self):
        self.at_work, self.most, self.order = {}, 0, []

    def submit(self, number, request):
        self.at_work[number] = request.new_tokens
        self.order.append(number)
        self.most = max(self.most, len(self.at_work))

    def step(self, wait):
        self.at_work = {number: left - 1 for number, left in self.at_work.items()}
        found = [Delivery(number, 0.0, [number], not left) for number, left in self.at_work.items()]
        self.at_work = {number: left for number, left in self.at_work.items() if left}
        return found

    def counts(self):
        return {}

    def close(self):
        pass


@pytest.mark.parametrize(
    ("options", "most"), [({}, 5), ({"clients": 2}, 2), ({"clients": 9}, 5), ({"arrivals": [0.0] * 4 + [0.01]}, 4)]
)
def test_requests_reach_a_server_as_asked(options, most):
    requests = [Request((1,), n) for n in (1, 2, 3, 4, 1)]
    server = Slow()
    found = run_pass(server, requests, **options)
    assert server.order == [0, 1, 2, 3, 4] and server.most == most
    assert [record.tokens for record in found.records] == [[0], [1] * 2, [2] * 3, [3] * 4, [4]]
    assert all(record.finished for record in found.records)
    assert sum(count for step in found.steps for _, count in step) == 11


def test_the_engine_runs_the_prompt_tokens_that_it_says_it_runs():
    """What the prefix experiment reads off the engine, against what the model is given."""
    model = load(options_of(SMOKE)).target
    target = specdec.ModelRunner(model, mode="eager")
    requests = random_requests(3, (4, 8), (2, 2), 512, 0, prefix=256)
    server, seen = make_engine(target, None, requests, 3, 512, None, {}), []
    embed = model.get_input_embeddings()
    hook = embed.register_forward_pre_hook(lambda module, args: seen.append(args[0].numel()))
    try:
        found = run_pass(server, requests)
    finally:
        hook.remove()
        server.close()
    decoded = sum(len(step) for step in found.steps)
    computed = sum(len(request.prompt) - 1 for request in requests) - found.counts["saved_tokens"]
    assert found.counts["saved_tokens"] == 2 * 256 and sum(seen) == computed + decoded


# ---- whole runs


def test_every_experiment_runs_and_resumes(tmp_path, monkeypatch, capsys):
    file, folder = tmp_path / "result.json", tmp_path / "cells"
    main([*SMOKE, "--folder", str(folder), "--seconds", "0", "--json", str(file)])
    assert not read_result(file)["complete"] and read_result(file)["methods"] == []
    main([*SMOKE, "--folder", str(folder), "--bars", "--json", str(file), "--plots", str(tmp_path / "plots")])
    result, said = read_result(file), capsys.readouterr().out
    assert result["complete"] and result["kind"] == "serving"
    assert {row["experiment"] for row in result["methods"]} == set(EXPERIMENTS)
    for row in result["methods"]:
        if row.get("method") == PEER:
            continue  # another release of transformers may not run here: then there is its error
        assert row["error"] is None or row["error"].startswith("skipped"), row
        if row.get("texts"):
            assert row["texts"]["equal"] == row["texts"]["of"] > 0
    of = {row["method"]: row for row in result["methods"] if row["experiment"] == "requests"}
    assert of[TOTAL]["acceptance_rate"] == 1 and of[PARTIAL]["tokens_per_round"] <= of[TOTAL]["tokens_per_round"]
    assert of["static-2"]["first_token"] is None and of[PLAIN]["first_token"] and of[PLAIN]["saved_tokens"] == 0
    prefix = [row for row in result["methods"] if row["experiment"] == "prefix"]
    assert len(prefix) == 2 and all(row["work"] <= 1.05 and row["memory"] <= 1.05 for row in prefix)
    (int8,) = (row for row in result["methods"] if row["experiment"] == "int8")
    assert int8["rows_at_once"]["int8"] > 1.5 * int8["rows_at_once"]["None"] and int8["pages"] > 1.9
    assert result["roofline"]["least_seconds"] > 0 and result["roofline"]["steps"] == of[PLAIN]["steps"]
    assert {one["method"] for one in result["records"]} >= {PLAIN, TOTAL, PARTIAL, "static-2"}
    assert "not judged" in said and {path.name for path in (tmp_path / "plots").iterdir()} >= {"load.png", "sweep.png"}
    kept = lambda folder, name, _: json.loads((folder / f"{name}.json").read_text())
    monkeypatch.setattr(bench_serving, "measured", kept)
    main([*SMOKE, "--folder", str(folder), "--json", str(file)])
    assert read_result(file)["methods"] == result["methods"]
    with pytest.raises(ValueError, match="other settings"):
        main([*SMOKE, "--folder", str(folder), "--requests", "5", "--json", str(file)])


def test_a_method_that_fails_leaves_the_others(monkeypatch, tmp_path):
    real = side_by_side.opener

    def opener(method, *arguments):
        if method == PEER:
            raise RuntimeError("not on this machine")
        return real(method, *arguments)

    monkeypatch.setattr(side_by_side, "opener", opener)
    main([*SMOKE, "--experiments", "requests", "--methods", PEER, "heads", PLAIN, "--json", str(tmp_path / "r.json")])
    peer, heads, plain = read_result(tmp_path / "r.json")["methods"]
    assert peer["error"] == "RuntimeError: not on this machine" and "shipped pair" in heads["error"]
    assert plain["error"] is None and plain["tokens_per_second"] > 0 and "tokens_per_second" not in peer


def test_a_trace_brings_its_own_arrivals(tmp_path):
    trace = tmp_path / "trace.jsonl"
    lines = [{"prompt_tokens": 3, "output_tokens": 2, "arrival": 0.01 * n} for n in range(3)]
    trace.write_text("\n".join(map(json.dumps, lines)))
    options = [*SMOKE, "--experiments", "load", "--methods", PLAIN, "--trace", str(trace)]
    main([*options, "--json", str(tmp_path / "r.json")])
    result = read_result(tmp_path / "r.json")
    assert [one["arrival"] for one in result["records"]] == [0.0, 0.01, 0.02] and result["methods"][0]["rate"] is None
    main([*options, "--rates", "500", "--json", str(tmp_path / "r.json")])
    assert read_result(tmp_path / "r.json")["methods"][0]["rate"] == 500
    trace.write_text('{"prompt_tokens": 3, "output_tokens": 2}')
    with pytest.raises(ValueError, match="without --rates"):
        main(options)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--methods", "magic"], "methods are"),
        (["--methods", "static-0"], "methods are"),
        (["--output", "9", "3"], "smaller length first"),
        (["--rates", "0"], "above 0"),
        (["--requests", "0"], "at least 1"),
        (["--engine", "nothing"], "NAME=VALUE"),
    ],
)
def test_bad_options_are_refused(arguments, says, capsys):
    with pytest.raises(SystemExit):
        main([*SMOKE, *arguments])
    assert says in capsys.readouterr().err


def test_presets_can_be_changed():
    assert options_of(["--preset", "8b", "--device", "cuda"]).dtype == "bfloat16"
    assert options_of([]).model == "tiny" and options_of(["--shape", "toy"]).model is None
    shipped = options_of(["--requests", "3"])
    requests = workload(Bench(load(shipped), shipped), 3)
    assert len(requests) == 3 and all(16 <= request.new_tokens <= 256 for request in requests)
    assert check_method("static-64") == "static-64" and engine_options(["a=1"]) == {"a": 1}
    assert json.dumps(settings_of(shipped))


# ---- verdicts


def test_bars_are_judged_on_the_run_that_they_are_for():
    settings = settings_of(options_of(["--preset", "8b", "--device", "cuda"]))
    row = lambda experiment, method, speed, **more: {
        "experiment": experiment, "method": method, "title": method, "tokens_per_second": speed, **more,
    }  # fmt: skip
    same = {"equal": 4, "of": 4, "ours": True}
    rows = [row("requests", PEER, 1.0), row("requests", "static-64", 4.0), row("requests", PLAIN, 9.0, texts=same)]
    rows += [row("sweep", PLAIN, 1.0, batch=8), row("sweep", TOTAL, 2.1, batch=8), row("sweep", PARTIAL, 1.4, batch=8)]
    rows += [row("sweep", PLAIN, 1.0, batch=32), row("sweep", TOTAL, 0.98, batch=32)]
    rows += [row("prefix", PLAIN, None, work=1.06, memory=1.0), {"experiment": "int8", "pages": 1.94, "head_dim": 128}]
    rows += [row("idle", PLAIN, None, idle=0.04, rows=64, error=None)]
    found = {bar["what"]: bar for bar in bars(rows, {"share": 0.7}, settings)}
    met = {what: bar["met"] for what, bar in found.items()}
    assert (
        met["engine without drafts over generate_batch"] and not met["engine without drafts over static batches of 64"]
    )
    assert (
        met["share of the roofline"] and met["GPU idle between kernels"] and met["pages of int8 over pages of 16 bits"]
    )
    assert not met[f"{TOTAL} over the engine without drafts, batch 8"], "2.2 are asked for"
    assert met[f"{PARTIAL} over the engine without drafts, batch 8"]
    assert met[f"{TOTAL} over the engine without drafts, batch 32"], "0.97 are asked for"
    assert not met[f"prompt tokens computed over one prefix and the tails, {PLAIN}"]
    smaller = bars(rows, {"share": 0.7}, settings | {"requests": 32})
    assert {bar["met"] for bar in smaller if "generate_batch" in bar["what"]} == {None}
    shipped = settings_of(options_of([]))
    (bar, _) = bars([row("requests", PLAIN, 3.0), row("requests", "static-8", 2.0)], None, shipped)
    assert bar["value"] == 1.5 and bar["met"]
    assert bars([], None, settings) == []
