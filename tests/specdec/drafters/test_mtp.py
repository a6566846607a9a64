"""MTP modules: read from checkpoints in every layout, equal to transformers' own, exact in what they draft."""

import json

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import specdec
from specdec.drafters.mtp.drafter import MtpDrafter, load_mtp, make_mtp
from specdec.drafters.mtp.layouts import find_modules
from specdec.trees.tree import TokenTree

modeling_layers = pytest.importorskip("transformers.modeling_layers")
ORACLE = getattr(modeling_layers, "MtpModel", None)
needs_steps = pytest.mark.skipif(not hasattr(ORACLE, "forward_layer"), reason="this release runs no single MTP step")
COMMON = dict(
    vocab_size=23, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=160, bos_token_id=0, eos_token_id=None, pad_token_id=1,
)  # fmt: skip
EXPERTS = dict(moe_intermediate_size=16, n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2)
LATENT = dict(kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, v_head_dim=8, qk_nope_head_dim=8)
HYBRID = dict(
    head_dim=16, linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
    num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16,
)  # fmt: skip
DEEPSEEK = "enorm", "hnorm", "eh_proj", "shared_head.norm"
MIMO = "token_layernorm", "hidden_layernorm", "input_proj", "final_layernorm"
QWEN = "pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm"
LAYERS = 3
# family -> (configuration of so many layers, prefix of the module's parts, of its decoder layer, names of the parts)
FAMILIES = {
    "deepseek_v3": (
        lambda n: tf.DeepseekV3Config(
            **COMMON | {"num_key_value_heads": 4}, **EXPERTS, **LATENT, num_hidden_layers=n, first_k_dense_replace=1
        ),
        f"model.layers.{LAYERS}.", f"model.layers.{LAYERS}.", DEEPSEEK,
    ),
    "glm4_moe": (
        lambda n: tf.Glm4MoeConfig(**COMMON, **EXPERTS, num_hidden_layers=n, first_k_dense_replace=1, head_dim=8),
        f"model.layers.{LAYERS}.", f"model.layers.{LAYERS}.", DEEPSEEK,
    ),
    "mimo": (
        lambda n: tf.Qwen2Config(**COMMON, num_hidden_layers=n),
        "model.mtp_layers.0.", "model.mtp_layers.0.", MIMO,
    ),
    "qwen3_next": (
        lambda n: tf.Qwen3NextConfig(
            **COMMON, **HYBRID, num_hidden_layers=n,
            layer_types=["linear_attention"] * (n - 1) + ["full_attention" if n > LAYERS else "linear_attention"],
        ),
        "mtp.", "mtp.layers.0.", QWEN,
    ),
}  # fmt: skip
RUNS = [name for name in FAMILIES if name != "qwen3_next"]  # as a target


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A folder for each family, of a random target with an MTP module."""
    return {name: write(name, tmp_path_factory.mktemp(name)) for name in FAMILIES}


def write(family, folder, seed=0):
    """A checkpoint whose module is one more layer, under the names of the family's own checkpoints."""
    make, parts, layer, names = FAMILIES[family]
    torch.manual_seed(seed)
    model = tf.AutoModelForCausalLM.from_config(make(LAYERS + 1)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter * 5 if parameter.ndim > 1 else parameter + 0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights = {name.replace(f"model.layers.{LAYERS}.", layer): value for name, value in weights.items()}
    size = COMMON["hidden_size"]
    for part, shape in zip(names, ([size], [size], [size, 2 * size], [size]), strict=True):
        weights[f"{parts}{part}.weight"] = torch.randn(shape) * (0.2 if len(shape) > 1 else 0.3) + (len(shape) == 1)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"num_hidden_layers": LAYERS, "num_nextn_predict_layers": 1}
    if "layer_types" in settings:
        settings["layer_types"] = settings["layer_types"][:LAYERS]
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def oracle(family, model, folder):
    """Transformers' own module, with the weights of a checkpoint: loaded by it where it can."""
    config = model.config
    config.num_mtp_layers = 1
    if family in ("mimo", "qwen3_next"):  # which transformers does not cover
        config.mtp_layer_types, config.mtp_hidden_states_first = ["full_attention"], family == "mimo"
        whole = tf.AutoModelForCausalLM.from_config(FAMILIES[family][0](LAYERS + 1))  # whose last layer attends
        whole.config.num_mtp_layers, whole.config.mtp_layer_types = 1, config.mtp_layer_types
        whole.config.mtp_hidden_states_first = config.mtp_hidden_states_first
        network = ORACLE(whole, 1)
        network.tie_with_main_model(model)
        _, parts, layer, names = FAMILIES[family]
        weights = load_file(folder / "model.safetensors")
        block = load_mtp(model, folder).network.model.layers[0]
        network.layers[0].mtp_block.load_state_dict(block.state_dict())  # what was read is compared by its norms below
        kept = {k.removeprefix(layer): v for k, v in weights.items() if k.startswith(layer)}
        for name, value in block.state_dict().items():
            assert name not in kept or value.equal(kept[name])
        mine = network.layers[0]
        for part, name in zip((mine.enorm, mine.hnorm, mine.eh_proj, mine.post_norm), names, strict=True):
            part.load_state_dict({"weight": weights[f"{parts}{name}.weight"]})
        return network.eval()
    model._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{LAYERS}.*"]  # it knows the released sizes alone
    return ORACLE.from_pretrained(model).eval()


