"""Training EAGLE-3: which positions learn what, and that nothing but the rows changes a run."""

import copy
from dataclasses import replace

import pytest
import torch
import transformers

import specdec
from specdec.drafters.eagle3.drafter import Eagle3Drafter
from specdec.drafters.eagle3.saving import save_drafter
from specdec.training.acceptance import decode_prompts
from specdec.training.backbone import Backbone
from specdec.training.data import Rows, build_rows
from specdec.training.eagle3.network import new_eagle3
from specdec.training.eagle3.training import train_eagle3
from specdec.training.eagle3.unrolled import unroll
from specdec.training.labels import IGNORED
from specdec.training.network import choose_draft_tokens
from specdec.training.unrolled import loss as losses
from specdec.training.unrolled.loss import DraftLoss
from specdec.training.unrolled.settings import UnrolledSettings
from tests.families import VOCAB, build, ragged_prompts

SETTINGS = UnrolledSettings(6, batch=4, rows_at_once=2, lr=3e-3, depth=3, log_every=1, save_every=3, validate_every=3,
                          num_tokens=3, max_new_tokens=8)  # fmt: skip
PROMPTS = [[5, 9, 13], [7, 3]]


def some_rows(count=12) -> Rows:
    """Two texts a row, of which the second half is an answer each."""
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(3, VOCAB, (2 * count, 12), generator=generator).tolist()
    return build_rows([{"tokens": text, "learned_from": 5 + i % 3} for i, text in enumerate(texts)], None, 24)


def network_for(model, **fields):
    """A new network that drafts two tokens in three."""
    torch.manual_seed(1)
    tokens, _ = choose_draft_tokens(some_rows(), 64, VOCAB)
    return new_eagle3(model, tokens, **fields)


def trained(folder, settings=SETTINGS, model=None, prompts=(), rows=None):
    model = build("llama") if model is None else model
    network = network_for(model).to(torch.promote_types(model.dtype, torch.float32))
    rows = some_rows() if rows is None else rows
    return network, train_eagle3(model, network, rows, folder, settings, prompts, progress=False)


def untimed(records):
    return [{name: value for name, value in record.items() if name != "tokens_per_second"} for record in records]


