"""The losses of a block drafter: which slots learn, what of, and that nothing else has a gradient or is counted."""

import pytest
import torch
from torch.nn import functional

from specdec.drafters.block.dense import slot_logits
from specdec.training import linear_loss
from specdec.training.backbone import Backbone
from specdec.training.block import loss as losses
from specdec.training.block.anchors import mark_anchors, slot_labels
from specdec.training.block.blocks import run_blocks
from specdec.training.block.loss import BlockLoss, tokens_before
from specdec.training.data import Rows
from specdec.training.labels import IGNORED
from tests.families import build
from tests.learned import block_model
from tests.specdec.training.eagle3.test_training import some_rows

DSPARK = (("ce", 0.1), ("tv", 0.9))
KINDS = {
    "DFlash, cross-entropy": (dict(), (("ce", 1.0),)),
    "DFlash, divergence": (dict(softcap=5.0), (("kl", 1.0),)),
    "DSpark": (dict(from_anchor=True, markov="vanilla", markov_rank=8, confidence="markov"), DSPARK),
    "DSpark, gated": (dict(markov="gated", markov_rank=8, confidence="hidden"), (("ce", 1.0),)),
    "DSpark, rnn": (dict(markov="rnn", markov_rank=8, output_scale=0.5), DSPARK),
}
WEIGHTS = [0.5, 0.3, 0.2, 0.1]


def marked(network, parts, most=3, count=3) -> tuple[BlockLoss, Rows]:
    """The loss, with chunks of 7 positions, and rows with at most `most` anchors marked in each."""
    loss, rows = BlockLoss(network, build("llama").lm_head, parts, chunk=7), some_rows(count).take(slice(None))
    return loss, mark_anchors(rows, loss.labels(rows), most, torch.Generator().manual_seed(0))


def computed(network, loss, rows):
    """Total, sums, the places' states, and the target's."""
    model = build("llama").to(network.fc.weight.dtype)
    features, states = (x.detach() for x in Backbone(model).features(rows.tokens, network.config.target_layers,
                                                                     rows.documents))  # fmt: skip
    anchors, positions = loss.positions(rows, WEIGHTS[: network.config.num_slots], model.device)
    places = run_blocks(network, rows.tokens, rows.documents, features, anchors)
    before = tokens_before(rows.tokens, anchors, network.config.num_slots)
    places.retain_grad()
    return *loss(places, before, states, positions, 0.25), places, before, anchors, states


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_equal_a_plain_writing(kind, monkeypatch):
    options, parts = KINDS[kind]
    network = block_model(build("llama").double(), **options)
    loss, rows = marked(network, parts)
    held, linear = [], losses.linear
    monkeypatch.setattr(linear_loss, "LOGITS_IN_FP32", 200)  # two positions at a time
    monkeypatch.setattr(losses, "linear", lambda x, weight: held.append(len(x)) or linear(x, weight))
    total, sums, places, before, anchors, states = computed(network, loss, rows)
    wanted = loss.labels(rows).flatten(0, 1)[anchors]
    learned, slots = wanted != IGNORED, network.config.num_slots
    if "markov" in options:
        assert max(held) == 7 and sum(held) == int(learned.sum())  # no more logits exist at a time

    q = slot_logits(network, places, before).log_softmax(-1)
    at = (anchors[:, None] + torch.arange(slots)).clamp(max=rows.tokens.numel() - 1)
    p = build("llama").double().lm_head(states.flatten(0, 1)[at])[..., network.draft_tokens].log_softmax(-1).detach()
    drafted = torch.full((network.config.target_vocab_size,), IGNORED)
    drafted[network.draft_tokens] = torch.arange(len(network.draft_tokens))
    label = torch.where(learned, drafted[wanted.clamp(min=0)], IGNORED)
    each = {
        "ce": torch.where(label == IGNORED, 0, -q.gather(2, label.clamp(min=0)[..., None])[..., 0]),
        "kl": (p.exp() * (p - q)).sum(-1), "tv": (p.exp() - q.exp()).abs().sum(-1) / 2,
    }  # fmt: skip
    plain = torch.where(learned, sum(weight * each[name] for name, weight in parts), 0).sum(0)
    expected, plain_total = [plain], (plain * torch.tensor(WEIGHTS[:slots])).sum()
    accepted = torch.minimum(p.exp(), q.exp()).sum(-1).detach()[learned]
    if "rejected" in loss.sums:
        expected.append((1 - accepted).sum()[None])
    if network.confidence_head is not None:
        sure = network.accepted(network.slots(places).detach(), before)[learned]
        lost = functional.binary_cross_entropy(sure.sigmoid(), accepted, reduction="sum")
        expected, plain_total = [*expected, lost[None]], plain_total + 0.25 * lost
    torch.testing.assert_close(sums, torch.cat(expected).detach())
    assert loss.count(rows) == learned.sum(0).tolist() + [int(learned.sum())] * len(loss.sums)

    named = [(name, weight) for name, weight in network.named_parameters() if "embed_tokens" not in name]
    ours = torch.autograd.grad(total, [weight for _, weight in named], retain_graph=True, allow_unused=True)
    theirs = torch.autograd.grad(plain_total, [weight for _, weight in named], allow_unused=True)
    for (name, _), one, other in zip(named, ours, theirs, strict=True):
        if name == "markov_head.markov_w1.weight" and network.config.confidence == "markov":
            continue  # the confidence head's loss moves that head alone: the plain writing moves this table too
        assert one is not None, name
        torch.testing.assert_close(one, other, msg=name)


