"""Random calls on engines with little memory: queues and pages fit together after each, and texts are those alone."""

from functools import cache

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import specdec
from specdec.drafters.base import runners_of
from tests.specdec.engine.forced import at_random, force
from tests.specdec.engine.test_engine import KINDS, PAGE, drafter_of, model_of, prompts_of, require_empty, solo

NAMES = ("none", "chain", "tree", "early exit", "dynamic tree")
PROMPTS = tuple(tuple(prompt) for prompt in prompts_of(5, seed=3, shared=8))
COUNT, PAGES = 14, 11  # new tokens; of each cache: two requests begin and do not both end in them


@cache
def alone(name, prompt, kind, seed, shapes=None):
    """What a request gets alone, in rounds of these shapes; greedy texts do not depend on the drafter."""
    options = {"max_new_tokens": COUNT, "seed": seed, "shapes": shapes} | KINDS[kind]
    return solo(name if options.get("do_sample") else "none", list(PROMPTS[prompt]), options)


def misbehave(engine, how):
    """A callback that uses the engine, or raises, at its request's third token or later."""

    def callback(handle, new_tokens):
        if len(handle.tokens) > 2:
            if "cancel" in how:
                engine.cancel(handle)
            if "others" in how:
                for other in [*engine._handles.values()][:2]:
                    engine.cancel(other)
            if "step" in how:
                with pytest.raises(RuntimeError, match="a callback cannot run"):
                    engine.step()
            if "raise" in how:
                raise LookupError(how)
        new_tokens.clear()

    return callback


class Watch:
    """A stopping criterion that sees texts of its own request alone, each token once, and stops none."""

    def __init__(self, prompt):
        self.prompt, self.lengths = prompt, []

    def __call__(self, input_ids, scores):
        assert input_ids[0, : len(self.prompt)].tolist() == self.prompt, "a criterion of another row was called"
        self.lengths.append(input_ids.shape[1] - len(self.prompt))
        return False


def require_consistent(engine):
    """Queues, groups, rows, their slots and the pages of all caches tell of the same requests."""
    waiting, running = engine._scheduler.waiting, engine._scheduler.running
    assert sorted(map(id, [*waiting, *running])) == sorted(map(id, engine._handles.values()))
    assert waiting == sorted(waiting, key=lambda one: (-one.priority, one.arrival))
    assert all(one.row is None and not one.finished for one in waiting)
    assert all(one.row is not None and not one.row.ended and not one.finished for one in running)
    groups = list(engine._groups)
    members = [row for group in groups for row in group.call.rows.members]
    assert {*map(id, members)} == {id(one.row) for one in running} and len(members) == len(running)
    for group in groups:
        rows = group.call.rows
        awake = [row for row in rows.members if row not in group._asleep]
        assert rows.alive.nonzero()[:, 0].tolist() == sorted(row.slot for row in awake)
        assert {*group._records} == {*group._handles} == {*rows.members}
        for row in rows.members:
            handle = group.handle(row)
            text = [*handle.prompt, *handle.tokens]
            assert row.length == len(text) == int(rows.lengths[row.slot])
            assert rows.tokens[row.slot, : len(text)].tolist() == text
            assert int(rows.rounds[row.slot]) == len(handle.record.emitted)
    for i, held in enumerate(engine._memory.caches):
        owners = (
            [one.row.sequence for one in running]
            if i == 0
            else [
                state._sequences[row] for group in groups for state in group.states for row in group.call.rows.members
            ]
        )
        assert sorted(owners) == sorted(held.sequences)
        held.table.check_integrity()
    for index in engine._prefixes.indexes:
        index.check_integrity()
    assert {*engine._prefixes._keys} <= {*engine._handles.values()}


REQUEST = st.tuples(
    st.integers(0, len(PROMPTS) - 1), st.integers(0, len(KINDS) - 1), st.sampled_from([0, 1, None]),
    st.sampled_from([0, 0, 0, 1]),
)  # fmt: skip
HOW = st.sampled_from([None, None, None, "step", "cancel", "raise", "cancel raise", "cancel others raise"])


