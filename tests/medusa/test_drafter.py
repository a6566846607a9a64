"""Medusa's drafter in the loop beyond what holds for every drafter (tests/specdec/drafters/test_every_drafter.py)."""

import pytest
import torch
from torch import nn

import specdec
from medusa import MedusaConfig, MedusaDrafter, MedusaGenerator, MedusaHeads
from specdec import TokenTree
from specdec.model.fusion.projections import fuse_projections
from tests.families import CONFIGS, OUTPUT_BIAS, build, ragged_prompts
from tests.matrix import TREE, WIDE, random_heads

TREES = {"widths": WIDE, "chain": TokenTree.chain(3), "lopsided": TREE}


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("family", sorted(CONFIGS | OUTPUT_BIAS))
def test_greedy_equals_transformers_on_every_family(family, batch):
    model = build(family)
    ids, mask = ragged_prompts(batch)
    expected = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=24)
    out = MedusaGenerator(model, random_heads(model), WIDE).generate(ids, mask, max_new_tokens=24)
    assert out.sequences.equal(expected)


@pytest.mark.covering
@pytest.mark.parametrize("options", [{}, {"output": "shared"}, {"output": "low_rank", "rank": 8}], ids=str)
@pytest.mark.parametrize("tree", TREES)
def test_every_tree_and_kind_of_output_is_greedy_exact(tree, options):
    model = build("llama")
    ids, mask = ragged_prompts(3)
    expected = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=20)
    assert (
        MedusaGenerator(model, random_heads(model, **options), TREES[tree])
        .generate(ids, mask, max_new_tokens=20)
        .sequences.equal(expected)
    )


def test_each_node_holds_its_ranks_choice_of_its_depths_head():
    model, drafts = build("llama"), []

    def recording(draft, scores, noise):
        drafts.append(draft)
        return specdec.greedy(draft, scores, noise)

    heads, prompt = random_heads(model), torch.tensor([[5, 9, 11, 40]])
    out = MedusaGenerator(model, heads, TREE, rule=recording).generate(prompt, max_new_tokens=8)
    assert drafts[0].tree.size == 1 and drafts[1].tree.size == 8
    with torch.no_grad():
        state = model.model(prompt).last_hidden_state[0, -1]
        best = heads(state).topk(2).indices
    tree, tokens = TREE.by_level(), drafts[1].tokens[0].tolist()
    assert tokens[0] == out.sequences[0, 4]
    assert tokens[1:] == [
        int(best[depth - 1, rank]) for depth, rank in zip(tree.depths[1:], tree.ranks[1:], strict=True)
    ]


def test_heads_that_are_always_right_are_accepted_whole():
    """A target that repeats its token: heads that are the model's own head are then right at every depth."""
    model = build("llama")
    with torch.no_grad():  # the token's own embedding decides
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    out = MedusaGenerator(model, MedusaHeads.for_model(model, 3), TokenTree.chain(3)).generate(
        torch.tensor([[5, 6, 7]]), max_new_tokens=30
    )
    assert set(out.stats.pooled.emitted[1:-1]) == {4}


def test_heads_of_another_model_or_too_few_of_them_are_refused():
    model = build("llama")
    with pytest.raises(ValueError, match="depth 1 to 2, got depth 3"):
        MedusaDrafter(random_heads(model, 2), TokenTree.chain(3))
    other = MedusaHeads(MedusaConfig(2, 1, 8, 20), nn.Linear(8, 20, bias=False))
    with pytest.raises(ValueError, match=r"another model: \[V, H\]"):
        MedusaGenerator(model, other)


def test_a_shape_deeper_than_the_heads_is_refused_and_auto_does_not_ask_for_one():
    model = build("llama")
    with pytest.raises(ValueError, match="2 levels cannot draft a tree of depth 6"):
        specdec.SpeculativeGenerator(
            model, MedusaDrafter(random_heads(model, 2), TokenTree.chain(2)), tree=TokenTree.chain(6)
        )
    generator = specdec.SpeculativeGenerator(
        model, MedusaDrafter(MedusaHeads.for_model(model, 2), TokenTree.chain(2)), tree="auto"
    )
    shapes = generator.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=60).stats.pooled.shapes
    assert all(int(shape.split()[-1]) <= 2 for shape in shapes if shape != "plain")


def test_a_generator_of_heads_takes_automatic_shapes():
    model, (ids, mask) = build("llama"), ragged_prompts(2)
    out = MedusaGenerator(model, random_heads(model, 3), tree="auto").generate(ids, mask, max_new_tokens=20)
    assert out.sequences.equal(model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=20))
    with pytest.raises(ValueError, match="\"auto\" or None .* got 'other'"):
        MedusaGenerator(model, random_heads(model, 3), tree="other")


def test_two_merged_drafters_without_a_proposal_propose_nothing():
    model = build("llama")
    ids, mask = ragged_prompts(2)
    expected = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=12)
    drafter = specdec.MergedDrafter(MedusaDrafter(random_heads(model)), MedusaDrafter(random_heads(model, seed=1)))
    assert specdec.SpeculativeGenerator(model, drafter).generate(ids, mask, max_new_tokens=12).sequences.equal(expected)


def test_rounds_are_captured_again_after_the_heads_weights_have_moved():
    """By another runner that fuses them, or by hand: a captured round reads weights by address."""
    model, prompt = build("llama"), torch.tensor([[5, 6, 7]])
    heads = random_heads(model, 2)
    runner = specdec.ModelRunner(model, fuse=False)
    runner.mode = "graph"
    generator = specdec.SpeculativeGenerator(runner, MedusaDrafter(heads))
    count = lambda: (generator.generate(prompt, max_new_tokens=8), generator._captured._rounds.count)[1]
    first = count()
    assert count() == first
    fuse_projections(heads)
    assert count() == first + 1 == count()
    heads.heads[1][0].linear.bias.data = heads.heads[1][0].linear.bias.data.clone()
    assert count() == first + 2 == count()


def test_products_of_heads_are_those_of_the_mode(monkeypatch):
    """Where forwards multiply through kernels of few rows, heads and the output layer that they share do too."""
    model, seen = build("llama"), []
    heads = MedusaHeads.for_model(model, 2, output="shared")

    def product(x, weight, bias):
        seen.append((x.shape[:-1].numel(), weight.data_ptr(), tuple(weight.shape)))
        return nn.functional.linear(x, weight, bias)

    monkeypatch.setattr(specdec.model.fusion.fused_model, "skinny_linear", product)
    generator = MedusaGenerator(model, heads, mode="compile")
    adapter = generator.target.adapter
    adapter._compiled = adapter._runs  # so that every product is seen
    generator.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=8)
    first, (vocab, hidden) = heads.heads[0][0].linear.weight.data_ptr(), model.lm_head.weight.shape
    assert (1, first, (2 * hidden, hidden)) in seen  # the blocks of both heads at once
    assert (2, model.lm_head.weight.data_ptr(), (vocab, hidden)) in seen