def test_the_confidence_heads_loss_moves_that_head_alone():
    network = block_model(build("llama"), **KINDS["DSpark"][0])
    loss, rows = marked(network, DSPARK)
    total, *rest = computed(network, loss, rows)
    found = []
    for weight in (0.25, 4.0):
        _, places, before, anchors, states = rest
        _, positions = loss.positions(rows, WEIGHTS, places.device)
        total, _ = loss(places, before, states, positions, weight)
        names = [name for name, _ in network.named_parameters() if "embed_tokens" not in name]
        gradients = torch.autograd.grad(total, [network.get_parameter(name) for name in names], retain_graph=True)
        found.append(dict(zip(names, gradients, strict=True)))
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]) != name.startswith("confidence_head"), name


@pytest.mark.parametrize("kind", KINDS)
def test_only_slots_of_marked_anchors_that_hold_answers_have_a_gradient(kind):
    """Places without a label, after the text's end too, have exactly none."""
    options, parts = KINDS[kind]
    network = block_model(build("llama"), **options)
    loss, rows = marked(network, parts)
    total, _, places, _, anchors, _ = computed(network, loss, rows)
    total.backward()
    wanted, slots = loss.labels(rows).flatten(0, 1)[anchors], network.config.num_slots
    reached = places.grad.abs().sum(-1) > 0
    learned = wanted != IGNORED
    if parts == (("ce", 1.0),):  # the confidence head learns from tokens too that cannot be drafted
        learned &= torch.isin(wanted, network.draft_tokens)
    if "rnn" in kind:  # its state goes through the earlier places
        learned = learned.flip(1).cummax(1).values.flip(1)
        assert not (reached[:, -slots:] & ~learned).any()
    else:
        assert reached[:, -slots:].equal(learned)
        assert not reached[:, :-slots].any()
    assert learned.any() and not learned.all()


@pytest.mark.parametrize("kind", KINDS)
def test_anchors_that_were_dropped_change_nothing(kind):
    """Labels that only they see make no difference to losses, counts and gradients, bit by bit."""
    options, parts = KINDS[kind]
    network = block_model(build("llama"), **options)
    loss, rows = marked(network, parts)
    assert rows.marked.sum(1).tolist() == [3, 3, 3]
    seen = torch.zeros_like(rows.marked)
    for row, place in rows.marked.nonzero():
        seen[row, place + 1 : place + 1 + network.config.num_slots] = True
    fewer = Rows(rows.tokens, torch.where(seen, rows.labels, IGNORED), rows.documents, rows.marked)
    assert (fewer.labels != rows.labels).any() and loss.count(fewer) == loss.count(rows)
    found = []
    for given in (rows, fewer):
        total, sums, *_ = computed(network, loss, given)
        network.zero_grad()
        total.backward()
        found.append([total.detach(), sums, *(weight.grad for weight in network.parameters())])
    assert all(one is other is None or torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_anchors_are_random_ones_with_context_and_an_answer_in_their_block():
    rows = some_rows(3).take(slice(None))
    labels, place = slot_labels(rows, 3), torch.arange(24)
    generator = torch.Generator().manual_seed(1)
    every = mark_anchors(rows, labels, 24, generator).marked
    for row in range(3):
        # each text has 12 tokens, of which those from 5 + i % 3 on are the answer
        begins = 5 + (2 * row + place // 12) % 3
        expected = (place % 12 > 0) & (place % 12 + 3 >= begins) & (place % 12 < 11)
        assert every[row].equal(expected)
    drawn = torch.stack([mark_anchors(rows, labels, 4, generator).marked for _ in range(200)])
    assert (drawn.sum(2) == 4).all() and not drawn[:, ~every].any()
    assert drawn[:, every].float().mean(0).sub(4 / every.sum(1)[0]).abs().max() < 0.15