def equal(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("kind", ["kl", "tv", "ce"])
def test_the_gradient_reaches_exactly_the_tokens_of_answers(kind):
    model, rows = build("llama"), some_rows(3).take(slice(None))
    network = network_for(model)
    features, states = Backbone(model).features(rows.tokens, network.config.target_layers, rows.documents)
    outputs = unroll(network, rows.tokens, rows.documents, features.detach(), 3)
    for output in outputs:
        output.retain_grad()
    loss = DraftLoss(network, model.lm_head, kind)
    loss(outputs, states.detach(), loss.positions(rows, [1.0, 0.8, 0.64], model.device))[0].backward()
    drafted = set(network.draft_tokens.tolist())
    for step, output in enumerate(outputs):
        reached = output.grad.abs().sum(-1).view(rows.tokens.shape) > 0
        for row in range(len(rows)):
            for place in range(rows.tokens.shape[1]):
                # each text has 12 tokens, of which those from 5 + i % 3 on are the answer
                at = place % 12 + step + 2
                learned = at < 12 and at >= 5 + (2 * row + place // 12) % 3
                if kind == "ce" and learned:
                    learned = int(rows.tokens[row, place + step + 2]) in drafted
                assert bool(reached[row, place]) == learned, (step, row, place)


@pytest.mark.parametrize("kind", ["kl", "tv", "ce"])
def test_losses_and_gradients_equal_a_plain_writing(kind, monkeypatch):
    model, rows = build("llama").double(), some_rows(3).take(slice(None))
    network = network_for(model).double()
    features, states = (x.detach() for x in Backbone(model).features(rows.tokens, (0, 1, 2), rows.documents))
    outputs = unroll(network, rows.tokens, rows.documents, features, 3)
    loss, weights, held, linear = DraftLoss(network, model.lm_head, kind, chunk=7), [1.0, 0.8, 0.64], [], losses.linear
    monkeypatch.setattr(losses, "linear", lambda x, weight: held.append(len(x)) or linear(x, weight))
    total, sums = loss(outputs, states, loss.positions(rows, weights, model.device))
    assert max(held) == 7 and sum(held) == sum(loss.count(rows, 3))  # no more logits exist at a time
    plain = torch.zeros(3, dtype=torch.float64)
    for step, output in enumerate(outputs):
        wanted, q = loss.labels(rows, step).flatten(), network.logits(output).log_softmax(-1)
        p = model.lm_head(states)[..., network.draft_tokens].log_softmax(-1).flatten(0, 1).roll(-1 - step, 0).detach()
        if kind == "ce":
            each = -q.gather(1, wanted.clamp(min=0)[:, None])[:, 0]
        else:
            each = (p.exp() * (p - q)).sum(-1) if kind == "kl" else (p.exp() - q.exp()).abs().sum(-1) / 2
        plain[step] = each[wanted != IGNORED].sum()
    torch.testing.assert_close(sums, plain.detach())
    parameters = [p for p in network.parameters() if p.requires_grad]
    ours = torch.autograd.grad(total, parameters, retain_graph=True)
    theirs = torch.autograd.grad((plain * torch.tensor(weights)).sum(), parameters)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_without_checkpoints_none_is_written(tmp_path):
    _, records = trained(tmp_path / "with", replace(SETTINGS, steps=2))
    _, same = trained(tmp_path / "without", replace(SETTINGS, steps=2, save_every=None))
    assert untimed(records) == untimed(same) and not list((tmp_path / "without").iterdir())
    with pytest.raises(ValueError, match="save_every must be at least 1, got 0"):
        replace(SETTINGS, save_every=0)


def own_rows(model):
    """Texts of the model's own, and their beginnings as prompts."""
    generator = specdec.AutoregressiveGenerator(model)
    prompts = torch.randint(3, VOCAB, (24, 4), generator=torch.Generator().manual_seed(4))
    texts = generator.generate(prompts, max_new_tokens=20).sequences.tolist()
    return build_rows([{"tokens": text, "learned_from": 4} for text in texts], None, 48), prompts.tolist()


def learn(model, network, rows, folder, train, make, prompts) -> None:
    """Train for some steps; the loss falls, the acceptance length, which is measured, rises, the model stays."""
    before = [weight.clone() for weight in model.parameters()]
    settings = replace(SETTINGS, steps=32, lr=1e-2, validate_every=32, max_new_tokens=16)
    runner = specdec.ModelRunner(model, mode="eager")
    untrained = decode_prompts(runner, make(copy.deepcopy(network)), prompts, 16).tokens_per_round
    records = train(model, network, rows, folder, settings, prompts, progress=False)
    assert records[-1]["loss"] < 0.5 * records[0]["loss"] and records[-1]["tokens_per_round"] > 1.2 * untrained
    assert equal(model.parameters(), before)


def assert_same_drafts(model, one, other) -> None:
    """Two drafters give the same text, and the same of it is accepted."""
    ids, mask = ragged_prompts(4)
    outs = [
        specdec.SpeculativeGenerator(model, drafter, mode="eager").generate(ids, mask, max_new_tokens=16, seed=0)
        for drafter in (one, other)
    ]
    accepted = [out.stats.pooled.accepted for out in outs]
    assert outs[0].sequences.equal(outs[1].sequences) and accepted[0] == accepted[1] and sum(accepted[0]) > 0


def test_a_drafter_learns_and_is_the_same_after_export(tmp_path):
    model = build("llama")
    rows, prompts = own_rows(model)
    torch.manual_seed(1)
    network = new_eagle3(model, choose_draft_tokens(rows, 80, VOCAB)[0])
    learn(model, network, rows, tmp_path / "run", train_eagle3, lambda made: Eagle3Drafter(made, 3), prompts[:8])
    save_drafter(network, tmp_path / "drafter", num_tokens=3)
    assert_same_drafts(model, Eagle3Drafter(network, 3), specdec.load_drafter(tmp_path / "drafter", model))


def test_the_most_frequent_tokens_are_drafted():
    labels = torch.tensor([[5, 5, 5, 9, 9, 2, 7, IGNORED]]).int()
    rows = Rows(labels.clamp(min=0), labels, torch.zeros_like(labels))
    tokens, share = choose_draft_tokens(rows, 3, 12)
    assert tokens.tolist() == [2, 5, 9] and share == pytest.approx(6 / 7)
    assert choose_draft_tokens(rows, 12, 12) == (None, 1.0)
    with pytest.raises(ValueError, match="has 1 to 12 tokens, got 13"):
        choose_draft_tokens(rows, 13, 12)


def test_what_cannot_be_trained_is_refused(tmp_path):
    with pytest.raises(ValueError, match="keep must lie above 0 and up to 1, got 1.5"):
        replace(SETTINGS, keep=1.5)
    config = transformers.GraniteConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, logits_scaling=8.0,
    )  # fmt: skip
    granite = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ValueError, match="GraniteForCausalLM scales or caps its logits"):
        trained(tmp_path, model=granite)
    trained(tmp_path / "granite", replace(SETTINGS, loss="ce"), model=granite)
    with pytest.raises(ValueError, match="loss must be one of kl, ce, tv, got 'mse'"):
        replace(SETTINGS, loss="mse")
    trained(tmp_path)
    with pytest.raises(ValueError, match=r"other settings .*'depth': \(3, 2\)"):
        trained(tmp_path, replace(SETTINGS, depth=2))
