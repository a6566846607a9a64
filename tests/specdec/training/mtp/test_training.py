"""Training MTP modules: which positions learn, that nothing but the rows changes a run, and what a file holds."""

import copy
from dataclasses import replace

import pytest
import torch

import specdec
from specdec.drafters.mtp.saving import save_mtp
from specdec.training.backbone import Backbone
from specdec.training.labels import IGNORED
from specdec.training.mtp.network import MtpNetwork, new_mtp
from specdec.training.mtp.training import train_mtp
from specdec.training.mtp.unrolled import UnrolledModules
from specdec.training.unrolled.loss import DraftLoss
from tests.families import build
from tests.learned import mtp_modules
from tests.specdec.training.eagle3 import test_training as eagle3
from tests.specdec.training.eagle3.test_training import (
    assert_same_drafts,
    learn,
    own_rows,
    some_rows,
    untimed,
)
from tests.specdec.training.mtp.test_unrolled import modules_of

SETTINGS = replace(eagle3.SETTINGS, decay=0.6)


def trained(folder, settings=SETTINGS, model=None, prompts=(), rows=None, count=1):
    """Modules that a checkpoint might have had, and the records of their training."""
    model, rows = build("llama") if model is None else model, some_rows() if rows is None else rows
    network = MtpNetwork(modules_of(model, count)).to(torch.promote_types(model.dtype, torch.float32))
    return network, train_mtp(model, network, rows, folder, settings, prompts, progress=False)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kind", ["kl", "tv", "ce"])
