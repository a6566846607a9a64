"""Training P-EAGLE: slots have the logits of decoding, dropped ones learn nothing, a file holds what learned."""

from dataclasses import replace

import pytest
import torch

import specdec
from specdec import ModelRunner
from specdec.drafters.eagle3.drafter import Eagle3Drafter, Eagle3Steps
from specdec.drafters.eagle3.saving import save_drafter
from specdec.model.feature_runner import FeatureRunner
from specdec.model.features import Features
from specdec.training.backbone import Backbone
from specdec.training.eagle3.network import new_eagle3
from specdec.training.eagle3.training import train_eagle3
from specdec.training.eagle3.unrolled import unroll_in_parallel
from specdec.training.labels import IGNORED
from specdec.training.network import choose_draft_tokens, choose_mask_token
from specdec.training.unrolled.loss import DraftLoss
from specdec.training.unrolled.marks import mark_depths
from tests.families import VOCAB, build
from tests.learned import eagle3_model
from tests.specdec.training.eagle3 import test_training as eagle3
from tests.specdec.training.eagle3.test_training import assert_same_drafts, learn, own_rows, some_rows
from tests.specdec.training.eagle3.test_unrolled import DEPTH, largest, packed_texts

SETTINGS = replace(eagle3.SETTINGS, keep=0.7)
VARIANTS = {"one layer": {}, "two layers, one with a window": {"num_layers": 2, "windows": (None, 5), "qk_norm": True}}


def network_for(model):
    """A new P-EAGLE network that drafts two tokens in three."""
    torch.manual_seed(1)
    tokens, _ = choose_draft_tokens(some_rows(), 64, VOCAB)
    return new_eagle3(model, tokens, mask_token=choose_mask_token(some_rows(), model))


def trained(folder, settings=SETTINGS, model=None, prompts=(), rows=None):
    model = build("llama") if model is None else model
    network = network_for(model).to(torch.promote_types(model.dtype, torch.float32))
    rows = some_rows() if rows is None else rows
    return network, train_eagle3(model, network, rows, folder, settings, prompts, progress=False)


@torch.no_grad()
def of_training(network, model, rows, marked=None):
    """Logits `[slot, B, S, V]` of the training forward."""
    features, _ = Backbone(model).features(rows.tokens, network.config.target_layers, rows.documents)
    outputs = unroll_in_parallel(network, rows.tokens, rows.documents, features, DEPTH, marked)
    return torch.stack([network.logits(output) for output in outputs]).unflatten(1, rows.tokens.shape)


@torch.no_grad()
def of_decoding(network, model, text):
    """Logits of one pass over pages for each anchor j of a text, the text up to it and the slots, `{(k, j): [V]}`."""
    target = ModelRunner(model, mode="eager")
    target.reserve([len(text)])
    given = Features(network.config.target_layers, "prompt")
    features = target.forward([target.cache.add()], torch.tensor(text), [len(text)], features=given).features
    runner, (masks, learned), found = FeatureRunner(Eagle3Steps(network)), network.mask_steps(DEPTH - 1), {}
    for anchor in range(len(text) - 1):
        runner.reserve([len(text) + DEPTH])
        sequence = runner.cache.add()
        tokens = torch.cat([torch.tensor(text[1 : anchor + 2]), masks])
        states = torch.cat([features[: anchor + 1], learned])
        output, _ = runner.forward([sequence], tokens, states, True, [len(tokens)])
        found |= {(slot, anchor): logits for slot, logits in enumerate(network.logits(output[-DEPTH:]))}
        runner.cache.free(sequence)
    return found


def distance(network, model) -> float:
    """The largest difference of any logit of any slot and anchor, over all packed texts."""
    texts, rows = packed_texts()
    return largest(of_training(network, model, rows), texts, rows, lambda text: of_decoding(network, model, text))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_slot_has_the_logits_of_decoding(variant):
    model = build("llama", spread=1.0)
    assert distance(eagle3_model(model, mask_token=3, **VARIANTS[variant]), model) < 1e-5


@pytest.mark.parametrize("planted", ["slots read each other's output", "windows of the anchor"])
def test_a_planted_bug_is_caught(planted, monkeypatch):
    model = build("llama", spread=1.0)
    network = eagle3_model(model, mask_token=3, **VARIANTS["two layers, one with a window"])
    if "output" in planted:
        forward, last = type(network).forward, []

        def fed(self, embedded, hidden, positions, attend):
            output, state = forward(self, embedded, hidden if not last else last[-1], positions, attend)
            last.append(state)
            return output, state

        _, rows = packed_texts()
        right = of_training(network, model, rows)
        monkeypatch.setattr(type(network), "forward", fed)
        assert (of_training(network, model, rows) - right).abs().max() > 1e-2
        return
    from specdec.training.unrolled.attention import UnrolledAttention

    made = UnrolledAttention.__init__
    monkeypatch.setattr(UnrolledAttention, "__init__", lambda *given, sliding: made(*given))
    assert distance(network, model) > 1e-2


