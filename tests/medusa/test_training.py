"""The training loop: what it learns, that a killed run goes on exactly, that several processes are one, and what stops
it.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers
from accelerate import DistributedType
from torch import nn
from torch.distributed.tensor import DTensor

from medusa import MedusaGenerator, MedusaHeads, TrainingSettings, head_ranks, medusa_loss, train_medusa
from medusa.adapter import add_lora
from medusa.losses import model_loss
from specdec import ModelRunner
from specdec.model.features import Features
from specdec.training import loop
from specdec.training.backbone import Backbone
from specdec.training.data import Rows
from specdec.training.labels import IGNORED, shifted_labels
from specdec.training.sharding import is_fsdp, shard_layers
from tests.families import VOCAB, build, ragged_prompts
from tests.ranks import run_ranks

SETTINGS = TrainingSettings(6, batch=4, rows_at_once=2, lr=3e-3, log_every=1, save_every=3, validate_every=3)


def some_rows(count=12, length=16) -> Rows:
    tokens = torch.randint(3, VOCAB, (count, length), generator=torch.Generator().manual_seed(0)).int()
    labels = tokens.clone()
    labels[:, :3] = IGNORED
    return Rows(tokens, labels, torch.zeros_like(tokens))


def trained(folder, settings=SETTINGS, rows=None, model=None, **options):
    model = build("llama") if model is None else model
    heads = MedusaHeads.for_model(model, 2)
    return heads, train_medusa(
        model, heads, some_rows() if rows is None else rows, folder, settings, progress=False, **options
    )


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_step_is_adamw_on_the_plain_loss(tmp_path):
    """One step by hand: the whole batch at once, torch's own loss, against two accumulated halves."""
    settings = replace(SETTINGS, steps=1, max_grad_norm=1e9)
    heads, (record,) = trained(tmp_path, settings)
    model, batch = build("llama"), some_rows().batch(0, 4)
    plain = MedusaHeads.for_model(model, 2)
    with torch.no_grad():
        hidden = model.model(batch.tokens).last_hidden_state
    loss, _ = medusa_loss(plain, hidden, batch.labels)
    loss.backward()
    torch.optim.AdamW(plain.parameters(), lr=settings.heads_lr(0), betas=(0.9, 0.95), weight_decay=0.0).step()
    assert record["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for ours, theirs in zip(heads.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_backbone_stays_as_it_was_and_the_heads_learn(tmp_path):
    model = build("llama")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    tokens = ((torch.arange(16) * 5 + torch.arange(12)[:, None]) % VOCAB).int()
    rows = Rows(tokens, tokens, torch.zeros_like(tokens))
    _, records = trained(
        tmp_path, replace(SETTINGS, steps=40, lr=1e-2, validate_every=39), rows, model, validation=rows
    )
    assert records[-1]["loss"] < 0.5 * records[0]["loss"] and records[-1]["head_0_top_5"] > 0.5
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_an_output_bias_is_learned_and_decoded_with(tmp_path):
    """Phi: the logits of the training forward are those of the decoding forward, and so are the texts."""
    model = build("phi")
    heads, records = trained(tmp_path, replace(SETTINGS, steps=20), model=model)
    assert records[-1]["loss"] < records[0]["loss"]
    assert all(not head[-1].bias.equal(model.lm_head.bias) for head in heads.heads)
    heads.save_pretrained(tmp_path / "heads")
    heads = MedusaHeads.from_pretrained(tmp_path / "heads")
    ids, mask = ragged_prompts(3)
    runner = ModelRunner(model)
    runner.reserve([21])
    with torch.no_grad():
        decoded = runner.forward([runner.cache.add()], ids[0], [21], features=Features())
        trained_on = Backbone(model)(ids[:1])[0]
        torch.testing.assert_close(model.lm_head(trained_on), decoded.logits)
        logits = torch.stack([heads.logits(head, trained_on) for head in range(2)])
        torch.testing.assert_close(logits, heads(decoded.features, runner.output_layer))
    out = MedusaGenerator(model, heads).generate(ids, mask, max_new_tokens=20)
    assert out.sequences.equal(model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=20))