def test_the_gradient_reaches_exactly_the_tokens_of_answers(kind, count):
    model, rows = build("llama"), some_rows(3).take(slice(None))
    model.requires_grad_(False)
    network = MtpNetwork(modules_of(model, count))
    states = Backbone(model)(rows.tokens, rows.documents)
    outputs = UnrolledModules(network)(rows, rows.tokens, states, 3)
    loss = DraftLoss(network, model.lm_head, kind)
    positions = loss.positions(rows, [1.0, 0.6, 0.36], model.device)
    alone = [output.detach().requires_grad_() for output in outputs]  # without the steps that read them
    direct = torch.autograd.grad(loss(alone, states, positions)[0], alone)
    total, sums = loss(outputs, states, positions)
    plain = torch.zeros(3)
    for step, output in enumerate(outputs):
        wanted, q = loss.labels(rows, step), (output @ model.lm_head.weight.T).log_softmax(-1)
        at = torch.arange(24) % 12 + step + 2
        first = 5 + (2 * torch.arange(3)[:, None] + torch.arange(24) // 12) % 3
        learned = ((at < 12) & (at >= first)).flatten()
        assert torch.equal(learned, wanted.flatten() != IGNORED)
        if kind == "ce":
            each = -q.gather(1, wanted.flatten().clamp(min=0)[:, None])[:, 0]
        else:
            p = model.lm_head(states).log_softmax(-1).flatten(0, 1).roll(-1 - step, 0)
            each = (p.exp() * (p - q)).sum(-1) if kind == "kl" else (p.exp() - q.exp()).abs().sum(-1) / 2
        plain[step] = each[learned].sum()
        assert torch.equal(direct[step].abs().sum(-1) > 0, learned)
    torch.testing.assert_close(sums, plain, rtol=1e-4, atol=1e-4)
    mine = list(network.parameters())
    ours = torch.autograd.grad(total, mine, retain_graph=True)
    theirs = torch.autograd.grad((plain * torch.tensor([1.0, 0.6, 0.36])).sum(), mine)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_a_copy_and_a_conversion_leave_the_target_and_the_positions_alone():
    model = build("llama")
    network = MtpNetwork(modules_of(model, 2))
    frequencies = network.parts[0].network.model.rotary_emb.inv_freq.clone()
    other = copy.deepcopy(network).to(torch.bfloat16)
    assert other.target is model and other.parts[1].network.lm_head is model.lm_head
    assert {p.dtype for p in other.parts[1].network.model.layers.parameters()} == {torch.bfloat16}
    assert other.parts[0].network.model.rotary_emb.inv_freq.equal(frequencies)
    assert {p.dtype for p in [*network.parameters(), *model.parameters()]} == {torch.float32}
    assert not {id(p) for p in other.parameters()} & {id(p) for p in network.parameters()}
    assert {id(p) for p in network.parameters()}.isdisjoint(id(p) for p in model.parameters())


@pytest.mark.parametrize("kind", ["a new one", "three modules"])
def test_modules_learn_and_are_the_same_after_export(kind, tmp_path):
    model = build("llama")
    rows, prompts = own_rows(model)
    torch.manual_seed(1)
    layout = "qwen3-next" if kind == "a new one" else "deepseek-v3"
    network = new_mtp(model, layout) if kind == "a new one" else MtpNetwork(modules_of(model, 3))
    learn(model, network, rows, tmp_path / "run", train_mtp, lambda one: one.drafter(3), prompts[:8])
    save_mtp(network.parts, tmp_path / "drafter")
    again = specdec.load_drafter(tmp_path / "drafter", model, kind="mtp", num_tokens=3)
    assert_same_drafts(model, network.drafter(3), again)
    assert layout in again.describe().lower()


def test_an_output_layer_of_its_own_learns_and_is_saved(tmp_path):
    model = build("llama")
    network = MtpNetwork(mtp_modules(model, 1))
    head = network.output_weight
    before = head.detach().clone()
    train_mtp(model, network, some_rows(), tmp_path / "run", replace(SETTINGS, steps=2), progress=False)
    assert head.requires_grad and not torch.equal(head, before)
    save_mtp(network.parts, tmp_path / "drafter")
    again = specdec.load_drafter(tmp_path / "drafter", model, kind="mtp")
    assert again.module.network.get_output_embeddings().weight.equal(head)


def test_what_cannot_be_trained_is_refused(tmp_path):
    model, other = build("llama"), build("llama")
    network = MtpNetwork(modules_of(model, 2))
    run = lambda *given: train_mtp(*given, progress=False)
    with pytest.raises(ValueError, match="2 MTP modules, one a depth, take as many steps, got depth 3"):
        run(model, network, some_rows(), tmp_path, SETTINGS)
    with pytest.raises(ValueError, match="got num_tokens 5"):
        run(model, network, some_rows(), tmp_path, replace(SETTINGS, depth=2, num_tokens=5))
    with pytest.raises(ValueError, match="those of another LlamaForCausalLM"):
        run(other, network, some_rows(), tmp_path, SETTINGS)
    with pytest.raises(ValueError, match="3 MTP modules with output layers of their own"):
        MtpNetwork(mtp_modules(model, 3))
    with pytest.raises(ValueError, match="layout must be one of deepseek-v3, mimo-7b, .*, got 'eagle'"):
        new_mtp(model, "eagle")
    with pytest.raises(ValueError, match="a PhiForCausalLM has a bias"):
        new_mtp(build("phi"))
    windowed = build("mistral")
    with pytest.raises(ValueError, match="a window of 9 tokens is left by step 9 after a token"):
        run(windowed, MtpNetwork(modules_of(windowed)), some_rows(), tmp_path, replace(SETTINGS, depth=10))
    trained(tmp_path / "mtp")
    with pytest.raises(ValueError, match=r"other settings .*'modules': \(1, 3\)"):
        trained(tmp_path / "mtp", count=3)


def test_records_say_the_loss_of_each_depth(tmp_path):
    _, (record, *_) = trained(tmp_path / "one", replace(SETTINGS, steps=1))
    assert record["loss"] == pytest.approx(sum(0.6**depth * record[f"depth_{depth}_loss"] for depth in range(3)))
    assert record["tokens_per_second"] > 0
    _, again = trained(tmp_path / "two", replace(SETTINGS, steps=1))
    assert untimed(again) == untimed([record])
