"""The scheduler alone, with memory that is only counted."""

from specdec.engine.handle import Handle
from specdec.engine.scheduler import Scheduler
from specdec.requests.rows import Row


class Counted:
    """One cache: every row wants one more page for its round, and three come back from one that makes room."""

    pages = 0

    def free(self):
        return [self.pages]

    def for_round(self, row):
        return [1]

    def for_text(self, tokens):
        raise AssertionError("nobody is admitted in a step in which somebody makes room")


def test_no_more_requests_make_room_than_need_be():
    memory, given = Counted(), [Handle(i, None, priority=int(i == 5), arrival=i, row=Row(0, i, 4, 9)) for i in range(6)]
    scheduler = Scheduler(memory, max_tokens=64, max_rows=8, round_tokens=1)
    scheduler.running.extend(given)

    def preempt(handle):
        handle.row, memory.pages = None, memory.pages + 3

    step = scheduler.step(None, preempt, lambda row: 0)
    assert scheduler.waiting == [given[3], given[4]]  # the last ones of the lowest priority; then 4 want 4 of 6 pages
    assert list(step.rounds) == scheduler.running == [*given[:3], given[5]]