def test_dropped_slots_change_no_other_and_run_not_at_all(monkeypatch):
    model = build("llama", spread=1.0)
    network = eagle3_model(model, mask_token=3)
    _, rows = packed_texts()
    whole = of_training(network, model, rows)
    marked = torch.randint(0, DEPTH + 1, rows.tokens.shape, generator=torch.Generator().manual_seed(3))
    counts, forward = [], type(network).forward

    def counted(self, embedded, *rest):
        counts.append(len(embedded))
        return forward(self, embedded, *rest)

    monkeypatch.setattr(type(network), "forward", counted)
    some = of_training(network, model, rows, marked)
    kept = torch.stack([marked > slot for slot in range(DEPTH)])
    kept[0] = True
    torch.testing.assert_close(some[kept], whole[kept], atol=1e-5, rtol=0)
    assert counts == kept.sum((1, 2)).tolist() and (some[~kept] == 0).all()


def test_the_share_that_is_kept_falls_and_what_learns_is_marked():
    rows, settings = some_rows(200).take(slice(None)), replace(SETTINGS, depth=6)
    loss = DraftLoss(network_for(build("llama")), None, "ce")
    labels = torch.stack([loss.labels(rows, step) for step in range(6)])
    found = mark_depths(rows, labels, settings, 3)
    for step in range(6):
        share = float((loss.labels(found, step) != IGNORED).sum() / (labels[step] != IGNORED).sum())
        assert share == pytest.approx(settings.kept(step), abs=0.06)
    for step in range(6):  # nobody runs a slot for nothing
        runs, learns = found.marked > step, loss.labels(found, step) != IGNORED
        assert not (learns & ~runs).any()
    deepest = found.marked.clamp(min=1)[None] - 1
    assert ((labels.gather(0, deepest)[0] != IGNORED) | (found.marked == 0)).all()
    assert torch.equal(found.marked, mark_depths(rows, labels, settings, 3).marked)
    assert not torch.equal(found.marked, mark_depths(rows, labels, settings, 4).marked)


def test_the_gradient_reaches_exactly_what_is_kept_and_an_answer():
    model, rows = build("llama"), some_rows(3).take(slice(None))
    network = network_for(model)
    loss = DraftLoss(network, model.lm_head, "kl")
    rows = mark_depths(rows, torch.stack([loss.labels(rows, step) for step in range(3)]), SETTINGS, 0)
    features, states = Backbone(model).features(rows.tokens, network.config.target_layers, rows.documents)
    outputs = unroll_in_parallel(network, rows.tokens, rows.documents, features.detach(), 3, rows.marked)
    for output in outputs:
        output.retain_grad()
    loss(outputs, states.detach(), loss.positions(rows, [1.0, 0.8, 0.64], model.device))[0].backward()
    for step, output in enumerate(outputs):
        reached = output.grad.abs().sum(-1).view(rows.tokens.shape) > 0
        for row in range(len(rows)):
            for place in range(rows.tokens.shape[1]):
                at = place % 12 + step + 2
                answer = at < 12 and at >= 5 + (2 * row + place // 12) % 3
                assert bool(reached[row, place]) == (answer and bool(rows.marked[row, place] > step))
    for name in ("mask_hidden", "embed_tokens.weight", "fc.weight"):
        assert network.get_parameter(name).grad.abs().sum() > 0, name


def test_a_drafter_learns_and_is_the_same_after_export(tmp_path):
    model = build("llama")
    rows, prompts = own_rows(model)
    torch.manual_seed(1)
    network = new_eagle3(model, choose_draft_tokens(rows, 80, VOCAB)[0], mask_token=choose_mask_token(rows, model))
    assert network.embed_tokens.weight.equal(model.get_input_embeddings().weight)
    learn(model, network, rows, tmp_path / "run", train_eagle3, lambda made: Eagle3Drafter(made, 3), prompts[:8])
    save_drafter(network, tmp_path / "drafter", num_tokens=3)
    again = specdec.load_drafter(tmp_path / "drafter", model)
    assert_same_drafts(model, Eagle3Drafter(network, 3), again)
    assert again.model.config.mask_token == network.config.mask_token
