"""Rounds without a draft keep drafters in step: what comes after them is what a drafter built anew would draft."""

from collections import defaultdict
from functools import cache

import pytest
import torch

import medusa
import specdec
from specdec import Draft, TokenTree
from specdec.drafters.base import runners_of, take_in
from specdec.drafters.block.growth import Growth
from specdec.drafters.lookup import find_matches
from specdec.planning.policy import DRAFTERS_OWN, PLAIN, shape_of
from specdec.requests.batch import Batch
from specdec.requests.request import build_request
from specdec.requests.rows import Rows
from tests.families import noisy_copy
from tests.learned import dspark, eagle3
from tests.matrix import DRAFTERS, early_exit, model_of, random_heads
from tests.specdec.engine import test_engine
from tests.specdec.engine.forced import by_rounds, force, make_room
from tests.specdec.engine.test_engine import PAGE, prompts_of, require_empty, solo_generator

CHAIN, TREE = TokenTree.chain(3), TokenTree((None, 0, 0, 1, 3))
TREES = ("chain", "tree", "most likely tree", "early exit, tree", "Medusa heads", "EAGLE-3")  # that have room for TREE
OF_THREE = {  # drafters that choose their shape, or end early, made so that they draft three levels
    "confident chain": lambda target, draft: specdec.ModelDrafter(draft, 4, confidence=1e-9),
    "dynamic tree": lambda target, draft: specdec.DynamicTreeDrafter(draft, 10, depth=3, width=2),
    "EAGLE-3, dynamic tree": lambda target, draft: eagle3(target, dynamic=(10, 3, 2)),
    "DSpark, best-first tree": lambda target, draft: dspark(target, growth=Growth(10, 3, children=2)),
    "prompt lookup": lambda target, draft: specdec.PromptLookupDrafter(3, 2),
    "suffix": lambda target, draft: specdec.SuffixDrafter(3, factor=3.0),
    "suffix tree": lambda target, draft: specdec.SuffixDrafter(7, max_match=1, factor=3.0, tree=True),
    "merged trees": lambda target, draft: specdec.MergedDrafter(
        specdec.DynamicTreeDrafter(draft, 10, 3, 2), specdec.PromptLookupDrafter(3, 2)
    ),
    "merged chains": lambda target, draft: specdec.MergedDrafter(
        specdec.PromptLookupDrafter(3, 1), specdec.ModelDrafter(draft, 3, sample=False)
    ),
    "merged with heads": lambda target, draft: specdec.MergedDrafter(
        medusa.MedusaDrafter(random_heads(model_of(target), 3)), early_exit(target, 0.7, num_tokens=3, sample=False)
    ),
}
LOOKUPS = "prompt lookup", "suffix", "suffix tree"  # which may find fewer levels
GAPS = {
    "the planner says none": ((3, 0, 0, 0, 3), (3, 0, 3)),
    "none found": ((3, None, 3), (3, None, None, 3)),
    "made room": ((3, 0, 3), (3, 3, 0, 0)),
}
SETTINGS = (dict(eos_token_id=[]), dict(eos_token_id=[], do_sample=True, temperature=0.8))
COUNT = 20


@pytest.fixture
def of_three(monkeypatch):
    """All drafters have up to three levels, and share one draft model, which takes long to make."""
    monkeypatch.setattr(test_engine, "DRAFTERS", DRAFTERS | OF_THREE)
    monkeypatch.setattr(test_engine, "noisy_copy", cache(noisy_copy))


def sessions_of(session):
    """A session, or those that it merges."""
    return getattr(session, "_sessions", [session])


def listen(session, heard):
    """Let `heard` take the logits of each first forward of `session`'s draft models, and all of its heads: of rows.

    Returns the hooks of heads, which outlive a session."""
    hooks = []
    for one in sessions_of(session):
        for state in one.states:
            catch_up = state.catch_up
            state.catch_up = lambda batch, run=catch_up: heard.append(run(batch)) or heard[-1]
        heads = next(iter(getattr(one.propose, "args", ())), None)
        if isinstance(heads, torch.nn.Module):
            hear = lambda module, given, logits: heard.append(logits.transpose(0, 1))
            hooks.append(heads.register_forward_hook(hear))
    return hooks


