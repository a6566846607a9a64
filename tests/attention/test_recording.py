"""A recording repeats a function in place, whatever its tensors hold then, and refuses what a list cannot repeat."""

import threading

import pytest
import torch
from torch import Tensor

from attention import recording
from attention.recorded_steps import Step, joined_sums, storage_of
from attention.recording import CannotRecord, Recording, as_one, current


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WEIGHT, SQUARE, BIAS, TABLE = numbers(3, 4), numbers(4, 4), numbers(3), numbers(2, 5)


def mutated_constant(x: Tensor) -> Tensor:
    total = torch.zeros(4)
    total += x[0]  # the zeros must be made again in every replay
    return total


def written_after_a_gap(x: Tensor) -> Tensor:
    """PyTorch's own index_put_ takes no None."""
    changed = x.clone()
    changed[..., torch.tensor([0])] = x[:, 1:2]
    return changed


FUNCTIONS = {
    "views and arithmetic": lambda x: (x.t()[1:] * 2 - x.sum()).relu(),
    "several outputs": lambda x: x.topk(2, -1).values + x.sort(-1).indices[:, :2] + x.max(0).values[:2],
    "written in place": lambda x: x.clone().index_copy_(0, torch.tensor([1]), x[:1]).masked_fill_(x > 1, 7.0),
    "a constant that is written to": mutated_constant,
    "numbers of the host that are written to": lambda x: torch.tensor([1.0, 2.0, 3.0, 4.0]).add_(x[0]),
    "a part of a constant that is written to": lambda x: (lambda z: (z[1:].mul_(x[0, 1:]), z + 1)[1])(torch.ones(4)),
    "a constant of one that is written to": lambda x: (lambda z: (z + 2, z.add_(x[0]))[0] + z)(torch.ones(4)),
    "a constant that is not": lambda x: x + torch.arange(4) * torch.ones(4),
    "copies and dtypes": lambda x: x.double().clone().float().contiguous().to(torch.bfloat16),
    "an embedding": lambda x: torch.nn.functional.embedding((x > 0).long(), TABLE),
    "no function with out": lambda x: torch.nn.functional.pad(x, (1, 0)),
    "a linear layer with a bias": lambda x: torch.nn.functional.linear(x, WEIGHT, BIAS),
    "a product and a sum": lambda x: torch.nn.functional.linear(x, SQUARE) + x,
    "a product that is used twice": lambda x: (lambda y: (y + x) * y)(torch.nn.functional.linear(x, SQUARE)),
    "a product that is returned": lambda x: (lambda y: (y + x, y))(torch.nn.functional.linear(x, SQUARE))[1],
    "a scaled sum": lambda x: torch.add(x, torch.nn.functional.linear(x, SQUARE), alpha=0.5),
    "a product and itself": lambda x: (lambda y: y + y)(torch.nn.functional.linear(x, SQUARE)),
    "a product and its view": lambda x: (lambda y: y.view(1, 2, 4) + y)(torch.nn.functional.linear(x, SQUARE)),
    "a product and a broadcast": lambda x: torch.mm(x[:1], SQUARE) + x[:, :1].expand(2, 4)[:1].t()[:1],
    "written at an index": lambda x: x.clone().index_put_((torch.tensor([0]),), x[1:]),
    "written at an index after a gap": written_after_a_gap,
    "an index with numbers": lambda x: x[torch.tensor([1, 0]), torch.tensor([3, 2])],
    "NaN and infinity": lambda x: torch.stack([x / 0, (x - x) / 0]),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_replays_compute_what_the_function_computes_from_what_its_tensors_hold_then(name):
    x = numbers(2, 4)
    recording = Recording(lambda: FUNCTIONS[name](x))
    for seed in (0, 1, 2, 1):
        x.copy_(numbers(2, 4, seed=seed))
        recording.replay()
        torch.testing.assert_close(recording.result, FUNCTIONS[name](x), equal_nan=True)


def test_what_lies_outside_is_changed_in_every_replay():
    x, rows = numbers(4), torch.zeros(3)
    recording = Recording(lambda: rows.add_(x.sum()))
    first = float(rows[0])
    recording.replay()
    assert float(rows[0]) == pytest.approx(2 * first) and recording.result is rows


def test_views_and_constants_take_no_step():
    x = numbers(2, 4)
    recording = Recording(lambda: x.t().unsqueeze(0)[..., :1] + torch.arange(4)[None, :, None].float())
    assert len(recording) == 1


REFUSED = {
    "item": lambda x: x * float(x.sum()),
    "a branch": lambda x: x if x.sum() > 0 else -x,
    "tolist": lambda x: torch.tensor((x + 1).tolist()),
    "numpy": lambda x: torch.from_numpy((x + 1).numpy()),
    "nonzero": lambda x: x.nonzero(),
    "a mask as index": lambda x: x[x > 0],
    "dropout": lambda x: torch.nn.functional.dropout(x, 0.5, training=True),
    "random numbers": lambda x: x + torch.rand(4),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_list_cannot_repeat_is_refused(name):
    x = numbers(2, 4)
    with pytest.raises(CannotRecord, match="reads a tensor's values|draws random numbers|depends on values"):
        Recording(lambda: REFUSED[name](x))
    assert current() is None, "the thread is free again"


def test_constants_may_be_read():
    x = numbers(4)
    assert Recording(lambda: x + sum(torch.tensor([1.0, 2.0]).tolist())).result.equal(x + 3)


def test_as_one_may_read_values():
    x = numbers(4)
    recording = Recording(lambda: as_one(lambda y: [torch.tensor(sorted(y.tolist()))], x * 2)[0] + 1)
    x.copy_(numbers(4, seed=1))
    recording.replay()
    assert recording.result.equal((x * 2).sort().values + 1) and len(recording) == 3


def test_what_would_hold_too_much_memory_is_refused(monkeypatch):
    x = numbers(8)
    assert Recording(lambda: (x + 1) * 2).bytes == 2 * 8 * 4
    monkeypatch.setattr(recording, "MAX_BYTES", 50)
    with pytest.raises(CannotRecord, match="takes more than"):
        Recording(lambda: (x + 1) * 2)


def test_other_threads_are_not_recorded():
    x, seen = numbers(4), []

    def function():
        other = threading.Thread(target=lambda: seen.append((current(), x.tolist())))
        other.start()
        other.join()
        return x + 1

    assert len(Recording(function)) == 1 and seen == [(None, x.tolist())]


def test_a_recording_within_a_recording_is_refused():
    with pytest.raises(RuntimeError, match="within another"):
        Recording(lambda: Recording(lambda: torch.ones(1)))


def test_a_product_is_joined_with_a_sum_only_if_nothing_else_reads_it():
    """Planted: a reader that the count of readers does not see."""
    x, weight = numbers(2, 4), numbers(4, 4)

    def run(kept: bool, reader: bool) -> int:
        product, out = torch.mm(x, weight), torch.empty(2, 4)
        steps = [
            Step(lambda: None, frozenset({storage_of(x)}), func=torch.ops.aten.mm.default, args=(x, weight),
                 outputs=(product,)),
            Step(lambda: None, frozenset({storage_of(product), storage_of(x)}), func=torch.ops.aten.add.Tensor,
                 args=(x, product), outputs=(out,)),
        ]  # fmt: skip
        steps += [Step(lambda: None, frozenset({storage_of(product)}))] * reader
        return len(joined_sums(steps, {storage_of(product)} if kept else set()))

    assert (run(False, False), run(True, False), run(False, True)) == (1, 2, 3)
