"""What a user does to a model after a runner was built is seen, and the model itself is never touched."""

import copy

import pytest
import torch
import transformers as tf
from torch import nn

import specdec
from attention import ModelAdapter, UnsupportedArchitecture
from attention.hf.twin import configs_of, make_twin
from tests.families import CONFIGS, build, ragged_prompts

pytestmark = pytest.mark.seam


def own_text(model, ids, mask, new=8):
    options = dict(attention_mask=mask, do_sample=False, max_new_tokens=new, eos_token_id=None, pad_token_id=1)
    return model.generate(input_ids=ids, **options)[:, ids.shape[1] :].tolist()


def text(generator, ids, mask, new=8):
    return generator.generate(ids, mask, max_new_tokens=new).sequences[:, ids.shape[1] :].tolist()


def prepared(family="llama"):
    model = build(family)
    model.generation_config.eos_token_id = None
    return model, *ragged_prompts(2)


def state_of(model) -> list:
    """Everything that a module holds, tensors by identity, and what its configurations say."""
    held = [(name, key, id(value)) for name, module in model.named_modules() for key, value in vars(module).items()]
    hooks = [
        (name, len(module._forward_hooks), len(module._forward_pre_hooks)) for name, module in model.named_modules()
    ]
    return [held, hooks, [copy.deepcopy(vars(config)) for config in configs_of(model)]]


@pytest.mark.parametrize("family", CONFIGS)
def test_a_model_is_the_same_during_a_forward_and_after(family):
    """Looked at from inside a layer: not a module, hook or setting has changed; a twin attends, the model does not."""
    model, ids, mask = prepared(family)
    block = next(module for module in model.modules() if isinstance(module, nn.ModuleList))[1]
    before, seen = None, []
    handle = block.register_forward_pre_hook(
        lambda module, _: seen.append(module is not block and state_of(model) == before)
    )
    generator = specdec.SpeculativeGenerator(model, specdec.PromptLookupDrafter())
    before = state_of(model)
    seen.clear()
    generator.generate(ids, mask, max_new_tokens=6)
    assert len(seen) > 2 and all(seen) and state_of(model) == before
    handle.remove()


def test_only_what_holds_a_configuration_is_copied():
    model = build("llama")
    twin = make_twin(model).model
    assert [p.data_ptr() for p in twin.parameters()] == [p.data_ptr() for p in model.parameters()]
    names = {name: module for name, module in model.named_modules()}
    copied = {name for name, module in twin.named_modules() if module is not names[name]}
    assert copied and all(
        hasattr(names[name], "config") or any(other.startswith(name + ".") or not name for other in copied)
        for name in copied
    )
    assert twin.model.layers[0].self_attn.q_proj is model.model.layers[0].self_attn.q_proj
    assert twin.config is not model.config and twin.config.to_dict() == model.config.to_dict()


def test_hooks_that_come_later_are_called_and_may_go_again():
    """On a layer, which a twin copies, and on a projection, which it does not; each changes the text as it does the
    model's own.
    """
    model, ids, mask = prepared()
    generator = specdec.AutoregressiveGenerator(model)
    plain = text(generator, ids, mask)
    for module in (model.model.layers[1], model.model.layers[1].mlp.down_proj, model.lm_head):
        handle = module.register_forward_hook(lambda _, __, out: out.flip(-1))
        changed = own_text(model, ids, mask)
        assert changed != plain and text(generator, ids, mask) == changed
        handle.remove()
        assert text(generator, ids, mask) == plain


