"""Methods side by side: every group of prompts by every method, one after the other, so that all share slow moments."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from specdec.evaluation.methods import Decoded, Method, timed
from specdec.evaluation.questions import Question
from specdec.evaluation.runs import Run, digest_of
from specdec.evaluation.texts import Texts, pad_left
from specdec.report.text_by_round import pieces_by_round


@dataclass(frozen=True, slots=True)
class Job:
    """Questions that all methods decode together, `batch` at a time, turn by turn."""

    task: str
    temperature: float
    batch: int
    repeat: int
    group: str
    questions: tuple[Question, ...]
    seed: int

    @property
    def key(self) -> str:
        """Names it among all jobs of a model."""
        return f"{self.task}|{self.temperature:g}|{self.batch}|{self.repeat}|{self.group}"


@dataclass(frozen=True, slots=True)
class Bench:
    """What jobs run on: the methods of one target by name, its prompts, and what it samples with.

    methods: the first one's answers go into later turns of a conversation, for all methods, so that their prompts are
        the same.
    sampling: the arguments of a temperature, see `settings_for`.
    count: new tokens at most.
    """

    methods: Mapping[str, Method]
    texts: Texts
    sampling: Callable[[float], dict]
    count: int
    model: str = ""
    pad: int = 0


def jobs_of(questions: Sequence[Question], temperatures: Sequence[float], repeats: int = 1, seed: int = 0,
            batches: Sequence[int] = (1,), task: str = "") -> list[Job]:  # fmt: skip
    """The jobs of a task, repeat by repeat; a batch holds questions of one kind, some of them twice to fill it."""
    jobs = []
    for repeat in range(repeats):
        for temperature in temperatures:
            for batch in batches:
                for number, (group, members) in enumerate(_groups(questions, batch)):
                    jobs.append(Job(task, temperature, batch, repeat, group, members, seed + number))
    return jobs


def run_jobs(bench: Bench, jobs: Sequence[Job], warm_up: int | None = None, label: str = "prompts",
             progress: bool = True) -> Iterator[tuple[Job, list[Run]]]:  # fmt: skip
    """Each job with its runs, as they are done, behind a progress bar.

    warm_up: new tokens of calls before the first job of each temperature and batch size, which do not count (None: as
        many as there are later, so that whatever is captured or compiled is there)."""
    from tqdm import tqdm

    warm = set[tuple]()
    for job in tqdm(jobs, desc=label, file=sys.stderr, disable=not progress):
        if (job.temperature, job.batch) not in warm:
            warm.add((job.temperature, job.batch))
            run_job(bench, job, bench.count if warm_up is None else min(warm_up, bench.count))
        yield job, run_job(bench, job)


def run_all(bench: Bench, jobs: Sequence[Job], warm_up: int | None = 16) -> list[Run]:
    """The runs of all jobs."""
    return [run for _, runs in run_jobs(bench, jobs, warm_up) for run in runs]


def run_job(bench: Bench, job: Job, count: int | None = None) -> list[Run]:
    """Every turn of a job's questions by every method; which goes first changes from repeat to repeat."""
    names = list(bench.methods)
    first = job.repeat % len(names)
    sampling, runs = bench.sampling(job.temperature), list[Run]()
    answers: list[list[str]] = [[] for _ in job.questions]
    for turn in range(max(len(question.turns) for question in job.questions)):
        members = [n for n, question in enumerate(job.questions) if turn < len(question.turns)]
        prompts = [bench.texts.ids(job.questions[n], turn, answers[n]) for n in members]
        ids, mask = pad_left(prompts, bench.pad)
        decoded: dict[str, tuple[Decoded, float]] = {}
        for name in names[first:] + names[:first]:
            method = bench.methods[name]
            if method.most_rows is None or len(members) <= method.most_rows:
                decoded[name] = timed(method, ids, mask, count or bench.count, job.seed, sampling)
        for name in names:
            if name in decoded:
                asked = [(job.questions[n], len(prompt)) for n, prompt in zip(members, prompts, strict=True)]
                runs += _runs(bench, job, turn, name, asked, *decoded[name])
        of_first, _ = decoded[next(name for name in names if name in decoded)]
        for n, tokens in zip(members, of_first.rows, strict=True):
            answers[n].append(bench.texts.answer(tokens))
    return runs


def _runs(bench: Bench, job: Job, turn: int, name: str, asked: Sequence[tuple[Question, int]], decoded: Decoded,
          seconds: float) -> list[Run]:  # fmt: skip
    """The rows of one call; `asked`: each row's question and the tokens of its prompt."""
    rounds, found = decoded.rounds or (None,) * len(asked), list[Run]()
    for (question, length), tokens, of_row in zip(asked, decoded.rows, rounds, strict=True):
        shown = of_row is not None and not (job.repeat or turn or found) and job.group == _group(question.kind, 0)
        pieces = pieces_by_round(bench.texts.tokenizer, tokens, of_row) if shown and of_row is not None else []
        found.append(
            Run(
                name, question.kind, job.temperature, question.number, job.repeat, len(tokens), digest_of(tokens),
                seconds, of_row, decoded.reused, bench.model, job.task, turn, job.batch, job.group, length, tokens,
                tuple(pieces),
            )
        )  # fmt: skip
    return found


def _groups(questions: Sequence[Question], batch: int) -> list[tuple[str, tuple[Question, ...]]]:
    """Names and members of batches."""
    by_kind: dict[str, list[Question]] = {}
    for question in questions:
        by_kind.setdefault(question.kind, []).append(question)
    found = []
    for kind, members in by_kind.items():
        for start in range(0, len(members), batch):
            group = tuple(members[(start + n) % len(members)] for n in range(batch))
            found.append((_group(kind, start // batch), group))
    return found


def _group(kind: str, number: int) -> str:
    return f"{kind} {number}"
