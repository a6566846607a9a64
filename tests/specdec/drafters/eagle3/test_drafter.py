"""EAGLE-3 drafts from features that are never stale: in every round its logits are those of a fresh drafter."""

from dataclasses import replace
from functools import cache

import pytest
import torch

import specdec
from specdec import TokenTree
from specdec.cuda_graph import HostCopy
from specdec.drafters.eagle3.drafter import Eagle3Drafter, Eagle3Steps
from specdec.drafters.feature_state import FeatureState
from specdec.drafters.model import ModelDraftSession
from specdec.drafters.network.parts import over_target
from specdec.drafters.network.rotation import Rotation
from specdec.engine import lane
from specdec.model.features import Features
from specdec.planning.policy import PLAIN, shape_of
from specdec.requests.rows import Rows
from specdec.rounds import captured
from tests.families import build, ragged_prompts
from tests.learned import eagle3, fitted, outputs_of
from tests.matrix import TREE, at_each_run, require_free
from tests.specdec.engine.forced import by_rounds, force, make_room
from tests.specdec.engine.test_engine import PAGE, prompts_of, require_empty
from tests.specdec.generation.test_generators import p_value

SHAPES = {"chain": dict(num_tokens=3), "tree": dict(tree=TREE), "dynamic tree": dict(dynamic=(9, 4, 3))}
COUNT = 24


@cache
def target_model():
    return build("llama")


@cache
def own_text(batch):
    return specdec.AutoregressiveGenerator(target_model(), mode="eager").generate(
        *ragged_prompts(batch, longest=30), max_new_tokens=COUNT
    )


@pytest.fixture
def heard(monkeypatch):
    """Of each proposal, also in each replay of a captured one: texts, lengths, which rows are alive, first logits."""
    given, catch_up = [], FeatureState.catch_up

    def note(state, batch):
        logits, rows, ids = catch_up(state, batch), batch.rows, state.runner.source.ids
        index = torch.arange(rows.size) if batch.index is None else batch.index
        of_all = over_target(logits, ids, target_model().vocab_size) if logits.shape[1] == len(ids) else logits
        at_each_run(lambda: given.append([x.clone() for x in (rows.tokens[index], rows.lengths[index],
                                                               rows.alive[index], of_all)]))  # fmt: skip
        return logits

    monkeypatch.setattr(FeatureState, "catch_up", note)
    return given


def require_fresh(heard, network, texts):
    """All logits are those of `network` over the target's features of the text so far, which is the begin of one of
    `texts`; returns how many were compared."""
    known = [(text, network.target_logits(outputs_of(network, target_model(), text[None])[0])) for text in texts]
    compared = 0
    for tokens, lengths, alive, logits in heard:
        for text, length, lives, ours in zip(tokens, lengths.tolist(), alive.tolist(), logits, strict=True):
            if lives:
                anew = next(x for whole, x in known if whole[:length].equal(text[:length]))
                torch.testing.assert_close(ours, anew[length - 2], atol=1e-4, rtol=0)
                compared += 1
    return compared


def generate(shape, mode, batch=8, **options):
    generator = specdec.SpeculativeGenerator(target_model(), eagle3(target_model(), **SHAPES[shape]), mode=mode)
    out = generator.generate(*ragged_prompts(batch, longest=30), max_new_tokens=COUNT, **options)
    require_free(generator)
    return out


def texts_of(out, batch=8):
    mask = ragged_prompts(batch, longest=30)[1]
    return [row[30 - int(given.sum()) :] for row, given in zip(out.sequences, mask, strict=True)]


@pytest.mark.covering
@pytest.mark.parametrize("mode", ["eager", "graph", "compile"])
@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_text_and_every_rounds_logits(shape, mode, heard):
    """The text is the target's own; ragged rows accept some drafts and reject others wholly."""
    out = generate(shape, mode)
    assert out.sequences.equal(own_text(8).sequences)
    assert 0 < out.stats.pooled.acceptance_rate < 1
    counted = sum(proposed > 0 for row in out.stats.rows for proposed in row.proposed)
    assert require_fresh(heard, fitted(target_model()), texts_of(out)) >= counted > 40
    alone = generate(shape, mode, 1)
    assert alone.sequences.equal(own_text(1).sequences)


