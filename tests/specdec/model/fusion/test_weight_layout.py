"""Copies of a small model's weights by columns: the same results, the model untouched, and changes noticed."""

import pytest
import torch

import specdec
from specdec.model.fusion import weight_layout
from specdec.model.fusion.weight_layout import ColumnCopies
from tests.families import build, ragged_prompts

MEASURE = weight_layout.columns_are_faster


@pytest.fixture(autouse=True)
def columns(monkeypatch):
    """As on a CPU that reads columns faster."""
    monkeypatch.setattr(weight_layout, "columns_are_faster", lambda dtype: dtype == torch.float32)


def changed_through_data(weight):
    weight.data.mul_(1.01)


def changed_in_place(weight):
    with torch.no_grad():
        weight[0] += 0.1


def two_swapped(weight):
    with torch.no_grad():
        weight[[0, 1]] = weight[[1, 0]]


@pytest.mark.covering
@pytest.mark.parametrize("mode", ["graph", "auto"])
@pytest.mark.parametrize("change", [changed_through_data, changed_in_place, two_swapped])
def test_a_weight_that_changes_in_place_is_noticed(change, mode):
    model, (ids, mask) = build("llama"), ragged_prompts(2)
    generator = specdec.SpeculativeGenerator(model, specdec.PromptLookupDrafter(3), mode=mode)
    generator.generate(ids, mask, max_new_tokens=12)
    for name in ("self_attn.k_proj", "mlp.down_proj"):
        change(model.model.layers[1].get_submodule(name).weight)
        expected = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=12)
        assert generator.generate(ids, mask, max_new_tokens=12).sequences.equal(expected)
        assert generator.target.execution.fusion.current()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_marks_know_nan_and_single_numbers(dtype):
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[2, 3] = float("nan")
    before = weight_layout._mark([weight])
    assert weight_layout._mark([weight]).equal(before)
    weight[5, 7] *= 1.01
    assert not weight_layout._mark([weight]).equal(before)


@pytest.mark.parametrize("mode", ["graph", "auto"])
def test_the_model_keeps_its_weights_where_they_are(tmp_path, mode):
    model = build("llama")
    places = {name: (p.data_ptr(), p.stride()) for name, p in model.named_parameters()}
    logits = model(torch.tensor([[5, 6, 7]])).logits
    specdec.SpeculativeGenerator(model, None, mode=mode).generate(torch.tensor([[5, 6, 7]]), max_new_tokens=6)
    assert places == {name: (p.data_ptr(), p.stride()) for name, p in model.named_parameters()}
    assert model(torch.tensor([[5, 6, 7]])).logits.equal(logits)
    model.save_pretrained(tmp_path)
    assert specdec.load_model(tmp_path, torch.float32)(torch.tensor([[5, 6, 7]])).logits.equal(logits)


def test_copies_hold_the_same_numbers_by_columns():
    model = build("llama")
    attention = model.model.layers[0].self_attn
    weights = [attention.q_proj.weight, attention.k_proj.weight]
    copy = ColumnCopies(model).of(weights)
    assert copy.equal(torch.cat([w.detach() for w in weights])) and copy.stride() == (1, len(copy))


@pytest.mark.parametrize("reason", ["large", "another dtype"])
def test_a_large_model_is_not_copied(reason, monkeypatch):
    model = build("llama")
    if reason == "large":
        monkeypatch.setattr(weight_layout, "MAX_BYTES", 1000)
    else:
        model = model.bfloat16()
    assert ColumnCopies(model).of([model.lm_head.weight]) is None


def test_the_trial_is_for_floating_point_numbers_of_16_bits_or_more():
    """What it finds differs between machines."""
    assert not MEASURE(torch.int8) and not MEASURE(torch.float8_e4m3fn) and MEASURE(torch.float32) in (True, False)
