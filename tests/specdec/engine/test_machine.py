"""Random calls on engines with little memory: queues and pages fit together after each, and texts are those alone."""

from collections import Counter
from dataclasses import dataclass
from functools import cache

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import specdec
from specdec.drafters.base import runners_of
from specdec.engine.handle import Handle
from tests.specdec.engine.forced import at_random, force
from tests.specdec.engine.test_engine import KINDS, PAGE, drafter_of, model_of, prompts_of, require_empty, solo

NAMES = ("none", "chain", "tree", "early exit", "dynamic tree")
PROMPTS = tuple(tuple(prompt) for prompt in prompts_of(5, seed=3, shared=8))
COUNT, PAGES = 14, 11  # new tokens; of each cache: two requests begin and do not both end in them


@cache
def alone(name, prompt, kind, seed, count, shapes=None):
    """What a request gets alone, in rounds of these shapes; greedy texts do not depend on the drafter."""
    options = {"max_new_tokens": count, "seed": seed, "shapes": shapes} | KINDS[kind] | {"max_new_tokens": count}
    return solo(name if options.get("do_sample") else "none", list(prompt), options)


@dataclass(frozen=True)
class Given:
    """A request: its handle and prompt, which of `KINDS`, its seed and number of new tokens, and how its callback
    misbehaves.
    """

    handle: Handle
    prompt: tuple[int, ...]
    kind: int
    seed: int | None
    count: int
    how: str | None = None

    @property
    def samples(self):
        return bool(KINDS[self.kind].get("do_sample"))


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
    for i, held in enumerate(engine._memory.caches):
        owners = (
            [one.row.sequence for one in running]
            if i == 0
            else [
                state.prefix_sequence(row)
                for group in groups
                for state in group.states
                for row in group.call.rows.members
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
    """Submits, forks, steps with and without room, cancels, finishes and closes."""

    counts = Counter[str]()  # of what has happened, in all examples

    def __init__(self):
        super().__init__()
        self.given, self.watches, self.engine = [], [], None

    @initialize(
        name=st.sampled_from(NAMES), tokens=st.sampled_from([12, 64]), rows=st.sampled_from([2, 64]),
        shapes=st.sampled_from([None, 0, 1]), requests=st.lists(REQUEST, min_size=4, max_size=8),
    )  # fmt: skip
    def start(self, name, tokens, rows, shapes, requests):
        self.name, self.options, self.shapes = name, {"max_tokens_per_step": tokens, "max_rows": rows}, shapes
        self.target = specdec.ModelRunner(model_of(), page_size=PAGE, mode="eager")
        self.drafter = drafter_of(name, model_of())
        self.open()
        self.submit(requests, None, 2)

    def open(self):
        own = [one for one in runners_of(self.drafter) if self.name != "early exit"]
        memory = PAGES * sum(one.page_format.bytes for one in (self.target, *own))
        tree = None if self.shapes is None else "auto"
        self.engine = specdec.Engine(self.target, self.drafter, memory=memory, tree=tree, **self.options)
        force(self.engine, at_random(self.shapes))
        assert self.engine._memory.caches[0].num_pages == PAGES

    @property
    def running(self):
        """The requests that run and have tokens."""
        return [one for one in self.given if one.handle.row is not None and one.handle.tokens]

    @rule(requests=st.lists(REQUEST, min_size=2, max_size=4), how=HOW, steps=st.sampled_from([0, 1, 2, 3]))
    def submit(self, requests, how, steps):
        for prompt, kind, seed, priority in requests:
            callback = misbehave(self.engine, how) if how else None
            watch = Watch(list(PROMPTS[prompt]))
            criteria = [watch] if seed == 1 else []
            handle = self.engine.submit(watch.prompt, callback=callback, priority=priority, stopping_criteria=criteria,
                                        **{"max_new_tokens": COUNT, "seed": seed} | KINDS[kind])  # fmt: skip
            count = min(COUNT, KINDS[kind].get("max_new_tokens", COUNT))
            self.given.append(Given(handle, PROMPTS[prompt], kind, seed, count, how))
            self.watches.append((watch, self.given[-1]))
            how = None
        self.step(steps)

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 99), count=st.sampled_from([1, 2]), seed=st.sampled_from([0, 1]), kind=st.integers(0, 3))
    def fork(self, which, count, seed, kind):
        """Let others, with settings of a kind of their own, go on from the text of a request that runs."""
        one = self.running[which % len(self.running)]
        left, prompt = one.handle.request.max_new_tokens - len(one.handle.tokens), (*one.prompt, *one.handle.tokens)
        settings = {"do_sample": False} | {name: None for name in KINDS[one.kind] if name != "max_new_tokens"}
        settings |= {"do_sample": False} | KINDS[kind]  # nothing of the other's kind
        count = count if settings["do_sample"] else 1
        for handle in self.engine.fork(one.handle, count, seed=seed, stopping_criteria=[], **settings):
            assert handle.prompt == list(prompt) and handle.request.max_new_tokens == left
            self.given.append(Given(handle, prompt, kind, seed, left))
        self.counts["forks"] += count

    @precondition(lambda self: len(self.running) > 1)
    @rule(pages=st.sampled_from([3, 6, 99]), which=st.sampled_from([None, 0, 1, 2]))
    def squeeze(self, pages, which):
        """A step for which so many pages fewer are free: some of the requests make room; then one may be cancelled."""
        free = self.engine._memory.free
        self.engine._memory.free = lambda: [count - pages for count in free()]
        self.engine.step()
        self.engine._memory.free = free
        require_consistent(self.engine)
        if which is not None and self.running:
            self.cancel(which)

    @rule(count=st.sampled_from([1, 2, 4]))
    def step(self, count):
        for _ in range(count):
            self.engine.step()
            require_consistent(self.engine)

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 99))
    def cancel(self, which):
        self.engine.cancel(self.running[which % len(self.running)].handle)
        self.counts["cancelled while they ran"] += 1

    @precondition(lambda self: self.given)
    @rule(which=st.integers(0, 99))
    def cancel_any(self, which):
        self.engine.cancel(self.given[which % len(self.given)].handle)

    @rule(closes=st.booleans())
    def finish(self, closes):
        if not closes:
            list(self.engine.run())
            require_empty(self.engine)
            return
        self.engine.close()
        assert all(one.handle.finished for one in self.given)
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
        for one in self.given:
            self.require_text_of_its_own(one)
        for watch, one in self.watches:
            assert watch.lengths == ([*range(1, len(one.handle.tokens) + 1)] if one.seed == 1 else [])
        self.require_blocks_hold_their_texts()
        self.engine.close()

    def require_text_of_its_own(self, one):
        """A request has what it gets alone, or the beginning of that, and ended as its callback let it."""
        handle, how = one.handle, one.how
        assert handle.error is None if how is None else isinstance(handle.error, LookupError | None)
        assert handle.error is not None or handle.reason != "error"
        assert handle.reason in ("cancelled", "end", "length") or "raise" in (how or "")
        self.counts["preemptions"] += handle.preemptions
        if one.samples and one.seed is None:
            return
        shapes = tuple(handle.shapes) if one.samples and self.shapes is not None and self.name != "none" else None
        text = alone(self.name, one.prompt, one.kind, one.seed or 0, one.count, shapes)
        done = handle.reason in ("end", "length")
        assert handle.tokens == (text if done else text[: len(handle.tokens)]), one
        self.counts["sampled after making room"] += one.samples and done and handle.preemptions > 0

    def require_blocks_hold_their_texts(self):
        """Texts so far, given as prompts, go on as they did: their blocks are those that finished requests left."""
        for one in self.given[:12]:
            if one.kind == 0 and one.handle.tokens:
                again = self.engine.submit([*one.prompt, *one.handle.tokens], max_new_tokens=1)
                list(self.engine.run())
                text, known = alone(self.name, one.prompt, one.kind, 0, one.count), len(one.handle.tokens)
                assert again.error is None and len(again.tokens) == 1
                assert again.tokens == text[known:][:1] or known == len(text)


def test_random_calls():
    """Each kind of event comes often, not only now and then."""
    Requests.counts.clear()
    run_state_machine_as_test(Requests, settings=settings(
        max_examples=20, stateful_step_count=15, derandomize=True, deadline=None, database=None,
        phases=(Phase.generate,),
    ))  # fmt: skip
    least = {"preemptions": 48, "forks": 30, "cancelled while they ran": 15, "sampled after making room": 15}
    assert all(Requests.counts[what] >= count for what, count in least.items()), Requests.counts
