"""What an evaluation compares: methods of each model, tasks, temperatures and batch sizes, as a YAML file says."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from specdec.evaluation.methods import OURS, PLAIN
from specdec.evaluation.questions import SHIPPED, Question, read_questions, shipped_questions, some_of

STARTS = ("cold", "warm")
THROUGH = ("generator", "engine")


@dataclass(frozen=True, slots=True)
class MethodPlan:
    """A drafter and how it decodes.

    drafter: as for `--drafter`; "" for plain decoding in an engine.
    name: in tables.
    tree: "auto" lets acceptance and times choose shapes (None: the drafter's own).
    rule: of sampling, by name (None: the one that fits the draft).
    start: "cold", or "warm": what calls teach stays, and the reuse is a column.
    through: a generator, or an engine, which shares prefixes.
    memory: GiB of an engine's caches.
    """

    drafter: str
    name: str = ""
    tree: str | None = None
    rule: str | None = None
    start: str = "cold"
    through: str = "generator"
    memory: float = 2.0

    def __post_init__(self):
        if self.tree not in (None, "auto"):
            raise ValueError(f"tree of a method must be auto or absent, got {self.tree!r}")
        for name, known in (("start", STARTS), ("through", THROUGH)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} of a method must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if not self.memory > 0:
            raise ValueError(f"memory of a method must be above 0 GiB, got {self.memory}")
        if not self.name:
            about = [self.tree, self.rule, *(x for x in (self.start, self.through) if x in ("warm", "engine"))]
            short = self.drafter.rpartition("/")[2] or self.drafter or "plain"
            object.__setattr__(self, "name", " ".join([short, *(x for x in about if x)]))
        if self.name in (PLAIN, OURS):
            raise ValueError(f"a method cannot be named {self.name!r}, which is one of the baselines")


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """A target, with the methods that decode it."""

    target: str
    methods: tuple[MethodPlan, ...]
    name: str = ""
    tokenizer: str | None = None
    dtype: str = "auto"
    mode: str = "auto"
    num_tokens: int | None = None

    def __post_init__(self):
        object.__setattr__(self, "name", self.name or self.target.rstrip("/").rpartition("/")[2])
        if not self.name or "/" in self.name:
            raise ValueError(f"a model needs a target and a name without /, got {self.target!r} and {self.name!r}")
        names = [method.name for method in self.methods]
        if len(set(names)) < len(names):
            raise ValueError(f"the methods of {self.name} need different names, got {names}")


@dataclass(frozen=True, slots=True)
class Plan:
    """All that is measured; one field a setting of the YAML file.

    tasks: "shipped", or files, see `read_questions`.
    limit: questions of each task, evenly (None: all).
    chat, plain: see `Texts`.
    sampling: "stated": `top_k` and `top_p` here, whatever the models' generation configs say; "model": theirs.
    transformers: whether its own methods are measured too.
    warm_up: new tokens of the calls before those that count (None: as many as they have).
    """

    models: tuple[ModelPlan, ...]
    tasks: tuple[str, ...] = (SHIPPED,)
    temperatures: tuple[float, ...] = (0.0,)
    batch_sizes: tuple[int, ...] = (1,)
    max_new_tokens: int = 128
    repeats: int = 3
    limit: int | None = None
    seed: int = 0
    chat: bool = False
    plain: bool = False
    sampling: str = "stated"
    top_k: int = 0
    top_p: float = 1.0
    transformers: bool = True
    warm_up: int | None = None
    threads: int | None = None
    device: str | None = None

    def __post_init__(self):
        if not self.models or not self.tasks or not self.temperatures or not self.batch_sizes:
            raise ValueError("an evaluation needs at least one model, task, temperature and batch size")
        counts = {"max_new_tokens": (self.max_new_tokens,), "repeats": (self.repeats,), "limit": (self.limit,)}
        for name, given in (counts | {"batch_sizes": self.batch_sizes, "threads": (self.threads,)}).items():
            if any(value is not None and (not isinstance(value, int) or value < 1) for value in given):
                raise ValueError(f"{name} must be integers of at least 1, got {', '.join(map(str, given))}")
        if any(not isinstance(t, int | float) or t < 0 for t in self.temperatures):
            raise ValueError(f"temperatures must be numbers of at least 0, got {self.temperatures}")
        if self.sampling not in ("stated", "model"):
            raise ValueError(f"sampling must be stated or model, got {self.sampling!r}")
        names = [task_name(task) for task in self.tasks], [model.name for model in self.models]
        if any(len(set(each)) < len(each) for each in names):
            raise ValueError(f"tasks and models need different names, got {names[0]} and {names[1]}")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, which `plan_of` reads again."""
        return asdict(self)


def read_plan(path: str | Path) -> dict[str, Any]:
    """The settings of a YAML file, for `plan_of`. Raises ValueError for what is no mapping."""
    import yaml

    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold settings by name, got {type(found).__name__}")
    return found


def plan_of(settings: Mapping[str, Any]) -> Plan:
    """A plan from plain values; models and methods may be given short: a list, or a mapping by name.

    Raises ValueError that names a setting which there is not.

    >>> model = {"target": "a/b", "methods": ["lookup", {"drafter": "c/d", "tree": "auto"}]}
    >>> plan = plan_of({"models": {"tiny": model}})
    >>> [method.name for method in plan.models[0].methods]
    ['lookup', 'd auto']
    """
    models = tuple(_model(one) for one in _named(settings.get("models", ()), "target"))
    rest = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    for name in ("tasks", "temperatures", "batch_sizes"):
        if name in rest and not isinstance(rest[name], tuple):
            rest[name] = (rest[name],)
    return _made(Plan, rest | {"models": models}, "an evaluation")


def questions_of(task: str, limit: int | None) -> list[Question]:
    """The questions of a task."""
    return some_of(shipped_questions() if task == SHIPPED else read_questions(task), limit)


def task_name(task: str) -> str:
    """What tables call a task: of a file its name without folder and ending."""
    return Path(task).stem


def _model(given: Mapping[str, Any]) -> ModelPlan:
    methods = tuple(_made(MethodPlan, one, "a method") for one in _named(given.get("methods", ()), "drafter"))
    return _made(ModelPlan, {**given, "methods": methods}, "a model")


def _named(given: Any, key: str) -> list[dict]:
    """Entries of a list or of a mapping by name as mappings; a text stands for `key`."""
    if isinstance(given, Mapping):
        entries = [{**(one if isinstance(one, Mapping) else {key: one}), "name": n} for n, one in given.items()]
    elif isinstance(given, Sequence) and not isinstance(given, str):
        entries = [dict(value) if isinstance(value, Mapping) else {key: value} for value in given]
    else:
        entries = [{key: given}]
    return entries


def _made(kind: Callable[..., Any], given: Mapping[str, Any], what: str) -> Any:
    known = [one.name for one in fields(kind)]  # type: ignore[arg-type]
    for name in given:
        if name not in known:
            raise ValueError(f"{what} has no setting {name!r}; there are {', '.join(known)}")
    try:
        return kind(**given)
    except TypeError as error:
        raise ValueError(f"{what}: {error}") from error