def states_of(model, ids):
    """The target's hidden states `[1, L, h]`, after its final norm."""
    return model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state


@needs_steps
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_a_module_gives_the_logits_of_transformers_own(family, checkpoints):
    """Fed with the target's states in two pieces over pages, then three times with its own."""
    from transformers.cache_utils import MtpCache

    model = specdec.load_model(checkpoints[family])
    theirs, drafter = oracle(family, model, checkpoints[family]), MtpDrafter(load_mtp(model))
    ids, runner = torch.randint(2, 23, (1, 17), generator=torch.Generator().manual_seed(1)), drafter.runner
    states, cache = states_of(model, ids)[:, :-1], MtpCache(config=model.config.get_mtp_config())
    wanted = theirs.forward_layer(0, states, torch.arange(1, 17)[None], cache, input_ids=ids[:, 1:])
    runner.reserve([32])
    sequence = runner.cache.add()
    ran = [
        runner.forward([sequence], ids[0, 1 + a : 1 + b], states[0, a:b], True, [b - a]) for a, b in ((0, 9), (9, 16))
    ]
    found, hidden = torch.cat([output for output, _ in ran])[None], ran[-1][1][-1:]
    torch.testing.assert_close(runner.logits(found), theirs._project_to_logits(wanted), atol=1e-4, rtol=0)
    token, last = ids[:, -1], wanted[:, -1:]
    for place in range(17, 20):
        token = runner.logits(found)[0, -1:].argmax(-1)
        last = theirs.forward_layer(0, last, torch.tensor([[place]]), cache, input_ids=token[None])
        found, hidden = runner.forward([sequence], token, hidden, False, [1])
        found = found[None]
        torch.testing.assert_close(runner.logits(found), theirs._project_to_logits(last), atol=1e-4, rtol=0)


@pytest.mark.skipif(ORACLE is None, reason="this release has no MTP modules of its own")
@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_greedy_text_and_every_drafted_token_are_those_of_transformers(family, checkpoints, monkeypatch):
    model = specdec.load_model(checkpoints[family])
    model._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{LAYERS}.*"]
    drafted, theirs = {}, {}
    forward = ORACLE.forward

    def watched(network, *arguments, **options):
        found = forward(network, *arguments, **options)
        theirs[tuple(options["full_input_ids"][0].tolist())] = found[0].flatten().tolist()
        return found

    monkeypatch.setattr(ORACLE, "forward", watched)
    drafter = make_mtp(specdec.ModelRunner(model), None, num_tokens=1)
    start = drafter.start

    def started(rows, max_tokens):
        session = start(rows, max_tokens)
        propose = session.propose

        def proposed(batch, tree):
            draft, row = propose(batch, tree), batch.members[0]
            drafted[tuple(rows.tokens[row.slot, : row.length].tolist())] = draft.tokens[0, 1:].tolist()
            return draft

        session.propose = proposed
        return session

    monkeypatch.setattr(drafter, "start", started)
    generator, accepted = specdec.SpeculativeGenerator(model, drafter, mode="eager"), 0
    for seed in (2, 5):
        ids = torch.randint(2, 23, (1, 12), generator=torch.Generator().manual_seed(seed))
        options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False)
        text, out = model.generate(ids, use_mtp=True, **options), generator.generate(ids, **options)
        assert out.sequences.equal(text)
        accepted += sum(out.stats.pooled.accepted)
    shared = drafted.keys() & theirs.keys()
    assert accepted > 0 and len(shared) > 40 and all(drafted[text] == theirs[text] for text in shared)