@cache
def another_runner(model):
    """A runner of the target beside that of an engine or a generator."""
    runner = specdec.ModelRunner(model, page_size=PAGE, mode="eager")
    runner.reserve([400])
    return runner


@cache
def another_drafter(name, model):
    """A drafter beside that of an engine or a generator, which keeps nothing between its sessions."""
    return test_engine.drafter_of(name, model)


def drafted_anew(target, name, batch, places, tree, settings):
    """Of each text in `places` of a batch: draft and logits, as in `listen`, of a new session of another drafter."""
    rows, made, target = batch.rows, {}, another_runner(target.model)
    drafter = another_drafter(name, target.model)
    assert all(runner._own.held is None or runner._own.held.sequences == () for runner in runners_of(drafter))
    for place in places:
        row, heard = batch.members[place], []
        text = rows.tokens[row.slot, : row.length]
        ids = text[None]
        request = build_request(target, ids, torch.ones_like(ids), max_new_tokens=row.limit - row.length, **settings)
        fresh = Rows.of(target, request, 64)
        (mine,) = fresh.members
        mine.sequence, fresh.feature_room = target.cache.add(), drafter.traits.feature_room
        fresh.keys[0] = rows.keys[row.slot]
        session = drafter.start(fresh, drafter.traits.max_tokens)
        hooks = listen(session, heard)
        if drafter.traits.features is not None:
            out = target.forward([mine.sequence], text[:-1], [len(text) - 1], features=drafter.traits.features)
            fresh.keep_features(out.features[None], None)
            # the last step has to run in the proposal, which wants its logits
            take_in(session, fresh, [mine], [out.features])
        made[place] = session.propose(Batch(fresh, [mine]), tree), list(heard)
        for hook in hooks:
            hook.remove()
        session.release([mine])
        target.cache.free(mine.sequence)
    return made


def compare_drafts(session, target, name, settings, length, note):
    """Let each draft of `session` be compared with those of drafters built anew.

    note: called with each row that was compared, and the levels of its draft.
    length: of a row's draft in this round; where that is None, the session finds none, and where it is 0, nothing is
        compared."""
    propose, heard = session.propose, []
    listen(session, heard)

    def compare(batch, tree):
        lengths = [length(row) for row in batch.members]
        if None in lengths:
            assert {*lengths} == {None}
            return Draft(TokenTree.chain(0), batch.last_tokens())
        heard.clear()
        draft, places = propose(batch, tree), [place for place, one in enumerate(lengths) if one]
        logits = list(heard)
        for a, (fresh, theirs) in drafted_anew(target, name, batch, places, tree, settings).items():
            assert len(logits) == len(theirs)
            for ours, anew in zip(logits, theirs, strict=True):
                torch.testing.assert_close(ours[a], anew[0], atol=1e-4, rtol=0)
            require_equal_drafts(draft, a, fresh)
            note(batch.members[a], deepest(draft, a))
        return draft

    object.__setattr__(session, "propose", compare)


def require_equal_drafts(draft, a, fresh):
    """Row `a` of a draft, which may be wider for the sake of other rows, is the one row of `fresh`."""
    count, (ours, theirs) = fresh.tokens.shape[1], (existing(draft)[a], existing(fresh)[0])
    assert ours.nonzero().equal(theirs.nonzero())
    assert draft.tokens[a, :count][theirs].equal(fresh.tokens[0][theirs])
    if fresh.probs is not None:
        torch.testing.assert_close(draft.probs[a, : fresh.probs.shape[1]], fresh.probs[0], atol=1e-4, rtol=0)


def existing(draft):
    """Which nodes `[A, N]` of a draft exist."""
    if draft.tree.static is None:
        return (draft.tree.parents >= 0) | (torch.arange(draft.tree.size) == 0)
    return torch.ones_like(draft.tokens, dtype=torch.bool) if draft.valid is None else draft.valid


