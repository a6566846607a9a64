"""Prompts with images of an engine's requests: each runs whole, in a forward of its own, before a step's other work."""

from collections.abc import Sequence

from attention import OutOfPages
from specdec.drafters.base import readers_of, take_in
from specdec.engine.groups import Groups
from specdec.engine.handle import Handle
from specdec.model.image_prompts import run_image_prompts
from specdec.model.runner import ModelRunner
from specdec.requests.rows import Row
from specdec.rounds.records import Call


def run_images(target: ModelRunner, groups: Groups,
               prompts: Sequence[tuple[Handle, int]]) -> tuple[list[tuple[Handle, int]], set[Row]]:  # fmt: skip
    """Run those of `prompts` with images that have not begun -> the others, and the rows that an error of the model's
    forward has ended, whose inputs do not fit each other, say."""
    others, failed = list[tuple[Handle, int]](), set[Row]()
    for handle, count in prompts:
        row, images = handle.row, handle.request.images
        if row is None or images is None or target.cache.length(row.sequence):
            others.append((handle, count))
            continue
        try:
            _run(target, groups.holding(row).call, row, handle)
        except OutOfPages:
            raise
        except Exception as error:
            groups.failed([row], error)
            failed.add(row)
    return others, failed


def _run(target: ModelRunner, call: Call, row: Row, handle: Handle) -> None:
    assert handle.request.images is not None
    give = None
    if readers_of(call.session):
        give = lambda places, features: take_in(call.session, call.rows, [row], features)
    run_image_prompts(target, [row.sequence], handle.request.images, call.features, give)