def test_prompts_in_chunks(heard, monkeypatch):
    """Of long prompts the drafter gets the features chunk by chunk, before the first round."""
    monkeypatch.setattr(specdec.ModelRunner, "PREFILL_CHUNK", 7)
    monkeypatch.setattr(specdec.ModelRunner, "PREFILL_TOKENS", 20)
    out = generate("chain", "eager")
    assert out.sequences.equal(own_text(8).sequences)
    assert require_fresh(heard, fitted(target_model()), texts_of(out)) > 40


def engine_of(shape, mode, pages=200, **options):
    runner = specdec.ModelRunner(target_model(), page_size=PAGE, mode=mode)
    drafter = eagle3(target_model(), **SHAPES[shape])
    drafter.validate(runner)
    memory = pages * (runner.page_format.bytes + drafter.runner.page_format.bytes)
    return specdec.Engine(runner, drafter, memory=memory, **{"max_tokens_per_step": 48, "tree": None} | options)


@pytest.fixture(params=[1, 2], ids=["read at once", "read one round late"])
def in_flight(request, monkeypatch):
    monkeypatch.setattr(lane, "rounds_in_flight", lambda rows: request.param)
    monkeypatch.setattr(captured, "HostCopy", lambda outcome: HostCopy(outcome.clone()))
    return request.param


@pytest.mark.covering
@pytest.mark.parametrize(("pages", "in_flight"), [(200, 1), (36, 2)], indirect=["in_flight"])
@pytest.mark.parametrize("shape", SHAPES)
def test_an_engines_captured_rounds(shape, pages, heard, in_flight):
    """Texts that begin alike share blocks of both caches; with few pages some are computed again."""
    engine, prompts = engine_of(shape, "graph", pages), prompts_of(10)
    handles = [engine.submit(prompt, max_new_tokens=16, eos_token_id=[]) for prompt in prompts]
    while not engine.idle:
        engine.step()
        assert all(group.captures for group in engine._groups)
    texts = require_texts(handles)
    assert require_fresh(heard, fitted(target_model()), texts) > 60
    assert engine.stats()["saved_tokens"] > 0 and engine._groups._captured._rounds.count > 0
    assert pages == 200 or sum(handle.preemptions for handle in handles) > 0
    require_empty(engine)


def test_prompts_that_still_run_keep_their_steps_when_rounds_of_others_stop(heard, in_flight):
    """A text too short for captured rounds stops those of another row, while a third one's prompt runs in chunks."""
    model = fitted(target_model())
    runner = specdec.ModelRunner(target_model(), page_size=PAGE, mode="graph")
    engine = specdec.Engine(runner, Eagle3Drafter(model, 5), tree=None, max_tokens_per_step=16, memory=1 << 20)
    long, short = [(5 + 7 * place) % 90 + 5 for place in range(17)], [7, 9]
    submit = lambda prompt: engine.submit(prompt, max_new_tokens=COUNT, eos_token_id=[])
    handles = [submit(long[:12][::-1])]
    for _ in range(3):
        engine.step()
    handles += [submit(short), submit(long)]
    list(engine.run())
    handles.append(submit([*long, 11, 12, 13]))  # takes over blocks of the one in chunks
    list(engine.run())
    assert engine.stats()["saved_tokens"] > 0
    assert require_fresh(heard, model, require_texts(handles)) > 20
    require_empty(engine)


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_two_drafters_read_the_features_of_one_text(mode, heard):
    model = fitted(target_model())
    both = specdec.MergedDrafter(*(Eagle3Drafter(model, length, sample=False) for length in (3, 2)))
    out = specdec.SpeculativeGenerator(target_model(), both, mode=mode).generate(
        *ragged_prompts(8, longest=30), max_new_tokens=COUNT
    )
    assert out.sequences.equal(own_text(8).sequences)
    assert require_fresh(heard, model, texts_of(out)) > 80


