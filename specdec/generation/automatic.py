"""The policies of `tree="auto"`, what they keep between calls, and the warning where a fixed shape is a loss."""

import hashlib
import json
from collections.abc import Sequence
from functools import cache

from specdec.acceptance import AcceptanceRule, block, rejection
from specdec.cuda_graph import ByIdentity
from specdec.drafters import Drafter
from specdec.drafters.base import runners_of
from specdec.info import commit, environment
from specdec.model.fingerprint import brings_weights_of
from specdec.model.round_runner import RoundRunner
from specdec.model.runner import ModelRunner
from specdec.planning.adaptive import AdaptivePolicy, CostModel
from specdec.planning.candidates import Candidates, most_nodes
from specdec.planning.fit import Fit
from specdec.planning.fitted import FittedPolicy
from specdec.planning.kept_times import KeptTimes, default_file
from specdec.planning.loss_watch import LossWatch, warn_of_loss
from specdec.planning.policy import Policy
from specdec.report.stats import RoundStats
from specdec.requests.request import Request
from specdec.rounds.captured import CapturedRounds
from specdec.sampling.processors import name_of
from specdec.trees.tree import TokenTree


class AutomaticShapes:
    """The policies of one generator.

    On a GPU, where rounds can be captured, a `FittedPolicy`; else an `AdaptivePolicy`, of chains where a CPU captures
    them."""

    def __init__(self, target: ModelRunner, captured: CapturedRounds):
        self._target, self._captured = target, captured
        self._machines: dict[int, CostModel] = {}
        self._fits: dict[tuple, Fit] = {}

    def policy(self, drafter: Drafter, given: AcceptanceRule | None, rule: AcceptanceRule, request: Request) -> Policy:
        """A policy for one call; `given`: the rule that the user chose, if any."""
        traits, count = drafter.traits, len(request.prompts)
        shapes = "chain" if given in (rejection, block) and traits.shapes == "tree" else traits.shapes
        if self._target.device.type == "cuda":
            fitted = self.fitted(drafter, shapes, rule, request)
            if self._captured.fallback_reason(drafter, rule, request, fitted) is None:
                return fitted
        machine = self._machines.setdefault(count, CostModel())
        few_shapes = self._target.device.type == "cpu" and self._target.mode != "eager"
        return AdaptivePolicy(machine, shapes, traits.max_tokens, traits.max_depth, few_shapes, self._most(count))

    def forget_texts(self) -> None:
        """Drop what calls so far have taught of acceptance; the times of rounds stay."""
        for machine in self._machines.values():
            machine.forget_texts()
        for fit in self._fits.values():
            fit.forget_texts()

    def _most(self, rows: int) -> int:
        """For `AdaptivePolicy`: what a row may draft where weights are brought for each pass; elsewhere 0."""
        brought = brings_weights_of(self._target.model)
        return most_nodes(self._target.vocab_size) // rows if brought else 0

    def fitted(self, drafter: Drafter, shapes: str, rule: AcceptanceRule, request: Request) -> FittedPolicy:
        """The policy of captured rounds; acceptance and times are those of the same rule and kinds of processors."""
        traits, target, has_model = drafter.traits, self._target, any(True for _ in runners_of(drafter))
        kind = ByIdentity(rule), request.do_sample, request.processors.kinds(), shapes
        if kind not in self._fits:
            self._fits[kind] = Fit(has_model, self._kept(drafter, rule, kind[1:]))
        candidates = Candidates(shapes, traits.max_depth, traits.tree, target.vocab_size, traits.max_tokens)
        return FittedPolicy(self._fits[kind], candidates, target.slots_for(len(request.prompts)), traits.max_tokens)

    def _kept(self, drafter: Drafter, rule: AcceptanceRule, others: tuple) -> KeptTimes:
        """The times in the user's cache folder, under all that they depend on. Nothing is kept for a CPU, whose times
        change with what else it does."""
        if self._target.device.type != "cuda":
            return KeptTimes()
        runners = [self._target, *runners_of(drafter)]
        of_drafter = type(drafter).__name__, drafter.traits.max_depth, drafter.traits.max_tokens
        about = [_here(), [_about(runner) for runner in runners], *of_drafter]
        return KeptTimes(default_file(), repr([*about, name_of(rule), others]))


def watch_for_loss(watch: LossWatch, drafter: Drafter | None, tree: TokenTree | str | None,
                   rows: Sequence[RoundStats]) -> None:  # fmt: skip
    """Warn, once for each number of rows, if captured rounds of a fixed shape are slower than plain steps.

    Counted are rounds in which no row had ended. The first one, which runs the prompts, has no time."""
    count, step = min(len(row.seconds) for row in rows), rows[0].step_seconds
    if drafter is None or not step or not count:
        return
    emitted = [row.emitted[1 : count + 1] for row in rows]
    tokens = [sum(each) / len(rows) for each in zip(*emitted, strict=True)]
    own = drafter.traits.tree if tree is None else tree
    what, smaller = f"a draft of {drafter.traits.max_tokens} tokens", "a smaller one"
    if isinstance(own, TokenTree):
        what = f"a chain of {own.size - 1}" if own.is_chain else f"a tree of {own.size} nodes"
        smaller = "a shorter chain" if own.is_chain else "a smaller tree"
    if sentence := watch.add(what, len(rows), rows[0].seconds[:count], tokens, step):
        warn_of_loss(sentence, smaller)


@cache
def _here() -> str:
    """The card and the versions that decide how long rounds take; of a checkout also its commit."""
    about = environment()
    return json.dumps(about | {"commit": commit() if about["specdec"] is None else None}, sort_keys=True)


def _about(runner: RoundRunner) -> tuple:
    """The size of a model and how it runs."""
    name, pages = type(runner.model).__name__, runner.page_format
    if not isinstance(runner, ModelRunner):  # no transformers model: its shapes are all that its times depend on
        shapes = repr([tuple(parameter.shape) for parameter in runner.model.parameters()])
        return name, hashlib.sha256(shapes.encode()).hexdigest()[:16], str(pages.dtype), pages.kv_dtype, pages.page_size
    config = hashlib.sha256(runner.model.config.to_json_string(use_diff=False).encode()).hexdigest()[:16]
    return name, config, str(runner.dtype), runner.kv_dtype, runner.mode, runner.page_size
