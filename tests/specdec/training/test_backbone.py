"""The hidden states that heads learn from are those that the output layer reads, or the model is refused."""

import pytest
import torch

from specdec.training.backbone import Backbone
from tests.families import CONFIGS, VOCAB, build


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


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_features_are_transformers_hidden_states(family):
    model = build(family)
    backbone, layers = Backbone(model), (3, 0, 2)
    tokens = torch.randint(3, VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = model(tokens, output_hidden_states=True).hidden_states
        features, last = backbone.features(tokens, layers)
        assert torch.equal(features, torch.cat([states[layer] for layer in layers], -1))
        assert torch.equal(last, backbone(tokens))
    assert not any(block._forward_pre_hooks for block in model.modules())
    with pytest.raises(ValueError, match="features of layer 4 are wanted"):
        backbone.features(tokens, (4,))
