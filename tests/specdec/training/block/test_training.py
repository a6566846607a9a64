"""Training block drafters: which rows are together changes nothing; a file holds the drafter that was trained."""

import copy
from dataclasses import replace

import pytest
import torch
import transformers

import specdec
from specdec.drafters.block.drafter import BlockDrafter
from specdec.drafters.block.growth import Growth
from specdec.drafters.block.saving import save_drafter
from specdec.training.acceptance import decode_prompts
from specdec.training.block.network import DSPARK, new_block
from specdec.training.block.settings import BlockSettings
from specdec.training.block.training import train_block
from specdec.training.data import Rows, build_rows
from specdec.training.labels import IGNORED
from specdec.training.network import choose_draft_tokens, choose_mask_token
from tests.families import VOCAB, build, ragged_prompts
from tests.learned import block_model
from tests.specdec.training.eagle3.test_training import PROMPTS, equal, some_rows

MIXED = (("ce", 0.1), ("tv", 0.9))
SETTINGS = BlockSettings(6, batch=4, rows_at_once=2, lr=3e-3, anchors=5, loss=MIXED, log_every=1, save_every=3,
                         validate_every=3, max_new_tokens=8)  # fmt: skip
HEADS = DSPARK | dict(markov_rank=8)
KINDS = {"dflash": {}, "dspark": HEADS, "fill-in, gated": dict(markov="gated", markov_rank=8, confidence="hidden")}


