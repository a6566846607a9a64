"""What trains is what decodes: the logits of every step of training-time test are those of the decoding forward."""

import pytest
import torch

from specdec import ModelRunner
from specdec.drafters.eagle3.dense import DenseAttention
from specdec.drafters.eagle3.drafter import Eagle3Steps
from specdec.model.feature_runner import FeatureRunner
from specdec.training.backbone import Backbone
from specdec.training.data import pack
from specdec.training.eagle3.unrolled import unroll
from tests.families import VOCAB, build
from tests.learned import eagle3_model

DEPTH = 4
VARIANTS = {
    "EAGLE-3": {},
    "EAGLE-3.1": {"norm_output": True, "feature_norm": "each"},
    "two layers, queries normed": {"num_layers": 2, "qk_norm": True, "norm_before_residual": True},
}


def packed_texts(lengths=((11, 7), (9,))):
    """Rows of packed texts, all of them learned, as int64."""
    generator = torch.Generator().manual_seed(2)
    texts = [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for row in lengths for length in row]
    rows = pack([(text, text) for text in texts], max(map(sum, lengths)))
    return texts, rows.take(slice(None))


@torch.no_grad()
def trained(network, model, rows, documents=None, shift=0):
    """Logits `[step, B, S, V]` of the training forward; `documents` and `shift` of the features plant bugs."""
    features, _ = Backbone(model).features(rows.tokens, network.config.target_layers, rows.documents)
    documents = rows.documents if documents is None else documents
    outputs = unroll(network, rows.tokens, documents, features.roll(shift, 1), DEPTH)
    return torch.stack([network.logits(output) for output in outputs]).unflatten(1, rows.tokens.shape)


@torch.no_grad()
def decoded(runner, model, text):
    """Logits of decoding after each anchor j of one text, `{(step, j): [V]}`, by a `FeatureRunner` over pages."""
    target, tokens, found = ModelRunner(model, mode="eager"), torch.tensor(text), {}
    target.reserve([len(text)])
    given = runner.source.traits.features
    features = target.forward([target.cache.add()], tokens, [len(text)], features=given).features
    for anchor in range(len(text) - 1):
        runner.reserve([len(text) + DEPTH])
        sequence = runner.cache.add()
        fed = tokens[1 : anchor + 2], features[: anchor + 1], True, [anchor + 1]
        output, hidden = (x[-1:] for x in runner.forward([sequence], *fed))
        found[0, anchor] = runner.logits(output, own=True)[0]
        for step in range(1, min(DEPTH, len(text) - 1 - anchor)):
            token = tokens[anchor + 1 + step : anchor + 2 + step]
            output, hidden = runner.forward([sequence], token, hidden, False, [1])
            found[step, anchor] = runner.logits(output, own=True)[0]
        runner.cache.free(sequence)
    return found


def largest(ours, texts, rows, decode) -> float:
    """The largest difference of logits `ours [step, B, S, V]` from `decode(text)`, over all packed texts."""
    worst, text = 0.0, iter(texts)
    for row, documents in enumerate(rows.documents):
        for number in range(int(documents.max()) + 1):
            start = int((documents == number).nonzero()[0])
            for (step, anchor), logits in decode(next(text)).items():
                worst = max(worst, float((ours[step, row, start + anchor] - logits).abs().max()))
    return worst


def distance(network, model, **planted) -> float:
    """The largest difference of any logit of any step and anchor, over all packed texts."""
    texts, rows = packed_texts()
    runner = FeatureRunner(Eagle3Steps(network))
    return largest(trained(network, model, rows, **planted), texts, rows, lambda text: decoded(runner, model, text))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_step_has_the_logits_of_decoding(variant, family):
    model = build(family, spread=1.0)
    packs = family == "llama"
    network = eagle3_model(model, **VARIANTS[variant])
    if packs:
        assert distance(network, model) < 1e-5
        return
    texts, _ = packed_texts()
    rows = pack([(texts[0], texts[0])], 0).take(slice(None))  # a model that is not told where texts begin
    ours = trained(network, model, rows)
    for (step, anchor), logits in decoded(FeatureRunner(Eagle3Steps(network)), model, texts[0]).items():
        torch.testing.assert_close(ours[step, 0, anchor], logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("planted", ["another text of the row", "features of the token before"])
def test_a_planted_bug_is_caught(planted):
    model = build("llama", spread=1.0)
    network = eagle3_model(model)
    _, rows = packed_texts()
    bug = {"documents": torch.zeros_like(rows.documents)} if "text" in planted else {"shift": 1}
    assert distance(network, model, **bug) > 1e-2


@pytest.mark.parametrize("window", [None, 4])
def test_logits_and_gradients_are_those_of_dense_attention(window):
    """The dense reference counts windows back from the anchor, which is what speculators trains."""
    model = build("llama", spread=1.0)
    network = eagle3_model(model, windows=None if window is None else (window,))
    (text, *_), _ = packed_texts()
    rows, tokens, anchors = pack([(text, text)], 0).take(slice(None)), torch.tensor(text), torch.arange(len(text))
    features = Backbone(model).features(rows.tokens, network.config.target_layers)[0].detach()
    ours = [network.logits(x) for x in unroll(network, rows.tokens, rows.documents, features, DEPTH)]
    attend, hidden, theirs = DenseAttention(network.config), network.fuse(features[0]), []
    for step in range(DEPTH):
        attend.place(anchors, torch.full_like(anchors, step))
        output, hidden = network(network.embed(tokens.roll(-1 - step)), hidden, anchors + step, attend)
        theirs.append(network.logits(output))
    torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), atol=1e-5, rtol=0)
    parameters = list(network.parameters())
    of_ours, of_theirs = (
        torch.autograd.grad(torch.stack(logits).log_softmax(-1)[..., 3].sum(), parameters) for logits in (ours, theirs)
    )
    for one, other in zip(of_ours, of_theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
