"""Captured rounds whose shape changes from round to round, launched ahead of the host as on a GPU.

On a CPU a graph is a list of operations; its outcome is copied here, as a launch ahead would overwrite it."""

import warnings
from functools import cache

import pytest
import torch

import specdec
from specdec.generation import automatic
from specdec.planning import fitted, loss_watch
from specdec.planning.candidates import Candidates
from specdec.planning.fit import Fit
from specdec.planning.fitted import FittedPolicy
from specdec.planning.kept_times import default_file
from specdec.planning.policy import PLAIN, shape_of
from specdec.rounds import captured, launched
from specdec.trees.tree import TokenTree
from tests.families import build, noisy_copy, ragged_prompts
from tests.matrix import DRAFTERS, require_free

CHAIN = lambda length: shape_of(TokenTree.chain(length))
BUSHES = [shape_of(TokenTree.from_widths(widths)) for widths in ((2, 2, 1, 1), (3, 1), (2, 1, 1))]
SHAPES = [CHAIN(3), BUSHES[0], CHAIN(2), CHAIN(5), *BUSHES[1:], CHAIN(1), PLAIN, PLAIN, BUSHES[0], CHAIN(4)]


class Changing:
    """A policy that goes through a list of shapes, round by round as they are asked for."""

    step_seconds, few_shapes, max_tokens = None, True, 20

    def __init__(self, shapes):
        self._shapes, self._seen, self.entered, self.finished = shapes, 0, [], None

    def next(self):
        return self._shapes[min(self._seen, len(self._shapes) - 1)]

    def enter(self, place):
        self.entered.append(place.rows)
        for shape in set(self._shapes):
            assert place.captured(shape) or place.seconds(shape) > 0, "captures it, and changes no row"

    def observe(self, shape, seconds, ranks, tokens):
        self._seen += 1

    def finish(self, rounds, tokens):
        self.finished = rounds, tokens


@pytest.fixture
def ahead(monkeypatch):
    """Launches ahead of the host; a list of the rounds in flight at each launch."""
    monkeypatch.setattr(launched, "rounds_in_flight", lambda rows: launched.ROUNDS_IN_FLIGHT)

    class Copied(captured.HostCopy):
        def __init__(self, source):
            super().__init__(source.clone())

    monkeypatch.setattr(captured, "HostCopy", Copied)


def generator_of(make, **options):
    runner = specdec.ModelRunner(build("llama"), mode="graph")
    return specdec.SpeculativeGenerator(runner, make(runner), **options)


@cache
def own_text(rows):
    """Transformers' own."""
    ids, mask = ragged_prompts(rows)
    return build("llama").generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=60)


@pytest.mark.covering
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("drafter", ["exact model", "Medusa heads", "early exit"])
def test_shapes_change_between_rounds_in_flight(drafter, rows, ahead, monkeypatch):
    """A draft model that is the target itself is accepted whole after every change, so its cache lacks nothing."""
    exact = lambda runner: specdec.ModelDrafter(runner.model, num_tokens=3)
    make = exact if drafter == "exact model" else lambda runner: DRAFTERS[drafter](runner, noisy_copy("llama"))
    generator = generator_of(make)
    shapes = SHAPES
    limit = generator.drafter.traits.max_depth
    shapes = [shape for shape in shapes if limit is None or shape == PLAIN or shape.tree.max_depth <= limit]
    policies = []
    make_policy = lambda self, request, rule: policies.append(Changing(shapes)) or policies[-1]
    monkeypatch.setattr(specdec.SpeculativeGenerator, "_policy", make_policy)
    ids, mask = ragged_prompts(rows)
    expected = own_text(len(ids))
    for _ in range(2):
        out = generator.generate(ids, mask, max_new_tokens=60)
        assert out.stats.host is None and out.sequences.equal(expected)
        assert policies[-1].finished == ([len(row.emitted) for row in out.stats.rows], out.lengths.tolist())
    require_free(generator)
    if drafter != "exact model":
        return
    for row in out.stats.rows:
        assert len(set(row.shapes)) >= 6
        for name, accepted, depth in list(zip(row.shapes, row.accepted, row.depths, strict=True))[:-1]:
            assert accepted == depth, f"{name} after {row.shapes}"
    pauses = len(policies[-1].entered)
    assert pauses == 4 if rows == 1 else pauses <= 10, "at the start and where plain rounds begin and end"