def test_hooks_of_accelerate_run_on_the_twin():
    """They replace `forward` by a partial call that was given the module itself."""
    accelerate = pytest.importorskip("accelerate")
    model, ids, mask = prepared()
    generator, calls = specdec.AutoregressiveGenerator(model), []
    plain = text(generator, ids, mask)

    class Counting(accelerate.hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(type(module).__name__)
            return args, kwargs

    for module in (model, model.model.layers[0], model.model.layers[0].self_attn, model.lm_head):
        accelerate.hooks.add_hook_to_module(module, Counting())
    assert text(generator, ids, mask) == plain
    assert {"LlamaForCausalLM", "LlamaDecoderLayer", "LlamaAttention", "Linear"} <= set(calls)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert text(generator, ids, mask) == plain


@pytest.mark.parametrize("kind", ["cpu", "disk"])
@pytest.mark.parametrize("when", ["before its runner is built", "later"])
def test_weights_that_accelerate_offloads_are_brought_for_every_forward(when, kind, tmp_path):
    """They are on the meta device between forwards. Nothing is recorded, since that would hold all of them."""
    accelerate = pytest.importorskip("accelerate")
    (model, ids, mask), cpu = prepared(), torch.device("cpu")
    plain = own_text(model, ids, mask)
    offload = {
        "cpu": lambda: accelerate.cpu_offload(model, cpu),
        "disk": lambda: accelerate.disk_offload(model, str(tmp_path), cpu),
    }[kind]
    if when == "later":
        generator = specdec.SpeculativeGenerator(model, specdec.PromptLookupDrafter())
        assert text(generator, ids, mask) == plain
    offload()
    if when != "later":
        generator = specdec.SpeculativeGenerator(model, specdec.PromptLookupDrafter())
    assert model.device.type == "meta" and generator.target.device == cpu
    assert [text(generator, ids, mask) for _ in range(2)] == [plain] * 2
    assert generator.target.mode == "eager" and generator.explain().startswith("LlamaForCausalLM on cpu, mode 'eager'")
    assert "runs eagerly: it has hooks, or weights that are offloaded" in generator.explain()


def test_a_model_without_weights_says_so():
    with pytest.raises(ValueError, match="LlamaForCausalLM has no weights: they are on the meta device"):
        ModelAdapter(build("llama").to("meta"))


def test_a_forward_that_keeps_hold_of_the_model_is_an_error_and_not_another_text():
    """A closure over the original module would run the model's own attention, past the cache."""
    model, ids, mask = prepared()
    generator, attention = specdec.AutoregressiveGenerator(model), model.model.layers[1].self_attn
    own = attention.forward
    attention.forward = lambda *args, **kwargs: own(*args, **kwargs)
    with pytest.raises(
        UnsupportedArchitecture, match="LlamaForCausalLM attended 2 times .* and 3 times when it was probed"
    ):
        generator.generate(ids, mask, max_new_tokens=4)
    del attention.forward
    assert text(generator, ids, mask) == own_text(model, ids, mask)


def test_adapters_that_come_later_are_seen_switched_and_taken_away():
    peft = pytest.importorskip("peft")
    model, ids, mask = prepared()
    generator = specdec.SpeculativeGenerator(model, specdec.PromptLookupDrafter())
    plain = text(generator, ids, mask)
    adapter = peft.get_peft_model(
        model,
        peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
    ).eval()
    changed = own_text(model, ids, mask)
    assert changed != plain and text(generator, ids, mask) == changed
    with adapter.disable_adapter():
        assert text(generator, ids, mask) == plain
    assert text(generator, ids, mask) == changed
    adapter.unload()
    assert text(generator, ids, mask) == plain


def test_weights_that_are_updated_moved_or_exchanged_are_seen():
    model, ids, mask = prepared()
    generator = specdec.AutoregressiveGenerator(model)
    plain = text(generator, ids, mask)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(-1)
    changed = own_text(model, ids, mask)
    assert changed != plain and text(generator, ids, mask) == changed
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(-model.model.layers[0].mlp.up_proj.weight.detach())
    assert text(generator, ids, mask) == plain
    model.model.layers[2] = copy.deepcopy(model.model.layers[0])
    model.model.layers[2].self_attn.layer_idx = 2
    assert text(generator, ids, mask) == own_text(model, ids, mask) != plain
    model.config.rms_norm_eps, model.model.layers[0].self_attn.scaling = (
        1e-6,
        3.0,
    )  # a number that the attention call is given
    assert text(generator, ids, mask) == own_text(model, ids, mask)


def test_a_model_that_was_cast_after_its_runner_was_built_says_so():
    model, ids, mask = prepared()
    generator = specdec.AutoregressiveGenerator(model)
    model.to(torch.bfloat16)
    with pytest.raises(ValueError, match="computes in torch.bfloat16"):
        generator.generate(ids, mask, max_new_tokens=2)


def test_configurations_without_a_pad_token_and_those_that_refuse_none():
    """Composite configurations of vision-language models have no such field at all."""
    text_config = dict(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=1,
    )
    sight = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, image_size=28, patch_size=14
    )
    config = tf.LlavaConfig(
        text_config=tf.LlamaConfig(**text_config), vision_config=tf.CLIPVisionConfig(**sight), image_token_index=90
    )
    vars(config).pop("pad_token_id", None)
    model = tf.LlavaForConditionalGeneration(config).eval()
    before = [copy.deepcopy(vars(c)) for c in configs_of(model)]
    ModelAdapter(model)
    assert [vars(c) for c in configs_of(model)] == before


class Broken(tf.LlamaForCausalLM):
    """A model that trips over an error of this library."""

    def forward(self, *args, **kwargs):
        from attention.dispatch import resolve

        resolve("planted", torch.device("cpu"))
        return super().forward(*args, **kwargs)


def test_an_error_of_our_own_is_not_called_the_models():
    with pytest.raises(ValueError, match="impl='planted'") as raised:
        ModelAdapter(Broken(CONFIGS["llama"]()).eval())
    assert not isinstance(raised.value, UnsupportedArchitecture)
