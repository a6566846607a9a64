"""The loop that trains small models: exact resume, a finite loss, the learning rate."""

import pytest
import torch

from scripts.common.training_loop import cosine_lr, train

torch.set_num_threads(1)  # tiny tensors: waiting threads would cost ten times more on shared cores


def untimed(records):
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


class Task:
    """A regression whose batch and dropout depend on the step alone; it may fail at one step."""

    def __init__(self, fail_at=None, poison_at=None):
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Dropout(0.2), torch.nn.Linear(8, 1)
        )
        self.fail_at, self.poison_at, self.asked = fail_at, poison_at, []

    def loss_of(self, step):
        if step == self.fail_at:
            raise KeyboardInterrupt
        self.asked.append(step)
        torch.manual_seed(step)
        x = torch.randn(16, 4)
        loss = (self.model(x) - x.sum(-1, keepdim=True)).square().mean()
        return loss * float("nan") if step == self.poison_at else loss

    def train(self, folder, **options):
        options = dict(steps=12, lr=0.05, save_every_s=0, log_every=3, log=lambda line: None) | options
        return train(self.model, self.loss_of, checkpoint=folder / "state.pt", **options)


@pytest.mark.parametrize("stops", [[1], [7], [11], [2, 3, 9]])
def test_an_interrupted_training_resumes_bit_for_bit(tmp_path, stops):
    whole = Task()
    records = whole.train(tmp_path / "whole")
    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            Task(fail_at=stop).train(tmp_path / "parts")
    last = Task()
    resumed = last.train(tmp_path / "parts")
    assert last.asked == list(range(stops[-1], 12)) and whole.asked == list(range(12))
    assert untimed(resumed) == untimed(records) and [record["step"] for record in records] == [0, 3, 6, 9, 11]
    assert all(torch.equal(a, b) for a, b in zip(last.model.parameters(), whole.model.parameters(), strict=True))
    states = [
        torch.load(tmp_path / name / "state.pt", weights_only=True)["optimizer"]["state"] for name in ("whole", "parts")
    ]
    assert all(torch.equal(states[0][i][name], states[1][i][name]) for i in states[0] for name in states[0][i])


def test_a_finished_training_is_not_repeated(tmp_path):
    first, again = Task(), Task()
    records = first.train(tmp_path)
    assert again.train(tmp_path) == records and again.asked == []
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), first.model.parameters(), strict=True))


def test_training_learns_and_evaluates(tmp_path):
    records = Task().train(tmp_path, steps=60, log_every=1, evaluate=lambda: {"held_out_loss": 1.0})
    assert records[-1]["loss"] < records[0]["loss"] / 2
    evaluated = [record["step"] for record in records if "held_out_loss" in record]
    assert evaluated[0] == 0 and evaluated[-1] == 59 and 10 <= len(evaluated) <= 12


@pytest.mark.parametrize("step", [0, 6])
def test_a_nan_loss_stops_the_training_and_names_the_step(tmp_path, step):
    with pytest.raises(FloatingPointError, match=f"nan at step {step}.*state.pt"):
        Task(poison_at=step).train(tmp_path)


def test_the_learning_rate_warms_up_and_falls_to_zero():
    rates = [cosine_lr(step, 100, 2.0, 10) for step in range(101)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10] == 2.0 and rates[55] == pytest.approx(1.0) and rates[100] == pytest.approx(0)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))


def test_a_broken_step_is_never_saved(tmp_path):
    """The loss turns NaN between two log steps: the error comes before the checkpoint is overwritten."""
    model = torch.nn.Linear(2, 2)
    losses = lambda step: model(torch.ones(1, 2)).sum() * (float("nan") if step == 3 else 1.0)
    with pytest.raises(FloatingPointError, match="step 3"):
        train(model, losses, steps=9, lr=1e-3, checkpoint=tmp_path / "c.pt", save_every_s=0.0, log=lambda line: None)
    state = torch.load(tmp_path / "c.pt", weights_only=True)
    assert state["step"] == 3 and all(bool(w.isfinite().all()) for w in state["model"].values())