def deepest(draft, a):
    """Levels of row `a`'s draft."""
    if draft.tree.static is None:
        level, parents = [0] * draft.tree.size, draft.tree.parents[a].tolist()
        for node, parent in enumerate(parents[1:], 1):
            level[node] = level[parent] + 1 if parent >= 0 else 0
        return max(level)
    return max(d for d, there in zip(draft.tree.depths, existing(draft)[a].tolist(), strict=True) if there)


@cache
def alone(name, prompt, sampled, shapes):
    """What a request gets alone: a greedy one without a drafter, a sampled one in rounds of these shapes."""
    model, generator = test_engine.model_of(), solo_generator("none")
    if sampled:
        generator = specdec.SpeculativeGenerator(model, test_engine.drafter_of(name, model), mode="eager")
    options = dict(max_new_tokens=COUNT, seed=1, shapes=shapes if sampled else None)
    return (
        generator.generate(torch.tensor([prompt]), **options, **SETTINGS[sampled]).sequences[0, len(prompt) :].tolist()
    )


def shapes_of(name):
    """The shapes of three levels that a drafter can have: a chain, and a tree if it drafts any; or its own."""
    drafter = test_engine.DRAFTERS[name](test_engine.model_of(), noisy_copy("llama"))
    if drafter.traits.shapes in ("own", "grown"):
        assert name in OF_THREE and drafter.traits.own_depth == 3
        return [DRAFTERS_OWN]
    assert drafter.traits.max_tokens >= 3
    return [shape_of(CHAIN), *([shape_of(TREE)] if name in TREES else [])]