def test_a_quantised_backbone_serves_as_well(tmp_path):
    """Layers with int8 weights, which can have no gradient."""

    class Int8(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.scale = linear.weight.detach().abs().amax() / 127
            self.weight = nn.Parameter(
                (linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False
            )

        def forward(self, x):
            return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)

    model = build("llama")
    for layer in model.model.layers:
        layer.mlp.down_proj = Int8(layer.mlp.down_proj)
    heads, records = trained(tmp_path, model=model)
    assert len(records) == 6 and not same_weights(heads, MedusaHeads.for_model(model, 2))


def test_packed_texts_train_as_if_each_had_a_row_of_its_own(tmp_path):
    apart = some_rows(4, 8)
    together = Rows(apart.tokens.view(2, 16), apart.labels.view(2, 16), torch.tensor([[0] * 8 + [1] * 8] * 2).int())
    (_, one), (_, other) = (
        trained(tmp_path / str(len(rows)), replace(SETTINGS, steps=1, batch=len(rows), rows_at_once=4), rows)
        for rows in (apart, together)
    )
    assert one[0]["loss"] == pytest.approx(other[0]["loss"], rel=1e-5) and one[0]["grad_norm"] == pytest.approx(
        other[0]["grad_norm"], rel=1e-4
    )


def test_packing_is_refused_where_texts_would_see_each_other(tmp_path):
    rows = some_rows()
    with pytest.raises(ValueError, match="OPTForCausalLM lets packed texts see each other"):
        trained(
            tmp_path,
            rows=Rows(rows.tokens, rows.labels, torch.tensor([[0] * 8 + [1] * 8] * 12).int()),
            model=build("opt"),
        )


def test_a_share_of_the_labels_is_another_share_each_step(tmp_path):
    _, whole = trained(tmp_path / "whole")
    _, part = trained(tmp_path / "part", replace(SETTINGS, label_share=0.5))
    assert part[0]["loss"] != whole[0]["loss"] and part[0]["loss"] == pytest.approx(whole[0]["loss"], rel=0.5)


def test_what_is_not_finite_stops_before_the_weights_change(tmp_path):
    model = build("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[50] = float("nan")
    heads = MedusaHeads.for_model(model, 2)
    rows = some_rows()
    rows.tokens[:] = rows.tokens.clamp(max=49)
    rows.tokens[7, 4] = 50
    with pytest.raises(FloatingPointError, match=r"bad_batch\.pt"):
        train_medusa(model, heads, rows, tmp_path, replace(SETTINGS, batch=3), progress=False)
    bad = torch.load(tmp_path / "bad_batch.pt")
    assert (bad["tokens"] == 50).any() and all(bool(p.isfinite().all()) for p in heads.parameters())


def test_a_run_of_other_settings_is_not_gone_on_with(tmp_path):
    trained(tmp_path)
    with pytest.raises(ValueError, match=r"other settings .*'lr': \(0\.003, 0\.1\)"):
        trained(tmp_path, replace(SETTINGS, lr=0.1))


@pytest.mark.parametrize("self_distilled", [False, True])
def test_joint_steps_train_the_adapter_and_leave_the_models_own_weights(self_distilled, tmp_path):
    model = build("llama")
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    adapter = add_lora(model, rank=4, dropout=0.0)
    settings = replace(SETTINGS, joint_steps=4, self_distilled=self_distilled, lr=None)
    _, records = trained(tmp_path, settings, model=model, adapter=adapter)
    assert ["model_loss" in record for record in records] == [False] * 2 + [True] * 4
    lora = {name: weight for name, weight in model.named_parameters() if "lora_B" in name}
    assert any(bool(weight.any()) for weight in lora.values())
    assert torch.equal(model.model.layers[0].mlp.up_proj.base_layer.weight, before)
    if self_distilled:  # the adapter begins as nothing, so the model is at first as it was
        assert records[2]["model_loss"] == pytest.approx(0, abs=1e-5) and settings.weight_of_heads(5) == pytest.approx(
            0.01
        )


@pytest.mark.parametrize("self_distilled", [False, True])
def test_checkpointed_layers_take_joint_steps_as_others_do(self_distilled, tmp_path):
    settings, found = replace(SETTINGS, joint_steps=4, self_distilled=self_distilled), []
    for name in ("plain", "checkpointed"):
        model = build("llama")
        adapter = add_lora(model, rank=4)
        if name == "checkpointed":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        found.append([record["loss"] for record in trained(tmp_path / name, settings, model=model, adapter=adapter)[1]])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_a_model_in_16_bits_trains_without_being_told(tmp_path):
    model = build("llama").bfloat16()
    heads = MedusaHeads.for_model(model, 2).float()
    records = train_medusa(model, heads, some_rows(), tmp_path, SETTINGS, progress=False)
    assert len(records) == 6 and next(heads.parameters()).dtype == torch.float32


def test_rows_without_a_label_beside_others_do_no_harm(tmp_path):
    rows, model = some_rows(), build("llama")
    rows.labels[::2] = IGNORED
    trained(tmp_path, replace(SETTINGS, joint_steps=6, rows_at_once=1), rows, model, adapter=add_lora(model, rank=4))


def test_a_model_that_scales_its_logits_is_refused_for_joint_steps(tmp_path):
    config = transformers.GraniteConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        logits_scaling=8.0,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    trained(tmp_path / "alone", model=model)
    with pytest.raises(ValueError, match="GraniteForCausalLM scales or caps its logits"):
        trained(tmp_path / "joint", replace(SETTINGS, joint_steps=2), model=model, adapter=add_lora(model, rank=4))


@pytest.mark.parametrize("distil", [False, True])
def test_the_models_own_loss_equals_a_plain_writing(distil):
    torch.manual_seed(0)
    lm_head, labels = nn.Linear(8, 30, bias=False), torch.randint(30, (2, 9))
    hidden, teacher = torch.randn(2, 9, 8, requires_grad=True), torch.randn(2, 9, 8)
    labels[0, :3] = IGNORED
    loss = model_loss(lm_head, hidden, labels, teacher=teacher if distil else None, chunk=4)
    wanted = shifted_labels(labels, 1)
    kept = wanted != IGNORED
    if distil:
        q, p = (lm_head(x).log_softmax(-1)[kept] for x in (hidden, teacher))
        plain = nn.functional.kl_div(q, p.detach(), log_target=True, reduction="sum")
    else:
        plain = nn.functional.cross_entropy(lm_head(hidden)[kept], wanted[kept], reduction="sum")
    torch.testing.assert_close(loss, plain)
    wanted_from = (
        [hidden] if distil else [hidden, lm_head.weight]
    )  # the plain divergence would reach the weight through p, too
    for ours, theirs in zip(
        torch.autograd.grad(loss, wanted_from), torch.autograd.grad(plain, wanted_from), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_rows_count_as_texts_do():
    model = build("llama")
    heads = MedusaHeads.for_model(model, 2)
    tokens = some_rows().tokens
    whole = Rows(tokens, tokens, torch.zeros_like(tokens))
    at_once, alone = (
        torch.tensor(head_ranks(heads, model, texts).accuracies()) for texts in (whole, list(tokens.long()))
    )
    torch.testing.assert_close(at_once, alone)


def processes(count: int) -> SimpleNamespace:
    return SimpleNamespace(num_processes=count, device=torch.device("cpu"))


def test_layers_that_are_spread_are_gathered_one_after_the_other(tmp_path):
    """Half of each layer stays on each of two processes, before and after a forward, which gives the same numbers."""
    model, tokens = build("llama").requires_grad_(False), some_rows(2).tokens.long()
    with torch.no_grad():
        expected = model(tokens).logits

    def work(rank: int):
        shard_layers(model, processes(2))
        most, held = [], lambda: sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in
                                     model.model.layers.parameters())  # fmt: skip
        for layer in model.model.layers:
            layer.mlp.register_forward_hook(lambda *_: most.append(held()))
        before = held()
        with torch.no_grad():
            same = torch.equal(model(tokens).logits, expected)
        return same, before, max(most), held()

    whole, layers = sum(p.numel() for p in model.model.layers.parameters()), len(model.model.layers)
    half = whole // 2
    assert run_ranks(tmp_path, work) == [(True, half, half + whole // layers // 2, half)] * 2


def test_what_cannot_be_spread_over_processes_is_named(tmp_path):
    """One process, rows that processes do not share, and a model that learns."""
    model = build("llama")
    with pytest.raises(ValueError, match="over at least 2 processes, got 1"):
        trained(tmp_path, shard=True)
    with pytest.raises(ValueError, match="learns too"):
        shard_layers(model.requires_grad_(True), processes(2))
    accelerator = SimpleNamespace(num_processes=3, device=torch.device("cpu"), mixed_precision="no")
    learner = SimpleNamespace(settings=SETTINGS)
    kinds = [is_fsdp(SimpleNamespace(distributed_type=DistributedType[name])) for name in ("FSDP", "MULTI_GPU", "NO")]
    assert kinds == [True, False, False]
    with pytest.raises(ValueError, match="3 do not share a batch of 4"):
        loop._require_usable(learner, some_rows(), accelerator, True)