@pytest.mark.covering
@pytest.mark.parametrize("shape", ["chain", "tree"])
def test_captured_rounds_with_and_without_drafts(shape, heard, in_flight):
    """Lengths 3, 0, 0, 0, 3 of captured rounds, and requests that make room between them."""
    engine, prompts = engine_of(shape, "graph", tree="auto"), prompts_of(4)
    its, rounds = engine.drafter.traits.tree, []
    length, choose = by_rounds(engine, lambda handle: (0, 3, 0, 0, 0, 3), lambda handle: shape_of(its))
    turns = iter([3, 0, 0, 0, 3, 3, 0] * 20)

    def chosen(row, shapes):
        if row is not None:
            return choose(row, shapes)
        rounds.append(next(turns))
        return PLAIN if rounds[-1] == 0 else shape_of(its)

    force(engine, chosen)
    handles = [engine.submit(prompt, max_new_tokens=COUNT, eos_token_id=[]) for prompt in prompts]
    while not engine.idle:
        engine.step()
        assert all(group.captures for group in engine._groups)
        if len(rounds) == 12:
            make_room(engine, engine._scheduler.running[0])
    assert require_fresh(heard, fitted(target_model()), require_texts(handles)) > 20 and {0, 3} == {*rounds}
    require_empty(engine)


def require_texts(handles):
    """Each request got the target's own text -> the texts."""
    for handle in handles:
        assert handle.error is None
        ids = torch.tensor([[*handle.prompt]])
        own = plain().generate(ids, max_new_tokens=len(handle.tokens), eos_token_id=[]).sequences
        assert own[0, ids.shape[1] :].tolist() == handle.tokens
    return [torch.tensor([*handle.prompt, *handle.tokens]) for handle in handles]


@cache
def plain():
    return specdec.AutoregressiveGenerator(target_model(), mode="eager")


def stale(monkeypatch):
    """Accepted nodes keep the steps that were drafted."""
    truncate = FeatureState.truncate

    def keeps(state, rows, lengths):
        truncate(state, rows, [max(length, row.length - 1) for row, length in zip(rows, lengths, strict=True)])

    monkeypatch.setattr(FeatureState, "truncate", keeps)


def another_layer(monkeypatch):
    """The features are those of the layers before."""
    right = Eagle3Steps.traits.fget
    before = lambda features: Features(tuple(max(0, layer - 1) for layer in features.layers), "prompt")
    off = lambda steps: replace(right(steps), features=before(right(steps).features))
    monkeypatch.setattr(Eagle3Steps, "traits", property(off))


def another_token(monkeypatch):
    """Rounds keep the features of the tokens before."""
    keep = Rows.keep_features
    monkeypatch.setattr(Rows, "keep_features", lambda rows, x, *others: keep(rows, x.roll(1, 1), *others))


@pytest.mark.parametrize("plant", [stale, another_layer, another_token])
def test_planted_bugs_are_caught(plant, heard, monkeypatch):
    plant(monkeypatch)
    out = generate("chain", "eager")
    assert out.sequences.equal(own_text(8).sequences), "the text is the target's own, whatever is drafted"
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        require_fresh(heard, fitted(target_model()), texts_of(out))


SAMPLING = {"1": dict(temperature=1.0), "0.7": dict(temperature=0.7), "top-p": dict(temperature=0.9, top_p=0.9)}
DRAWN = {"chain": dict(num_tokens=2), "tree": dict(tree=TokenTree((None, 0, 0, 1)))}
drafted = lambda shape: lambda target, draft: eagle3(target, **DRAWN[shape])


@pytest.mark.covering
@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("shape", DRAWN)
def test_drawn_children_keep_the_targets_distribution(shape, sampling):
    assert p_value(drafter=drafted(shape), layers=2, rows=2000, calls=1, mode="eager", **SAMPLING[sampling]) > 1e-3


