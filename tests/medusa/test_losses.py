"""The loss of Medusa heads against a plain writing of it, gradients included, and what each head is asked for."""

import pytest
import torch
from torch import nn

from medusa import MedusaConfig, MedusaHeads
from medusa.losses import medusa_loss
from specdec.training import linear_loss
from specdec.training.labels import IGNORED, shifted_labels

VARIANTS = [{}, {"output": "shared"}, {"output": "low_rank", "rank": 3}]
VARIANTS += [{"bias": True, "biased": True}, {"output": "low_rank", "rank": 3, "biased": True}]


def problem(biased=False, **options):
    """Heads, a model's output layer (with a bias where it is `biased`), hidden states, labels, documents."""
    torch.manual_seed(0)
    lm_head = nn.Linear(8, 30, bias=biased).requires_grad_(False)
    heads = MedusaHeads(MedusaConfig(3, 1, 8, 30, **options), lm_head)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    labels = torch.randint(30, (2, 11))
    labels[0, :4] = IGNORED
    return heads, lm_head, torch.randn(2, 11, 8), labels, torch.tensor([[0] * 6 + [1] * 5, [0] * 11])


def plainly(heads, lm_head, hidden, labels, documents, decay):
    """One position, one head at a time."""
    total = 0.0
    for head in range(3):
        losses = []
        for row in range(2):
            for t in range(11 - head - 2):
                label = labels[row, t + head + 2]
                if label != IGNORED and (documents is None or documents[row, t] == documents[row, t + head + 2]):
                    losses.append(-heads(hidden[row, t], lm_head)[head].log_softmax(-1)[label])
        total = total + decay**head * torch.stack(losses).mean()
    return total


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("chunk", [1, 4, 1000])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("in_fp32", [1, 60, 2**24])  # of 30 logits a row: one row at a time, two, all
def test_loss_and_gradients_equal_a_plain_writing(options, chunk, packed, in_fp32, monkeypatch):
    monkeypatch.setattr(linear_loss, "LOGITS_IN_FP32", in_fp32)
    heads, lm_head, hidden, labels, documents = problem(**options)
    documents = documents if packed else None
    loss, each = medusa_loss(heads, hidden, labels, lm_head, documents, decay=0.7, chunk=chunk)
    expected = plainly(heads, lm_head, hidden, labels, documents, 0.7)
    torch.testing.assert_close(loss, expected)
    assert sum(0.7**k * x.item() for k, x in enumerate(each)) == pytest.approx(loss.item())
    for ours, theirs in zip(*(torch.autograd.grad(x, list(heads.parameters())) for x in (loss, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_each_head_is_asked_for_its_own_place():
    labels = torch.arange(10, 16)[None]
    assert shifted_labels(labels, 2).tolist() == [[12, 13, 14, 15, IGNORED, IGNORED]]
    assert shifted_labels(labels, 4).tolist() == [[14, 15, *[IGNORED] * 4]]
    assert shifted_labels(labels, 11).tolist() == [[IGNORED] * 6]
    assert shifted_labels(labels, 2, torch.tensor([[0, 0, 0, 1, 1, 1]])).tolist() == [
        [12, IGNORED, IGNORED, 15, IGNORED, IGNORED]
    ]


def test_masked_tokens_get_no_gradient():
    """The first seven tokens are a user's: positions 0 to 2 have no other label within three heads' reach, and the last
    two have none at all.
    """
    heads, lm_head, hidden, labels, _ = problem()
    labels[0, :7] = IGNORED
    states = hidden.requires_grad_(True)
    (by_state,) = torch.autograd.grad(medusa_loss(heads, states, labels, lm_head)[0], states)
    reached = by_state.abs().sum(-1) > 0
    assert (
        reached[0].tolist() == [False] * 3 + [True] * 6 + [False] * 2
        and reached[1].tolist() == [True] * 9 + [False] * 2
    )


def test_heads_learn_a_copy_task_at_their_own_shift():
    """Texts in which token t + k + 2 follows from token t: each head gets it right after a few steps, and only at its
    own shift.
    """
    torch.manual_seed(0)
    vocabulary = 12
    embedding = torch.randn(vocabulary, 16)
    lm_head = nn.Linear(16, vocabulary, bias=False)
    heads = MedusaHeads(MedusaConfig(2, 1, 16, vocabulary), lm_head)
    labels = (
        torch.randint(vocabulary, (32, 1)) + 5 * torch.arange(20)
    ) % vocabulary  # every token is the one before plus 5
    hidden = embedding[labels]
    optimiser = torch.optim.AdamW(heads.parameters(), lr=0.02)
    for _ in range(60):
        loss, _ = medusa_loss(heads, hidden, labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        said = heads(hidden).argmax(-1)
    for head in range(2):
        assert (said[head] == (labels + 5 * (head + 2)) % vocabulary).all()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("in_fp32", [1, 60, 2**24])
def test_divergence_and_its_gradient_equal_a_plain_writing(in_fp32, bias, monkeypatch):
    monkeypatch.setattr(linear_loss, "LOGITS_IN_FP32", in_fp32)
    torch.manual_seed(0)
    layer, teacher, states = nn.Linear(8, 30, bias=bias), torch.randn(7, 8), torch.randn(7, 8, requires_grad=True)
    log_p, log_q = layer(teacher).log_softmax(-1).detach(), layer(states).log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum()
    loss = linear_loss.linear_divergence(layer, states, teacher, list(layer.parameters()), chunk=3)
    torch.testing.assert_close(loss, expected)
    inputs = [states, *layer.parameters()]
    for ours, theirs in zip(*(torch.autograd.grad(x, inputs) for x in (loss, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_layer_that_needs_its_own_result_is_refused():
    """The logits are overwritten, which torch notices when their values are asked for."""
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        linear_loss.linear_cross_entropy(
            torch.tanh, torch.randn(3, 5, requires_grad=True), torch.tensor([0, 1, 2]), [], chunk=3
        )


def test_a_text_in_which_nothing_is_to_be_learned_is_refused():
    heads, lm_head, hidden, labels, _ = problem()
    with pytest.raises(ValueError, match="head 0 has nothing to learn"):
        medusa_loss(heads, hidden, torch.full_like(labels, IGNORED), lm_head)
    with pytest.raises(ValueError, match="chunk"):
        medusa_loss(heads, hidden, labels, lm_head, chunk=0)