def test_a_policy_does_not_hear_of_the_end_of_a_call_that_failed(monkeypatch):
    generator = generator_of(lambda runner: specdec.ModelDrafter(runner.model, num_tokens=3))
    policy = Changing([CHAIN(2)])
    monkeypatch.setattr(generator, "_policy", lambda request, rule: policy)
    fails = lambda ids, scores: ids.shape[1] > 12 and 1 / 0
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        generator.generate(ragged_prompts(1)[0], max_new_tokens=60, stopping_criteria=[fails])
    assert policy.finished is None


@pytest.mark.covering
@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("drafter", ["chain", "tree", "Medusa heads", "dynamic tree", "early exit", "synthetic"])
def test_fitted_shapes_are_captured_and_exact(drafter, do_sample, ahead, monkeypatch):
    monkeypatch.setattr(fitted, "LOOK_EVERY", 2)
    generator = generator_of(lambda runner: DRAFTERS[drafter](runner, noisy_copy("llama")), tree="auto")
    shapes = generator.drafter.traits.shapes
    fits, own = generator._automatic, generator.drafter
    monkeypatch.setattr(generator, "_policy", lambda request, rule: fits.fitted(own, shapes, rule, request))
    ids, mask = ragged_prompts(3)
    expected = own_text(len(ids))
    for seed in range(4):
        out = generator.generate(ids, mask, max_new_tokens=60, do_sample=do_sample, seed=seed)
        assert out.stats.host is None and (do_sample or out.sequences.equal(expected))
        assert out.stats.pooled.step_seconds > 0
    (fit,) = fits._fits.values()
    times = fit.times[3]
    assert times.knows(PLAIN) and 2 <= len(times.known) <= fitted.FEW + 2 and fit.last
    require_free(generator)


def test_policies_follow_the_device_and_what_can_be_captured(monkeypatch):
    """A GPU is stood in for by its name."""
    generator = generator_of(lambda runner: DRAFTERS["chain"](runner, noisy_copy("llama")), tree="auto")
    seen = []
    make = automatic.AutomaticShapes.policy
    note = lambda self, *arguments: seen.append(make(self, *arguments)) or seen[-1]
    monkeypatch.setattr(automatic.AutomaticShapes, "policy", note)
    ids, _ = ragged_prompts(1)
    generator.generate(ids, max_new_tokens=4)
    assert type(seen[-1]).__name__ == "AdaptivePolicy" and seen[-1].few_shapes
    assert generator._automatic._kept(generator.drafter, specdec.greedy, ()).file is None
    monkeypatch.setattr(generator._automatic, "_target", Named(generator.target, torch.device("cuda")))
    generator.generate(ids, max_new_tokens=4)
    assert isinstance(seen[-1], FittedPolicy) and seen[-1].max_tokens == 63
    generator.generate(ids, max_new_tokens=4, repetition_penalty=1.2)
    assert isinstance(seen[-1], FittedPolicy) and len(generator._automatic._fits) == 2, "penalties take time"
    kept = generator._automatic._kept(generator.drafter, specdec.greedy, ())
    assert kept.file == default_file() and "LlamaForCausalLM" in kept.key and "greedy" in kept.key
    generator.generate(ids, max_new_tokens=4, output_scores=True)
    assert type(seen[-1]).__name__ == "AdaptivePolicy" and not seen[-1].few_shapes
    candidates = Candidates("own")
    assert FittedPolicy(Fit(), candidates, 1, 5).max_tokens == 5


class Named:
    """A runner on a device of another name."""

    def __init__(self, runner, device):
        self._runner, self.device = runner, device

    def __getattr__(self, name):
        return getattr(self._runner, name)


def test_a_fixed_shape_that_is_a_loss_is_named_once(monkeypatch):
    """A draft model as large as the target that is hardly ever right is a loss anywhere; steps this short are not
    judged unless they have to be."""
    monkeypatch.setattr(loss_watch, "LEAST_STEP", 0.0)
    tree = TokenTree.from_widths((3, 2, 1))
    generator = generator_of(lambda runner: specdec.ModelDrafter(noisy_copy("llama", 3.0), tree=tree))
    ids, mask = ragged_prompts(2)
    with pytest.warns(UserWarning, match=r"tree of 16 nodes at batch 2 takes .*x of plain; use a smaller tree"):
        generator.generate(ids, mask, max_new_tokens=60)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generator.generate(ids, mask, max_new_tokens=60)
        monkeypatch.setattr(loss_watch, "LOSS", 0.0)
        generator.generate(ids[:1], mask[:1], max_new_tokens=60)