@pytest.mark.parametrize("family", RUNS)
def test_greedy_text_with_any_shape_is_the_targets_own(family, checkpoints):
    """Ragged rows, in captured rounds; in an engine too."""
    model = specdec.load_model(checkpoints[family])
    ids = torch.randint(2, 23, (3, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    wanted, module = (
        specdec.AutoregressiveGenerator(model).generate(ids, mask, max_new_tokens=24).sequences,
        load_mtp(model),
    )
    for shape in ({"num_tokens": 3}, {"tree": TokenTree.from_widths((3, 2, 1))}, {"dynamic": (7, 3, 3)}):
        generator = specdec.SpeculativeGenerator(model, MtpDrafter(module, **shape))
        out = generator.generate(ids, mask, max_new_tokens=24)
        assert out.sequences.equal(wanted) and sum(out.stats.pooled.accepted) > 0
    engine = specdec.Engine(model, MtpDrafter(module, 2))
    handles = [engine.submit(row[kept.bool()], max_new_tokens=24) for row, kept in zip(ids, mask, strict=True)]
    list(engine.run())
    assert [handle.tokens for handle in handles] == wanted[:, 9:].tolist()


def test_an_embedding_that_counts_as_zero_at_the_first_position(checkpoints):
    """Later ones do not change but through attention to it."""
    model = specdec.load_model(checkpoints["mimo"])
    module, ids = load_mtp(model), torch.arange(2, 8)
    with torch.inference_mode():
        states = states_of(model, ids[None])[0, :-1]
        first = module.network.get_input_embeddings()
        absent = torch.tensor([[True, False, False, False, False]])
        with first.reading(states[None], absent):
            wanted = module.network(input_ids=ids[None, 1:], use_cache=False).logits[0]
        assert first(ids[None]).isfinite().all(), "nothing of that is left"
        found = {}
        for zero in (False, True):
            runner = MtpDrafter(module, zero_first=zero).runner
            runner.reserve([8])
            output, _ = runner.forward([runner.cache.add()], ids[1:], states, True, [5])
            found[zero] = runner.logits(output)
    torch.testing.assert_close(found[True], wanted, atol=1e-4, rtol=0)
    assert (found[True] - found[False]).abs().amax(-1)[0] > 0.01
    assert "position 0 counts as zero" in MtpDrafter(module, zero_first=True).describe()


@torch.inference_mode()
def test_states_before_the_final_norm_are_read_if_that_is_wanted(checkpoints):
    """The target's in its forwards, the module's own from step to step; text stays the target's own."""
    model = specdec.load_model(checkpoints["mimo"])
    module, ids, kept = load_mtp(model), torch.arange(2, 9), []
    hook = model.model.norm.register_forward_pre_hook(lambda norm, given: kept.append(given[0]))
    states = states_of(model, ids[None]), kept.pop()
    hook.remove()
    drafter = MtpDrafter(module, 3, normed=False)
    target = specdec.ModelRunner(model, mode="eager")
    target.reserve([8])
    given = target.forward([target.cache.add()], ids, [7], features=drafter.traits.features).features
    torch.testing.assert_close(given, states[1][0], atol=1e-5, rtol=0)
    assert (given - states[0][0]).abs().max() > 0.1
    with module.network.get_input_embeddings().reading(given[None, :-1]):
        wanted = module.network(input_ids=ids[None, 1:], use_cache=False, output_hidden_states=True)
    runner = drafter.runner
    runner.reserve([8])
    output, hidden = runner.forward([runner.cache.add()], ids[1:], given[:-1], True, [6])
    torch.testing.assert_close(runner.logits(output), wanted.logits[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(module.network.model.norm(hidden), output)
    assert "before the final norm" in drafter.describe()
    for mode in ("eager", "graph"):
        prompt = ids[None].expand(2, -1)
        plain = specdec.AutoregressiveGenerator(model).generate(prompt, max_new_tokens=12).sequences
        out = specdec.SpeculativeGenerator(model, MtpDrafter(module, 3, normed=False), mode=mode)
        assert out.generate(prompt, max_new_tokens=12).sequences.equal(plain)


def test_ends_of_its_own_are_used_and_copies_of_the_targets_shared(checkpoints, tmp_path):
    folder = write("deepseek_v3", tmp_path, seed=4)
    weights = load_file(folder / "model.safetensors")
    ends = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}
    for copy, of in ends.items():
        weights[f"model.layers.{LAYERS}.{copy}"] = weights[of].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    model = specdec.load_model(folder)
    shared = load_mtp(model).network
    assert shared.get_output_embeddings() is model.lm_head and shared.model.embed_tokens.own_embedding is None
    for copy in ends:
        weights[f"model.layers.{LAYERS}.{copy}"] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    own = load_mtp(model).network
    assert own.lm_head.weight.equal(model.lm_head.weight + 1)
    assert own.model.embed_tokens.own_embedding.weight.equal(model.model.embed_tokens.weight + 1)
    assert not {id(p) for p in own.parameters()} & {id(p) for p in model.parameters()}


DAMAGES = {
    "lacks eh_proj": lambda w: w.pop(f"model.layers.{LAYERS}.eh_proj.weight") is None,
    "lacks shared_head.norm": lambda w: w.pop(f"model.layers.{LAYERS}.shared_head.norm.weight") is None,
    "lacks model.layers.0.self_attn.o_proj.weight": lambda w: w.pop(f"model.layers.{LAYERS}.self_attn.o_proj.weight"),
    "left over, model.layers.0.gate.weight": lambda w: w.update({f"model.layers.{LAYERS}.gate.weight": torch.ones(2)}),
    r"hidden_norm.weight of an MTP module is \[5\], for this target it must be \[32\]": lambda w: w.update(
        {f"model.layers.{LAYERS}.hnorm.weight": torch.ones(5)}
    ),
    "saved by transformers, which drops them": lambda w: [w.pop(k) for k in list(w) if f"layers.{LAYERS}." in k],
}


@pytest.mark.parametrize("message", DAMAGES)
def test_what_a_checkpoint_lacks_or_has_too_much_is_named(message, checkpoints, tmp_path):
    model = specdec.load_model(checkpoints["glm4_moe"])
    weights = load_file(checkpoints["glm4_moe"] / "model.safetensors")
    DAMAGES[message](weights)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=message):
        load_mtp(model, tmp_path)


def test_what_does_not_fit_is_refused(checkpoints):
    model, other = (specdec.load_model(checkpoints[name]) for name in ("mimo", "glm4_moe"))
    with pytest.raises(ValueError, match="1 MTP modules, number 1"):
        load_mtp(model, number=1)
    with pytest.raises(ValueError, match="Qwen2ForCausalLM that is not the generator's target"):
        specdec.SpeculativeGenerator(other, MtpDrafter(load_mtp(model)))
    with pytest.raises(ValueError, match="not loaded from a checkpoint"):
        load_mtp(tf.AutoModelForCausalLM.from_config(FAMILIES["mimo"][0](2)))
    with pytest.raises(ValueError, match="num_tokens"):
        MtpDrafter(load_mtp(model), 0)
    model.config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(ValueError, match="quantised"):
        load_mtp(model)


def test_every_layout_is_told_by_its_names():
    """Names of released checkpoints -> modules."""
    told = lambda names, layers=61: find_modules([f"{name}.weight" for name in names], layers)
    ends = ["token_norm", "hidden_norm", "projection", "final_norm"]

    layout, modules = told(
        [f"model.layers.61.{x}" for x in (*DEEPSEEK, "embed_tokens", "self_attn.o_proj")]
        + ["model.layers.3.mlp.up_proj"]
    )
    assert layout.name.startswith("DeepSeek-V3") and not layout.hidden_first
    assert modules[0].keys() == {f"{x}.weight" for x in (*ends, "embedding", "layers.0.self_attn.o_proj")}

    layout, modules = told([f"model.mtp_layers.{i}.{x}" for i in (0, 1) for x in (*MIMO, "mlp.up_proj")])
    assert layout.name == "MiMo-7B" and layout.hidden_first and len(modules) == 2
    assert modules[1]["layers.0.mlp.up_proj.weight"] == "model.mtp_layers.1.mlp.up_proj.weight"

    v2 = "enorm", "hnorm", "eh_proj", "final_layernorm"
    layout, modules = told([f"model.mtp.layers.{i}.{x}" for i in range(3) for x in (*v2, "pre_mlp_layernorm")])
    assert layout.name == "MiMo-V2" and len(modules) == 3
    assert modules[2]["layers.0.post_attention_layernorm.weight"] == "model.mtp.layers.2.pre_mlp_layernorm.weight"

    layout, modules = told([f"mtp.{x}" for x in (*QWEN, "layers.0.self_attn.q_norm")])
    assert layout.name == "Qwen3-Next" and modules[0]["projection.weight"] == "mtp.fc.weight"
    assert "layers.0.self_attn.q_norm.weight" in modules[0]

    parts = [*(f"0.{x}" for x in v2[:3]), "0.norm", "0.mixer.q_proj", "1.mixer.gate", "1.final_layernorm"]
    layout, modules = told([f"mtp.layers.{x}" for x in parts])
    assert layout.name == "Nemotron-H" and len(modules) == 1
    assert {"final_norm.weight", "layers.0.mixer.q_proj.weight", "layers.1.mixer.gate.weight"} <= modules[0].keys()
