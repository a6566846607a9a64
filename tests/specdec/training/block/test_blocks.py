"""What trains is what decodes: a block's logits in training are those of the decoding pass after the same anchor."""

from functools import cache, partial

import pytest
import torch

import specdec
from specdec.drafters.block.dense import block_places, slot_logits
from specdec.drafters.block.drafter import BlockDrafter
from specdec.drafters.block.state import BlockState
from specdec.drafters.model import ModelDraftSession
from specdec.training.backbone import Backbone
from specdec.training.block import blocks
from specdec.training.block.anchors import slot_labels
from specdec.training.block.blocks import PackedBlocks, run_blocks
from specdec.training.block.loss import tokens_before
from specdec.training.data import Rows, pack
from tests.families import VOCAB, build, ragged_prompts
from tests.learned import block_model, features_of, fitted_block

LAYERS = dict(num_layers=2, windows=(None, 3), causal=(False, True))
HEADS = {kind: dict(markov=kind, markov_rank=8) for kind in ("vanilla", "gated", "rnn")} | {"none": {}}


@cache
def target_model():
    return build("llama", spread=1.0)


@pytest.fixture
def proposals(monkeypatch):
    """Of each proposal: the rows' texts, the drafted tokens `[A, K]`, and the logits that gave them, K of `[A, V]`."""
    seen, catch_up, run, draft = [], BlockState.catch_up, BlockState.run, ModelDraftSession._draft

    def begin(state, batch):
        texts = [batch.rows.tokens[row.slot, : row.length].clone() for row in batch.members]
        seen.append([texts, None, [catch_up(state, batch)]])
        return seen[-1][2][0]

    def note(state, batch, tokens, tree=None, above=None):
        found = run(state, batch, tokens, tree, above)
        seen[-1][2].append(found[:, 0].clone())
        return found

    def keep(session, batch, tree):
        made = draft(session, batch, tree)
        seen[-1][1] = made.tokens[:, 1:].clone()
        return made

    monkeypatch.setattr(BlockState, "catch_up", begin)
    monkeypatch.setattr(BlockState, "run", note)
    monkeypatch.setattr(ModelDraftSession, "_draft", keep)
    return seen


def packed(*texts) -> Rows:
    """One row of these texts, all of which is learned."""
    pieces = [(list(map(int, text)), list(map(int, text))) for text in texts]
    return pack(pieces, sum(map(len, texts))).take(slice(None))


@torch.no_grad()
def trained(network, rows: Rows, anchors, shift=0):
    """`[M, K, V_draft]` of the training forward, each slot after the row's own tokens; `shift` plants a bug."""
    backbone = Backbone(target_model())
    features = backbone.features(rows.tokens, network.config.target_layers, rows.documents)[0].roll(shift, 1)
    places = run_blocks(network, rows.tokens, rows.documents, features, anchors)
    return slot_logits(network, places, tokens_before(rows.tokens, anchors, network.config.num_slots))


def distance(network, proposals, **planted) -> float:
    """The largest difference of any logit of any proposal; the text that was drafted lies between two others."""
    worst, others = 0.0, ([7, 9, 11, 2, 5], [8, 3, 8])
    specdec.SpeculativeGenerator(target_model(), BlockDrafter(network), mode="eager").generate(
        *ragged_prompts(2, longest=9), max_new_tokens=6
    )
    assert len(proposals) > 2
    for texts, drafted, logits in proposals:
        for row, text in enumerate(texts):
            rows, anchor = packed(others[0], [*text, *drafted[row]], others[1]), len(others[0]) + len(text) - 1
            ours = network.over_target(trained(network, rows, torch.tensor([anchor]), **planted)[0])
            theirs = torch.stack([of_level[row] for of_level in logits])
            worst = max(worst, float((ours - theirs).nan_to_num(0.0).abs().max()))  # inf - inf: never drafted
            if not planted:
                assert ours.isinf().equal(theirs.isinf())
                labels = slot_labels(rows, network.config.num_slots)[0, anchor]
                assert labels.equal(drafted[row]) and ours.argmax(-1).equal(drafted[row])
    return worst


@pytest.mark.covering
@pytest.mark.parametrize("from_anchor", [False, True])
@pytest.mark.parametrize("markov", HEADS)
def test_training_scores_the_tokens_that_decoding_proposes_by_the_same_logits(markov, from_anchor, proposals):
    network = fitted_block(target_model(), from_anchor=from_anchor, **LAYERS, **HEADS[markov])
    assert distance(network, proposals) < 1e-5


