"""Accuracies counted by hand, and trees that follow from them."""

import pytest
import torch

from medusa import MedusaGenerator, MedusaHeads
from medusa.backbone import Backbone
from medusa.calibration import calibrated_tree, head_accuracies
from specdec.costs import Costs
from specdec.theory import expected_tree_tokens
from specdec.tree import TokenTree
from tests.families import CONFIGS, VOCAB, build
from tests.medusa.test_drafter import random_heads


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_the_backbone_is_what_the_output_layer_reads(family):
    model, seen = build(family), []
    backbone = Backbone(model)
    tokens = torch.randint(3, VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(tokens)
        assert torch.equal(backbone(tokens), seen[0])
    hook.remove()


def test_a_model_that_changes_its_states_first_is_refused():
    model = build("llama")
    model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0] * 2,))
    with pytest.raises(ValueError, match="LlamaForCausalLM changes its last hidden state"):
        Backbone(model)


def test_accuracies_equal_a_count_by_hand():
    model = build("llama")
    heads = random_heads(model, 3)
    texts = [torch.randint(3, VOCAB, (n,), generator=torch.Generator().manual_seed(n)) for n in (9, 14, 4)]
    found = head_accuracies(heads, model, texts, ranks=5)
    for head in range(3):
        hits, trials = [0] * 5, 0
        for text in texts:
            with torch.no_grad():
                logits = heads(model.model(text[None]).last_hidden_state[0])[head]
            for t in range(len(text) - head - 2):
                trials += 1
                order = logits[t].topk(5).indices.tolist()
                for rank in range(5):
                    hits[rank] += order[rank] == int(text[t + head + 2])
        assert found[head] == pytest.approx([h / trials for h in hits])
    with pytest.raises(ValueError, match="longer than the 4 tokens"):
        head_accuracies(heads, model, [torch.tensor([5, 6])])


def test_the_calibrated_tree_expects_more_than_a_regular_one_and_with_costs_is_the_fastest():
    accuracies = [[0.6, 0.15, 0.08, 0.02], [0.4, 0.12, 0.05, 0.06], [0.25, 0.1, 0.05, 0.03]]
    falling = [sorted(row, reverse=True) for row in accuracies]
    tree = calibrated_tree(accuracies, 13)
    regular = TokenTree.from_widths((3, 2, 1))
    assert tree.size == 13 and regular.size == 16 and expected_tree_tokens(tree, falling) > expected_tree_tokens(regular, falling)
    assert calibrated_tree(accuracies, 30, Costs(0.01, 0.0, (1, 2), (1.0, 3.0))).size == 2  # where every node is dear, one has to do
    assert calibrated_tree(accuracies, 30, Costs(0.01, 0.0, (1, 2), (1.0, 1.0))).size == 30


def test_a_calibrated_tree_decodes():
    model = build("llama")
    heads = MedusaHeads.for_model(model, 3)
    texts = [model.generate(torch.tensor([[n, n + 1]]), max_new_tokens=20, do_sample=False)[0] for n in (5, 9)]
    tree = calibrated_tree(head_accuracies(heads, model, texts, ranks=3), 8)
    out = MedusaGenerator(model, heads, tree).generate(torch.tensor([[5, 6, 7]]), max_new_tokens=12)
    assert out.lengths[0] == 12