def trained(folder, settings=SETTINGS, model=None, prompts=(), rows=None, kind="dspark", **fields):
    """A new network that drafts two tokens in three, and the records of its training."""
    model, rows = build("llama") if model is None else model, some_rows() if rows is None else rows
    torch.manual_seed(1)
    tokens, _ = choose_draft_tokens(some_rows(), 64, VOCAB)
    network = new_block(model, 2, tokens, block_size=4, **KINDS[kind] | fields)
    network.to(torch.promote_types(model.dtype, torch.float32))
    return network, train_block(model, network, rows, folder, settings, prompts, progress=False)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_at_once_change_nothing(kind, tmp_path):
    """8 rows in one forward, in two of four, one by one."""
    found = []
    for at_once in (8, 4, 1):
        settings = replace(SETTINGS, steps=3, batch=8, rows_at_once=at_once)
        network, records = trained(tmp_path / str(at_once), settings, build("llama").double(), kind=kind)
        found.append(([record["loss"] for record in records], list(network.parameters())))
    for of_steps, weights in found[1:]:
        assert of_steps == pytest.approx(found[0][0], abs=1e-6)
        for one, other in zip(weights, found[0][1], strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def test_rows_without_an_anchor_add_nothing(tmp_path):
    """A part of a batch may have no block to learn from."""
    rows = some_rows(4)
    rows.labels[::2] = IGNORED
    settings = replace(SETTINGS, steps=2, rows_at_once=1)
    _, records = trained(tmp_path / "one", settings, build("llama").double(), rows=rows)
    _, whole = trained(tmp_path / "all", replace(settings, rows_at_once=4), build("llama").double(), rows=rows)
    assert [record["loss"] for record in records] == pytest.approx([record["loss"] for record in whole], abs=1e-6)
    rows.labels[:] = IGNORED
    with pytest.raises(ValueError, match="the rows of step 0 have no block with a label that can be drafted"):
        trained(tmp_path / "none", settings, rows=rows)


def test_each_slots_loss_has_its_weight(tmp_path):
    _, (record, *_) = trained(tmp_path, replace(SETTINGS, steps=1, gamma=2.0))
    weights = torch.exp(-torch.arange(4) / 2.0)
    each = torch.tensor([record[f"slot_{slot}_loss"] for slot in range(4)])
    assert record["loss"] == pytest.approx(float((weights * each).sum() / weights.sum()))
    assert 0 < record["acceptance"] < 1 and record["confidence_loss"] > 0


@pytest.mark.parametrize(("kind", "layout"), [("dflash", "z-lab"), ("dspark", "speculators")])
def test_a_drafter_learns_and_is_the_same_after_export(kind, layout, tmp_path):
    """The acceptance length, which is measured, rises on the target's own texts."""
    model = build("llama")
    before = [weight.clone() for weight in model.parameters()]
    generator = specdec.AutoregressiveGenerator(model)
    prompts = torch.randint(3, VOCAB, (24, 4), generator=torch.Generator().manual_seed(4))
    texts = generator.generate(prompts, max_new_tokens=20).sequences.tolist()
    rows = build_rows([{"tokens": text, "learned_from": 4} for text in texts], None, 48)
    settings = replace(SETTINGS, steps=40, lr=1e-2, anchors=32, validate_every=40, save_every=None, max_new_tokens=16,
                       loss=(("ce", 1.0),) if kind == "dflash" else MIXED)  # fmt: skip
    torch.manual_seed(1)
    tokens = choose_draft_tokens(rows, 80, VOCAB)[0] if layout == "speculators" else None
    network = new_block(model, choose_mask_token(rows, model), tokens, 4, **KINDS[kind])
    runner, asked = specdec.ModelRunner(model, mode="eager"), prompts[:8].tolist()
    untrained = decode_prompts(runner, BlockDrafter(copy.deepcopy(network)), asked, 16).tokens_per_round
    records = train_block(model, network, rows, tmp_path / "run", settings, asked, progress=False)
    assert records[-1]["loss"] < 0.7 * records[0]["loss"] and records[-1]["tokens_per_round"] > 1.2 * untrained
    assert equal(model.parameters(), before)

    save_drafter(network, tmp_path / "drafter", layout, num_target_layers=model.config.num_hidden_layers)
    again = specdec.load_drafter(tmp_path / "drafter", runner)
    assert again.model.config == network.config
    ids, mask = ragged_prompts(4)
    for one, other in ((BlockDrafter(network), again), (BlockDrafter(network, growth=Growth(9, 3)), None)):
        made = [specdec.SpeculativeGenerator(runner, drafter).generate(ids, mask, max_new_tokens=16, seed=0)
                for drafter in (one, other or BlockDrafter(again.model, growth=Growth(9, 3)))]  # fmt: skip
        assert made[0].sequences.equal(made[1].sequences)
        assert made[0].stats.pooled.accepted == made[1].stats.pooled.accepted


def test_a_model_in_16_bits_trains_a_drafter_in_32(tmp_path):
    model = build("llama").bfloat16()
    _, (first, *_) = trained(tmp_path / "low", replace(SETTINGS, steps=2), model, PROMPTS)
    _, (same, *_) = trained(tmp_path / "high", replace(SETTINGS, steps=1))
    assert first["loss"] == pytest.approx(same["loss"], rel=0.05)


def test_the_mask_token_is_a_rare_one_with_an_embedding():
    model, tokens = build("llama"), torch.arange(VOCAB)[None].repeat(1, 2)
    rows = Rows(tokens, tokens, torch.zeros_like(tokens))
    assert choose_mask_token(rows, model) == VOCAB - 1
    rows.tokens[0, 7] = 8
    assert choose_mask_token(rows, model) == 7
    rows.tokens[rows.tokens == VOCAB - 3] = 8
    assert choose_mask_token(rows, model) == VOCAB - 3
    model.get_input_embeddings().weight.data[VOCAB - 3] = 0
    assert choose_mask_token(rows, model) == 7


def test_what_cannot_be_trained_is_refused(tmp_path):
    model = build("llama")
    count = model.config.num_hidden_layers
    selector = block_model(model, reduced=False, markov="selector", markov_rank=8, candidates=12)
    with pytest.raises(ValueError, match="trained in other ways, got markov 'selector'"):
        train_block(model, selector, some_rows(), tmp_path, SETTINGS, progress=False)
    with pytest.raises(ValueError, match="a block of 4 predicts 4 tokens, got num_tokens 5"):
        trained(tmp_path, replace(SETTINGS, num_tokens=5))
    with pytest.raises(ValueError, match=rf"\(0, {count}\) name the state after the last of {count} layers"):
        new_block(model, 2, target_layers=(0, count))
    with pytest.raises(ValueError, match=rf"mask_token must be a token below target_vocab_size {VOCAB}, got {VOCAB}"):
        new_block(model, VOCAB)
    with pytest.raises(ValueError, match="block_size must be at least 2.*, got 1"):
        new_block(model, 2, block_size=1)
    for bad in ((("mse", 1.0),), (("ce", 1.0), ("ce", 1.0)), ()):
        with pytest.raises(ValueError, match="loss must have some of ce, kl, tv, each once, got"):
            replace(SETTINGS, loss=bad)
    with pytest.raises(ValueError, match="weight of a loss must be a number above 0, got .*-1.0"):
        replace(SETTINGS, loss=(("ce", -1.0),))
    with pytest.raises(ValueError, match="gamma must be a number above 0, got 0"):
        replace(SETTINGS, gamma=0)
    with pytest.raises(ValueError, match="anchors must be at least 1, got 0"):
        replace(SETTINGS, anchors=0)


def test_a_model_that_scales_its_logits_trains_by_cross_entropy_without_confidence(tmp_path):
    config = transformers.GraniteConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, logits_scaling=8.0,
    )  # fmt: skip
    granite, only_ce = transformers.AutoModelForCausalLM.from_config(config).eval(), (("ce", 1.0),)
    for loss, kind, name in ((MIXED, "dflash", "tv"), (only_ce, "dspark", "confidence")):
        with pytest.raises(ValueError, match=f"GraniteForCausalLM scales or caps its logits .* '{name}' would"):
            trained(tmp_path, replace(SETTINGS, loss=loss), granite, kind=kind)
    trained(tmp_path / "granite", replace(SETTINGS, steps=1, loss=only_ce), granite, kind="dflash")