@pytest.mark.parametrize("from_anchor", [False, True])
@pytest.mark.parametrize("planted", ["context off by one", "the anchor's features in the context"])
def test_a_planted_bug_is_caught(planted, from_anchor, proposals, monkeypatch):
    network = fitted_block(target_model(), from_anchor=from_anchor, **LAYERS, **HEADS["vanilla"])
    if "off" in planted:
        assert distance(network, proposals, shift=1) > 1e-2
        return

    class Later(PackedBlocks):
        def __init__(self, config, documents, anchors, device):
            super().__init__(config, documents, anchors + 1, device)

    monkeypatch.setattr(blocks, "PackedBlocks", Later)
    assert distance(network, proposals, shift=0) > 1e-2


def two_rows() -> Rows:
    """Two rows of two texts each, the second one with padding."""
    generator = torch.Generator().manual_seed(2)
    texts = [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in (9, 7, 8, 5)]
    return pack([(text, text) for text in texts], 16).take(slice(None))


ANCHORS = torch.tensor([1, 4, 5, 8, 10, 15, 16 + 3, 16 + 9, 16 + 12])


@torch.no_grad()
def test_features_at_or_after_an_anchor_and_of_other_texts_move_nothing_of_its_block():
    rows, network = two_rows(), block_model(target_model(), markov="gated", markov_rank=8)
    features = Backbone(target_model()).features(rows.tokens, network.config.target_layers, rows.documents)[0]
    tokens = tokens_before(rows.tokens, ANCHORS, 3)
    run = lambda given: slot_logits(network, run_blocks(network, rows.tokens, rows.documents, given, ANCHORS), tokens)
    before, texts = run(features), rows.documents.flatten() + 10 * torch.arange(2).repeat_interleave(16)
    for token in range(rows.tokens.numel()):
        moved = features.clone()
        moved.flatten(0, 1)[token] += 1
        differs = (run(moved) != before).flatten(1).any(1)
        assert differs.equal((token < ANCHORS) & (texts[token] == texts[ANCHORS])), token


@pytest.mark.parametrize("window", [None, 3])
def test_states_and_gradients_are_those_of_dense_attention(window):
    network = block_model(target_model(), num_layers=2, windows=(window, None), causal=(True, False))
    require_dense(network, two_rows(), ANCHORS)


def test_the_flash_kernel_gives_them_too(monkeypatch):
    """A small problem, since the interpreter is slow: a group of queries with a window, inside the block both ways."""
    pytest.importorskip("triton")
    monkeypatch.setattr(blocks, "resolve", lambda impl, device: "triton")
    monkeypatch.setattr(blocks, "flash_attention", partial(blocks.flash_attention, impl="triton"))
    network = block_model(target_model(), block_size=2, num_heads=2, num_kv_heads=1, windows=(3,))
    require_dense(network, packed([5, 9, 13, 4, 6, 7]), torch.tensor([2, 4]))


def require_dense(network, rows, anchors):
    """The blocks of packed texts, and their gradients, are those of each text alone with dense attention."""
    model, size, theirs = target_model(), rows.tokens.shape[1], []
    features = Backbone(model).features(rows.tokens, network.config.target_layers, rows.documents)[0].detach()
    ours = run_blocks(network, rows.tokens, rows.documents, features, anchors)
    for row, of_row in enumerate(rows.documents):
        for number in range(int(of_row.max()) + 1):
            places = (of_row == number).nonzero()[:, 0]
            mine = anchors[torch.isin(anchors, places + row * size)] - row * size - places[0]
            assert len(mine)
            text = rows.tokens[row, places]
            theirs.append(block_places(network, features_of(network, model, text).detach(), text, mine))
    torch.testing.assert_close(ours, torch.cat(theirs), atol=1e-5, rtol=1e-4)
    parameters = [weight for name, weight in network.named_parameters() if name.startswith(("fc", "layers", "norm"))]
    found = (torch.autograd.grad(given.sin().sum(), parameters) for given in (ours, torch.cat(theirs)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_an_anchor_without_context_is_refused():
    rows, network = two_rows(), block_model(target_model())
    features = torch.zeros(2, 16, network.config.feature_size)
    with pytest.raises(ValueError, match="an anchor needs a token before it in its text, and place 9 has none"):
        run_blocks(network, rows.tokens, rows.documents, features, torch.tensor([4, 9]))