@pytest.mark.covering(cases=9)
@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("name", DRAFTERS)
def test_drafts_after_a_gap_are_those_of_a_drafter_built_anew(name, gap, of_three):
    """Two greedy texts and a sampled one together, of which each drafts 3, 0, 0, 0, 3, say, over and over.

    Where a drafter takes any shape, one draws chains and another one trees."""
    engine, compared = test_engine.engine_of(name, tree="auto", pages=400), []
    features, start = engine.drafter.traits.features, engine.drafter.start
    reads, waits = features is not None, features is not None and features.tokens == "last"
    patterns = [(0, *pattern) if reads else pattern for pattern in GAPS[gap]]  # the first round gives features
    lengths_of, threes = lambda handle: patterns[handle.arrival % 2], shapes_of(name)
    three_of = lambda handle: threes[-1 if handle is None else handle.arrival % len(threes)]
    length, choose = by_rounds(engine, lengths_of, three_of)
    force(engine, choose)

    def started(rows, max_tokens):
        session = start(rows, max_tokens)
        note = lambda row, levels: compared.append((engine._groups.holding(row).handle(row), levels))
        compare_drafts(session, engine.target, name, SETTINGS[rows.do_sample], length, note)
        return session

    engine.drafter.start = started
    texts = [prompts_of(1, seed=seed)[0] for seed in range(3)]
    given = [(text + text[:3], i // 2) for i, text in enumerate(texts)]
    handles = [engine.submit(text, max_new_tokens=COUNT, seed=1, **SETTINGS[sampled]) for text, sampled in given]
    preempted = set()
    while not engine.idle:
        engine.step()
        for handle in [one for one in engine._scheduler.running if gap == "made room" and one.tokens]:
            at, pattern = len(handle.shapes), lengths_of(handle)
            due = pattern[(at - 1) % len(pattern)] == 3 and not (waits and pattern[at % len(pattern)])
            if due and (handle, at) not in preempted:
                preempted.add((handle, at))
                make_room(engine, handle)
    for handle, (prompt, sampled) in zip(handles, given, strict=True):
        assert handle.error is None
        require_lengths(handle, lengths_of(handle), name, compared)
        assert gap != "made room" or handle.preemptions > 1
        assert handle.tokens == alone(name, tuple(prompt), sampled, tuple(handle.shapes))
    require_empty(engine)


def require_lengths(handle, lengths, name, compared):
    """Each round of a request had a draft of 3 levels or none, as `lengths` say, and was compared with a new one."""
    drafted = [lengths[i % len(lengths)] for i in range(len(handle.shapes))]
    levels = [levels for of, levels in compared if of is handle]
    assert len(levels) == drafted.count(3) > 1 and {0, None} & {*drafted}
    assert [shape.name == "plain" for shape in handle.shapes] == [wanted != 3 for wanted in drafted]
    assert {*levels} == {3} or name in LOOKUPS and max(levels) == 3


@pytest.mark.parametrize("name", DRAFTERS)
def test_a_generator_replays_gaps_with_drafts_of_a_drafter_built_anew(name, of_three):
    """3, 0, 0, 0, 3 drafted tokens, greedy and sampled."""
    model, threes, noted = test_engine.model_of(), shapes_of(name), []
    (prompt,) = prompts_of(1)
    for sampled, three in ((0, threes[0]), (1, threes[-1])):
        generator = specdec.SpeculativeGenerator(model, test_engine.drafter_of(name, model), mode="eager")
        reads, start = generator.drafter.traits.features is not None, generator.drafter.start
        shapes = [PLAIN] * reads + [three, PLAIN, PLAIN, PLAIN, three, PLAIN, three]

        def started(rows, max_tokens, start=start, target=generator.target, sampled=sampled):
            session = start(rows, max_tokens)
            note = lambda row, levels: noted.append(levels)
            compare_drafts(session, target, name, SETTINGS[sampled], lambda row: 3, note)
            return session

        generator.drafter.start = started
        options = dict(max_new_tokens=COUNT, seed=1, shapes=shapes)
        out = generator.generate(torch.tensor([prompt + prompt[:3]]), **options, **SETTINGS[sampled])
        ran = out.stats.rows[0].shapes[: len(shapes)]
        assert list(ran) == [shape.name for shape in shapes]
        if not sampled:
            assert out.sequences[0, len(prompt) + 3 :].tolist() == alone(name, (*prompt, *prompt[:3]), 0, None)
    assert len(noted) == 6 and (max(noted) == 3 if name in LOOKUPS else {*noted} == {3})


@pytest.mark.parametrize("name", ["prompt lookup", "merged trees", "merged chains"])
def test_a_lookup_that_finds_none_between_two_drafts(name, of_three):
    """In texts as they come a lookup finds three tokens, then none, then three: drafts are those of a new drafter."""
    engine, found, gaps = test_engine.engine_of(name, pages=400), defaultdict(list), []
    start, prompts = engine.drafter.start, prompts_of(24, seed=5, shared=30)

    def length(row):
        """3 where a lookup finds that many tokens, and found none in the round before and three before that; else 0."""
        handle = engine._groups.holding(row).handle(row)
        text = torch.tensor([[*handle.prompt, *handle.tokens]])
        ends, there = find_matches(text, torch.tensor([[row.length]]), 1, 3, 1)
        found[row].append(min(3, row.length - 1 - int(ends[0, 0])) if there[0, 0] else 0)
        return 3 if found[row][-3:] == [3, 0, 3] else 0

    def started(rows, max_tokens):
        session = start(rows, max_tokens)
        compare_drafts(session, engine.target, name, SETTINGS[0], length, lambda row, levels: gaps.append(levels))
        return session

    engine.drafter.start = started
    handles = [engine.submit(prompt, max_new_tokens=COUNT, **SETTINGS[0]) for prompt in prompts]
    list(engine.run())
    assert len(gaps) > (2 if name == "prompt lookup" else 0) and {*gaps} == {3}
    for handle in handles:
        assert handle.error is None and handle.tokens == alone(name, tuple(handle.prompt), 0, None)


def test_a_request_that_fails_while_it_is_drafted_for_fails_alone():
    """Its processor raises before its first round has been recorded; the planner learns nothing from that."""
    engine, prompts = test_engine.engine_of("chain", tree="auto"), prompts_of(2)
    force(engine, lambda row, shapes: shapes[0])
    good = engine.submit(prompts[0], max_new_tokens=12)
    bad = engine.submit(prompts[1], max_new_tokens=12, logits_processor=[test_engine.Own(limit=1)])
    assert {*engine.run()} == {good, bad}
    assert bad.reason == "error" and "enough" in str(bad.error) and bad.tokens == []
    assert good.error is None and good.tokens == test_engine.solo("chain", prompts[0], {"max_new_tokens": 12})
    require_empty(engine)
