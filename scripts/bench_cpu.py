"""Ours beside other engines on a CPU: plain decoding, a chain from a draft and prompt lookup, in one run.

    python -m scripts.bench_cpu --peers llama.cpp,openvino,onnxruntime --python openvino=/opt/openvino/bin/python
    python -m scripts.bench_cpu --peers "" --base ../older-checkout --batch 8 --prompts 8
    python -m scripts.bench_cpu --shape wide --dtype bfloat16 --new-tokens 32 --repeats 3   # random weights, a control
    python -m scripts.bench_cpu --from scripts/results/cpu.json

The peers are those of the extra "peers". What they need conflicts with this library's transformers, so each runs in an
interpreter of its own; the first run there also converts the shipped pair (llama.cpp with `gguf` and `safetensors`,
OpenVINO with `optimum-intel`, onnxruntime with the builder in onnxruntime-genai, which needs torch and transformers).
All get the same token ids, weights in fp32, one number of threads and γ, and write the same number of tokens. How far a
lookup matches is each engine's own setting. A peer that fails leaves a line and an error, and the others go on.

Every method is a process that stays; the parent asks one at a time, in a new random order for every prompt, so ratios
compare calls that lie seconds apart. Each process reads its own wall clock and CPU time around whole calls. Greedy
texts are compared with transformers', and texts drawn at temperature 1 are tested against the target's distribution."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers.utils import logging

from scripts.common.entry import run_script
from scripts.cpu_bench.figures import ratios_of, rows_of
from scripts.cpu_bench.interleave import Calls, ask, measure
from scripts.cpu_bench.methods import KINDS, OURS, PLAIN, TRANSFORMERS, Method, methods_of, pairs_of
from scripts.cpu_bench.options import PAIR, options_of
from scripts.cpu_bench.processes import Launcher, WorkerFailed
from scripts.cpu_bench.report import plot, report
from scripts.cpu_bench.sampled import judge
from scripts.cpu_bench.workload import SURE, Workload, prepare
from scripts.generate_bench.audit import compare, explain
from specdec.cli.results import hand_over, make_result, read_result
from specdec.info import commit

REFERENCES = (f"{TRANSFORMERS} {PLAIN}", *(f"{OURS} {kind}" for kind in KINDS))
SAMPLED_TOKENS = 32  # of each text that is drawn
NOT_SETTINGS = ("json", "plot", "source", "exports", "limit", "python")


def say(line: str) -> None:
    """Tell how far the run is."""
    print(line, flush=True)


def audit(texts: dict[str, list[list[int]]], workload: Workload, options) -> list[dict]:
    """Where greedy texts part from the reference's, and whether rounding can have decided there."""
    rows = [{"method": name, "batch": options.batch, "tokens": tokens} for name, tokens in texts.items()]
    compared = compare(rows, REFERENCES)
    if not any(entry["differences"] for entry in compared):
        return compared
    prompts = [torch.tensor(prompt) for batch in workload.batches for prompt in batch]
    reference = {str(options.batch): texts[compared[0]["reference"]]}
    return list(explain(workload.load("target", options.dtype), lambda _: prompts, compared, reference))


def draw(methods: Sequence[Method], launcher: Launcher, workload: Workload, options) -> list[dict]:
    """Texts of each method at temperature 1, the prompts in turn, and whose they are; calls that fail are counted.

    The draft model is one that is too sure, since a wrong rule hardly shows with one that says nearly what the target
    says."""
    target, draft = (workload.load(name, options.dtype) for name in ("target", SURE))
    count, found = min(SAMPLED_TOKENS, options.new_tokens), []
    prompts = [workload.batches[number % len(workload.batches)][0] for number in range(options.samples)]
    for method in methods:
        texts, errors, worker = {}, [], None
        for number, prompt in enumerate(prompts):
            try:
                worker = worker or launcher(method, SURE)
                answer = ask(worker, [prompt], count, options.seed + 1 + number, options.limit)
                texts[number] = answer["texts"][0]
            except WorkerFailed as error:
                errors.append(str(error))
                if worker is not None:
                    worker.close()  # what failed may decode otherwise from then on
                    worker = None
        if worker is not None:
            worker.close()
        entry = {"method": method.name, "failed": len(errors), "error": errors[0] if errors else None}
        if texts:
            entry |= judge(target, draft, [prompts[number] for number in texts], list(texts.values()), options.seed)
        found.append(entry)
    return found


def measured(options, exports: Path) -> dict:
    """The result of a run."""
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    workload, methods = prepare(options, exports), methods_of(options)
    launcher, calls = Launcher(workload, options), Calls(options.limit, say)
    try:
        calls.start(methods, launcher)
        say(f"{len(calls.workers)} of {len(methods)} methods are ready")
        records, texts = measure(calls, workload.batches, options)
    finally:
        calls.close()
    sampled = []
    if options.samples and options.shape == PAIR and options.batch == 1:
        sampled = draw([method for method in methods if method.name in texts], launcher, workload, options)
    settings = {name: value for name, value in vars(options).items() if name not in NOT_SETTINGS}
    settings["base"] = commit(options.base / "specdec" / "__init__.py") if options.base else None
    more = {
        "ratios": ratios_of(pairs_of(methods), records),
        "audit": audit(texts, workload, options),
        "sampled": sampled,
        "versions": launcher.versions,
    }
    return make_result("cpu", settings, rows_of(methods, records, calls.failed), records, **more)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, or read an earlier result; print it, draw it and write it."""
    options = options_of(arguments, __doc__)
    if options.source is not None:
        result = read_result(options.source)
        if result["kind"] != "cpu":
            raise ValueError(f"{options.source} is a result of kind {result['kind']!r}, not of this script")
    elif options.exports is not None:
        result = measured(options, options.exports)
    else:
        with tempfile.TemporaryDirectory() as folder:
            result = measured(options, Path(folder))
    print("\n" + report(result))
    if options.plot is not None:
        plot(result, options.plot)
    if options.json is not None or options.source is None:
        hand_over(result, options.json)


if __name__ == "__main__":
    run_script(main)
