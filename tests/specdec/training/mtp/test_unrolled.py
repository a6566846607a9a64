"""What trains is what decodes: logits of every step after every token, of any kind of MTP module, are decoding's."""

import pytest
import torch

import specdec
from specdec.drafters.mtp.drafter import MtpDrafter, MtpModule
from specdec.drafters.mtp.layouts import LAYOUTS
from specdec.drafters.mtp.network import build_module
from specdec.training.backbone import Backbone
from specdec.training.data import pack
from specdec.training.mtp.network import MtpNetwork, new_mtp
from specdec.training.mtp.unrolled import UnrolledModules
from tests.families import build
from tests.learned import mtp_weights
from tests.specdec.drafters.test_mtp_depths import TEXT, heard
from tests.specdec.training.eagle3.test_unrolled import DEPTH, decoded, largest, packed_texts


def modules_of(model, count=1, layout=LAYOUTS[0]) -> list[MtpModule]:
    """Random modules that share the model's output layer."""
    made = [build_module(model, layout, mtp_weights(model, 7 + depth)) for depth in range(count)]
    return [MtpModule(model, network, layout, depth, count) for depth, network in enumerate(made)]


def fresh(model, layout) -> MtpNetwork:
    """A new module whose weights are large enough to tell one reading from another."""
    torch.manual_seed(2)
    network = new_mtp(model, layout)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(6) if parameter.ndim > 1 else parameter.add_(0.3 * torch.randn_like(parameter))
    return network


NETWORKS = {
    "llama": lambda model: MtpNetwork(modules_of(model)),
    "llama, states before the norm": lambda model: MtpNetwork(modules_of(model), normed=False),
    "llama, first embedding zero, [hidden; token]": lambda model: MtpNetwork(
        modules_of(model, layout=LAYOUTS[1]), zero_first=True
    ),
    "mistral": lambda model: MtpNetwork(modules_of(model)),  # with a sliding window of 9
    "deepseek_v3": lambda model: fresh(model, "deepseek-v3"),  # latent attention, experts
    "nemotron_h": lambda model: fresh(model, "nemotron-h"),
    "qwen3_next": lambda model: fresh(model, "qwen3-next"),  # gated attention; the target has recurrent layers
}


@torch.no_grad()
def of_training(network, model, rows, depth=DEPTH, shift=0):
    """Logits `[step, B, S, V]` of the training forward; `shift` of the states plants a bug."""
    layers = "output" if network.normed else "last_block"
    states, _ = Backbone(model).features(rows.tokens, layers, rows.documents)
    outputs = UnrolledModules(network)(rows, rows.tokens, states.roll(shift, 1), depth)
    return torch.stack([output @ network.output_weight.T for output in outputs]).unflatten(1, rows.tokens.shape)


def distance(network, model, lengths=((11, 7), (9,)), **planted) -> float:
    """The largest difference of any logit of any step and anchor, over all packed texts."""
    (texts, rows), runner = packed_texts(lengths), network.drafter(DEPTH).runner
    return largest(of_training(network, model, rows, **planted), texts, rows, lambda text: decoded(runner, model, text))


@pytest.mark.parametrize("name", NETWORKS)
def test_every_step_of_one_module_has_the_logits_of_decoding(name):
    family = name.partition(",")[0]
    model = build(family, spread=1.0)
    lengths = (
        ((14,),) if family in ("qwen3_next", "nemotron_h") else ((14, 7), (9,))
    )  # recurrent states see packed texts
    assert distance(NETWORKS[name](model), model, lengths) < 1e-5


@pytest.mark.parametrize("planted", ["states of the token before", "window of the anchor", "embedding kept"])
def test_a_planted_bug_is_caught(planted, monkeypatch):
    name = {"window of the anchor": "mistral", "embedding kept": "llama, first embedding zero, [hidden; token]"}
    name = name.get(planted, "llama")
    model = build(name.partition(",")[0])
    network = NETWORKS[name](model)
    if planted == "window of the anchor":
        from specdec.training.unrolled.attention import UnrolledAttention

        made = UnrolledAttention.__init__
        monkeypatch.setattr(UnrolledAttention, "__init__", lambda *given, sliding: made(*given))
    if planted == "embedding kept":
        decoding = decoded(network.drafter(DEPTH).runner, model, TEXT)
        network.zero_first = False
        rows = pack([(TEXT, TEXT)], 0).take(slice(None))
        ours = of_training(network, model, rows)
        assert (ours[0, 0, 0] - decoding[0, 0]).abs().max() > 1e-2
        return
    bug = {"shift": 1} if planted == "states of the token before" else {}
    assert distance(network, model, ((14, 7), (9,)), **bug) > 1e-2


@torch.no_grad()
def test_every_depth_of_several_modules_has_the_logits_of_decoding(monkeypatch):
    """In double precision, of every level of every round of a decoding, for the text and what was drafted then."""
    model = build("llama").double()
    network, found = MtpNetwork(modules_of(model, 3)), heard(monkeypatch)
    generator = specdec.SpeculativeGenerator(model, network.drafter(3), mode="eager")
    generator.generate(torch.tensor([TEXT[:7]]), max_new_tokens=10)
    assert len(found) >= 9 and {tokens.shape[1] for _, tokens, _, _ in found} == {0, 1, 2}
    for (text,), tokens, _, logits in found:
        whole, level = [*text, *tokens[0].tolist(), 5], tokens.shape[1]
        rows = pack([(whole, whole)], 0).take(slice(None))
        ours = of_training(network, model, rows, depth=3)[level, 0, len(text) - 2]
        torch.testing.assert_close(ours, logits[0, 0], atol=1e-9, rtol=0)


def test_decoding_and_the_modules_are_as_before():
    """A training forward leaves no attention of its own in the modules."""
    model = build("llama")
    network = MtpNetwork(modules_of(model))
    drafter = MtpDrafter(network.parts[0], 3)
    _, rows = packed_texts()
    kept = network.parts[0].network.config._attn_implementation
    of_training(network, model, rows)
    assert network.parts[0].network.config._attn_implementation == kept
    ids = torch.tensor([TEXT])
    out = specdec.SpeculativeGenerator(model, drafter).generate(ids, max_new_tokens=8).sequences
    assert out.equal(specdec.AutoregressiveGenerator(model).generate(ids, max_new_tokens=8).sequences)


def test_attention_with_sinks_is_refused_by_name():
    model = build("gpt_oss")
    _, rows = packed_texts()
    with pytest.raises(ValueError, match="GptOssAttention attends with s_aux, which MTP modules are not trained with"):
        of_training(new_mtp(model, "mimo-v2"), model, rows)