class Requests(RuleBasedStateMachine):
    """Submits, steps, cancels, finishes and closes."""

    def __init__(self):
        super().__init__()
        self.given, self.watches, self.engine = [], [], None

    @initialize(
        name=st.sampled_from(NAMES), tokens=st.sampled_from([12, 64]), rows=st.sampled_from([2, 64]),
        shapes=st.sampled_from([None, 0, 1]),
    )  # fmt: skip
    def start(self, name, tokens, rows, shapes):
        self.name, self.options, self.shapes = name, {"max_tokens_per_step": tokens, "max_rows": rows}, shapes
        self.target = specdec.ModelRunner(model_of(), page_size=PAGE, mode="eager")
        self.drafter = drafter_of(name, model_of())
        self.open()

    def open(self):
        own = [one for one in runners_of(self.drafter) if self.name != "early exit"]
        memory = PAGES * sum(one.page_format.bytes for one in (self.target, *own))
        tree = None if self.shapes is None else "auto"
        self.engine = specdec.Engine(self.target, self.drafter, memory=memory, tree=tree, **self.options)
        force(self.engine, at_random(self.shapes))
        assert self.engine._memory.caches[0].num_pages == PAGES

    @rule(requests=st.lists(REQUEST, min_size=1, max_size=4), how=HOW)
    def submit(self, requests, how):
        for prompt, kind, seed, priority in requests:
            callback = misbehave(self.engine, how) if how else None
            watch = Watch(list(PROMPTS[prompt]))
            criteria = [watch] if seed == 1 else []
            handle = self.engine.submit(watch.prompt, callback=callback, priority=priority, stopping_criteria=criteria,
                                        **{"max_new_tokens": COUNT, "seed": seed} | KINDS[kind])  # fmt: skip
            self.given.append((handle, prompt, kind, seed, how))
            self.watches.append(watch)
            how = None

    @rule(count=st.sampled_from([1, 1, 2, 5]))
    def step(self, count):
        for _ in range(count):
            self.engine.step()
            require_consistent(self.engine)

    @precondition(lambda self: self.given)
    @rule(which=st.integers(0, 99))
    def cancel(self, which):
        self.engine.cancel(self.given[which % len(self.given)][0])

    @rule()
    def finish(self):
        list(self.engine.run())
        require_empty(self.engine)

    @rule()
    def close(self):
        self.engine.close()
        assert all(handle.finished for handle, *_ in self.given)
        self.open()

    @invariant()
    def consistent(self):
        if self.engine is not None:
            require_consistent(self.engine)

    def teardown(self):
        if self.engine is None:
            return
        for _ in range(400):
            if self.engine.idle:
                break
            self.engine.step()
            require_consistent(self.engine)
        require_empty(self.engine)
        for handle, prompt, kind, seed, how in self.given:
            assert handle.error is None if how is None else isinstance(handle.error, LookupError | None)
            assert handle.error is not None or handle.reason != "error"
            assert handle.reason in ("cancelled", "end", "length") or "raise" in (how or "")
            if seed is not None or not KINDS[kind].get("do_sample"):
                shapes = None if self.shapes is None or self.name == "none" else tuple(handle.shapes)
                text = alone(self.name, prompt, kind, seed or 0, shapes if KINDS[kind].get("do_sample") else None)
                done = handle.reason in ("end", "length")
                assert handle.tokens == (text if done else text[: len(handle.tokens)]), (prompt, kind, seed)
        for watch, (handle, _, _, seed, _) in zip(self.watches, self.given, strict=True):
            assert watch.lengths == ([*range(1, len(handle.tokens) + 1)] if seed == 1 else [])
        self.require_blocks_hold_their_texts()
        self.engine.close()

    def require_blocks_hold_their_texts(self):
        """Texts so far, given as prompts, go on as they did: their blocks are those that finished requests left."""
        for handle, prompt, kind, *_ in self.given[:12]:
            if kind == 0 and handle.tokens:
                again = self.engine.submit([*PROMPTS[prompt], *handle.tokens], max_new_tokens=1)
                list(self.engine.run())
                text = alone(self.name, prompt, kind, 0)
                assert again.error is None and len(again.tokens) == 1
                assert again.tokens == text[len(handle.tokens) :][:1] or len(handle.tokens) == len(text)


TestRequests = Requests.TestCase
TestRequests.settings = settings(
    max_examples=25, stateful_step_count=12, derandomize=True, deadline=None, database=None, phases=(Phase.generate,)
)