@pytest.mark.parametrize("shape", DRAWN)
def test_a_distribution_without_the_vocabulary_map_is_caught(shape, monkeypatch):
    """q by the drafter's own ids, as if they were the target's."""
    draft = ModelDraftSession._draft

    def unmapped(session, batch, tree):
        made, tokens = draft(session, batch, tree), session.states[0].runner.source.network.draft_tokens
        q = torch.zeros_like(made.probs)
        q[..., : len(tokens)] = made.probs[..., tokens]
        made.probs.copy_(q)
        return made

    monkeypatch.setattr(ModelDraftSession, "_draft", unmapped)
    assert p_value(drafter=drafted(shape), layers=2, rows=2000, calls=1, mode="eager") < 1e-6


def test_tokens_outside_the_draft_vocabulary_have_no_probability():
    network = fitted(target_model())
    logits = network.target_logits(torch.randn(4, network.config.hidden_size))
    outside = torch.ones(97, dtype=torch.bool).index_fill(0, network.draft_tokens, False)
    assert outside.sum() == 12 and (logits.softmax(-1)[:, outside] == 0).all()


def test_drafters_that_do_not_fit_are_refused():
    network, runner = fitted(target_model()), specdec.ModelRunner(target_model())
    with pytest.raises(ValueError, match="depth 5"):
        specdec.SpeculativeGenerator(runner, Eagle3Drafter(network, 3), tree=TokenTree.chain(5))
    with pytest.raises(ValueError, match="either a tree or dynamic trees"):
        Eagle3Drafter(network, tree=TREE, dynamic=(9, 4, 3))
    with pytest.raises(ValueError, match="give 12 nodes to choose 40 from"):
        Eagle3Drafter(network, dynamic=(40, 2, 3))
    with pytest.raises(ValueError, match="same features"):
        specdec.MergedDrafter(Eagle3Drafter(network), MedusaLike())


class MedusaLike:
    traits = specdec.DrafterTraits(2, features=Features())

    def validate(self, target):
        """Fit."""

    def start(self, rows, max_tokens):
        """Never."""


def test_rows_too_long_for_the_rotation_go_on_in_plain_steps(heard):
    """A rotation that changes with the length of a text drafts up to there."""
    scaled = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    network = fitted(target_model(), rotation=Rotation(12, scaled, max_positions=36))
    for mode in ("eager", "graph"):
        heard.clear()
        generator = specdec.SpeculativeGenerator(target_model(), Eagle3Drafter(network, 3), mode=mode)
        out = generator.generate(*ragged_prompts(8, longest=30), max_new_tokens=COUNT)
        assert generator.drafter.traits.max_length == 36 and out.sequences.equal(own_text(8).sequences)
        short = [[x[row] for x in one] for one in heard for row, length in enumerate(one[1]) if length <= 36]
        assert require_fresh([[x[None] for x in one] for one in short], network, texts_of(out)) > 30


def test_pages_of_eight_bits():
    """Of both caches: the text is that of the target over such pages."""
    runner = specdec.ModelRunner(target_model(), kv_dtype="int8", mode="eager")
    plain = specdec.AutoregressiveGenerator(runner).generate(*ragged_prompts(4), max_new_tokens=12)
    drafter = Eagle3Drafter(fitted(target_model()), tree=TREE, kv_dtype="int8")
    out = specdec.SpeculativeGenerator(runner, drafter).generate(*ragged_prompts(4), max_new_tokens=12)
    assert drafter.runner.cache.kv_dtype == "int8" and out.sequences.equal(plain.sequences)


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_auto_chooses_among_the_drafters_shapes(mode):
    generator = specdec.SpeculativeGenerator(target_model(), eagle3(target_model(), tree=TREE), tree="auto", mode=mode)
    for _ in range(2):
        out = generator.generate(*ragged_prompts(8, longest=30), max_new_tokens=COUNT)
        assert out.sequences.equal(own_text(8).sequences)
    require_free(generator)
