"""Runs a plan: every model's methods over all jobs, into a folder from which a killed run goes on."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from specdec.acceptance import AcceptanceRule
from specdec.drafters import Drafter
from specdec.engine import Engine
from specdec.evaluation.measure import Bench, Job, jobs_of, run_jobs
from specdec.evaluation.methods import OURS, PLAIN, Method, ours, ours_in_engine, peer_of, theirs
from specdec.evaluation.plan import MethodPlan, ModelPlan, Plan, questions_of, task_name
from specdec.evaluation.runs import Run, record_of, run_of
from specdec.evaluation.sampling import notes_on, settings_for
from specdec.evaluation.texts import Texts
from specdec.generation.generators import AutoregressiveGenerator, SpeculativeGenerator
from specdec.model.runner import ModelRunner
from specdec.training.checkpoint import refuse_other_settings, write_json

SETTINGS, ABOUT = "settings.json", "about-{}.json"


@dataclass(frozen=True, slots=True)
class Loading:
    """How names of a plan become models; given by the command line, whose kinds of drafters packages extend.

    model: `model(plan)` -> (runner, tokenizer), called again for each engine.
    drafter, rule: by name.
    """

    model: Callable[[ModelPlan], tuple[ModelRunner, Any]]
    drafter: Callable[[str, ModelRunner, int | None], Drafter]
    rule: Callable[[str | None], AcceptanceRule | None]


@dataclass(frozen=True, slots=True)
class Share:
    """The part of the jobs that this process takes: one of every `count`."""

    index: int = 0
    count: int = 1


def evaluate(plan: Plan, folder: Path, loading: Loading, share: Share, progress: bool = True) -> None:
    """Run what is missing in `folder`. Raises ValueError if it holds an evaluation with other settings."""
    folder.mkdir(parents=True, exist_ok=True)
    if share.index == 0:
        refuse_other_settings(folder / SETTINGS, json.loads(json.dumps(plan.as_dict())))
    done = {(run_model, key) for run_model, key, _ in _lines(folder)}
    for model in plan.models:
        jobs = [job for job in _jobs(plan)[share.index :: share.count] if (model.name, job.key) not in done]
        if jobs:
            _run_model(plan, model, jobs, folder, loading, share, progress)


def results_in(folder: Path) -> tuple[list[Run], dict[str, Any]]:
    """All runs in a folder, in the order of the plan, and what is known of each model."""
    found = {(model, key): records for model, key, records in _lines(folder)}
    runs = [run_of(record) for _, records in sorted(found.items()) for record in records]
    about = {path.stem.partition("-")[2]: json.loads(path.read_text()) for path in sorted(folder.glob("about-*.json"))}
    return runs, about


def methods_of(plan: Plan, model: ModelPlan, target: ModelRunner, loading: Loading) -> dict[str, Method]:
    """The methods of a model, plain decoding here first, then transformers' own, then those of the plan."""
    methods: dict[str, Method] = {OURS: ours(AutoregressiveGenerator(target))}
    if plan.transformers:
        methods[PLAIN] = theirs(target.model)
    for wanted in model.methods:
        made, peer = _method(wanted, model, target, loading)
        if peer is not None and plan.transformers and wanted.start == "cold":
            methods.setdefault(f"{wanted.drafter.rpartition('/')[2]} in transformers", theirs(target.model, **peer))
        methods[wanted.name] = made
    return methods


def _method(wanted: MethodPlan, model: ModelPlan, target: ModelRunner,
            loading: Loading) -> tuple[Method, dict | None]:  # fmt: skip
    rule, warm = loading.rule(wanted.rule), wanted.start == "warm"
    if wanted.through == "engine":  # with caches of its own
        target = ModelRunner(target.model, mode=target.mode)
    elif not wanted.drafter:
        raise ValueError(f"method {wanted.name} needs a drafter: plain decoding is measured anyway")
    drafter = loading.drafter(wanted.drafter, target, model.num_tokens) if wanted.drafter else None
    if wanted.through == "engine":
        engine = Engine(target, drafter, rule, int(wanted.memory * 2**30), tree=wanted.tree)
        return ours_in_engine(engine, warm), None
    generator = SpeculativeGenerator(target, drafter, rule, tree=wanted.tree)
    return ours(generator, warm), peer_of(generator.drafter) if generator.drafter is not None else None


def _jobs(plan: Plan) -> list[Job]:
    """Of all tasks; repeats are the outermost loop, so that a run that is cut has some of everything."""
    jobs = [
        job
        for task in plan.tasks
        for job in jobs_of(
            questions_of(task, plan.limit), plan.temperatures, plan.repeats, plan.seed, plan.batch_sizes,
            task_name(task),
        )
    ]  # fmt: skip
    return sorted(jobs, key=lambda job: job.repeat)


def _run_model(plan: Plan, model: ModelPlan, jobs: Sequence[Job], folder: Path, loading: Loading, share: Share,
               progress: bool) -> None:  # fmt: skip
    target, tokenizer = loading.model(model)
    methods = methods_of(plan, model, target, loading)
    sampling = partial(
        settings_for, target.model, top_k=plan.top_k, top_p=plan.top_p, from_model=plan.sampling == "model"
    )
    texts = Texts(tokenizer, target.device, plan.chat, plan.plain)
    if share.index == 0:
        write_json(_about(plan, target, methods, sampling), folder / ABOUT.format(model.name))
    bench = Bench(methods, texts, sampling, plan.max_new_tokens, model.name)
    own = folder / f"records-{share.index}.jsonl"
    if own.exists() and not (text := own.read_text(encoding="utf-8")).endswith("\n"):
        own.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")
    with own.open("a", encoding="utf-8") as file:
        for job, runs in run_jobs(bench, jobs, plan.warm_up, model.name, progress):
            line = {"model": model.name, "job": job.key, "records": [record_of(run) for run in runs]}
            file.write(json.dumps(line) + "\n")  # a line a job, so that none is there in part
            file.flush()


def _about(plan: Plan, target: ModelRunner, methods: dict[str, Method], sampling: Callable[[float], dict]) -> dict:
    """What a result says of a model: sampling in force by temperature and method, and what is left out or unexpected.

    Raises ValueError where methods would not sample alike."""
    used: dict[str, dict] = {}
    notes = list[str]()
    for temperature in plan.temperatures:
        given = sampling(temperature)
        of_methods = {name: method.used(given) for name, method in methods.items()}
        first = of_methods[OURS]
        other = next((name for name, found in of_methods.items() if found != first), None)
        if other is not None:
            raise ValueError(f"{OURS} would sample with {first}, {other} with {of_methods[other]}: not comparable")
        used[f"{temperature:g}"] = of_methods
        notes += notes_on(target.model, first)
    alone = [name for name, method in methods.items() if method.most_rows == 1]
    for batch in plan.batch_sizes:
        if batch > 1 and alone:
            notes.append(f"batch {batch}: {', '.join(alone)} left out: transformers drafts for one prompt at a time")
    dtype = str(target.dtype).removeprefix("torch.")
    return {"dtype": dtype, "mode": target.mode, "sampling": used, "notes": notes}


def _lines(folder: Path) -> Iterator[tuple[str, str, list[dict]]]:
    """(model, job, records) of what is done, by all processes; a line that a kill cut short is left out."""
    for path in sorted(folder.glob("records-*.jsonl")):
        text = path.read_text(encoding="utf-8")
        for line in text[: text.rfind("\n") + 1].splitlines():
            found = json.loads(line)
            yield found["model"], found["job"], found["records"]
