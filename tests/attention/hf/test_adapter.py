"""Every promised family over the paged cache against the same model on its own, and the refusal of the others."""

from collections.abc import Sequence
from functools import cache

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, Llama4TextConfig, LlamaForCausalLM, Phi3Config, PhimoeConfig

import attention.paged.layer
from attention import AttentionBatch, ModelAdapter, PagedKVCache, UnsupportedArchitecture
from attention.kv.layout import KeyValueLayer, LayerLayout, SharedLayer
from attention.paged.batch import StaticBatch, ancestor_bits, build_batch
from tests.families import _COMMON, _LLAMA_LIKE, CONFIGS, REFUSED, UNEVEN, VOCAB, build

pytestmark = pytest.mark.seam

# a spine of depth 11, longer than the families' window of 9, with branches along it: late siblings sit at early
# positions
PARENTS = (None, 0, 0, 1, 1, 2, 3, 6, 7, 8, 9, 10, 11, 12, 13, 4)
DEPTHS = (0, 1, 1, 2, 2, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 3)
LEAVES = (5, 14, 15)

every_family = pytest.mark.parametrize("family", [*CONFIGS, *UNEVEN])


@cache
def eager(family: str):
    """One model per family; no test may leave a trace in it."""
    model = build(family)
    model.set_attn_implementation("eager")
    return model


def tokens(length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(1000 * seed + length))


@torch.no_grad()
def alone(model, sequence: Tensor) -> Tensor:
    """`[L, V]`: the model's own logits on one sequence."""
    return model(sequence[None], use_cache=False).logits[0]


def assert_same(ours: Tensor, expected: Tensor) -> None:
    assert ours.shape == expected.shape
    error = (ours - expected).abs().max() / expected.abs().max()
    assert error < 1e-4, f"relative error {error:.2e}"


class Pages:
    """An adapter with a small cache: `step` appends packed tokens and describes the forward over them."""

    def __init__(self, model, latents: bool = True):
        self.adapter = ModelAdapter(model, latents=latents)
        self.cache = PagedKVCache.for_layout(self.adapter.layout, 40, 4)
        for part in self.cache.parts:
            part.key_pages.fill_(float("nan"))
            part.value_pages.fill_(float("nan"))
        self.sequences = [self.cache.add(), self.cache.add()]

    def step(self, rows: Sequence[Tensor], tree: bool = False) -> tuple[Tensor, Tensor, AttentionBatch]:
        counts = [len(row) for row in rows]
        self.cache.append(self.sequences, counts)
        batch = build_batch(
            self.cache, self.sequences, counts, [(DEPTHS, ancestor_bits(PARENTS)) if tree else None] * len(counts)
        )
        return torch.cat(list(rows)), batch.positions, batch

    def forward(self, rows: Sequence[Tensor], tree: bool = False) -> list[Tensor]:
        """Logits of each row."""
        return list(self.adapter.forward(*self.step(rows, tree), None).split([len(row) for row in rows]))


@every_family
def test_packed_prompts_equal_the_model_on_each_alone(family):
    model, prompts = eager(family), [tokens(23), tokens(6)]
    for ours, prompt in zip(Pages(model).forward(prompts), prompts, strict=True):
        assert_same(ours, alone(model, prompt))


@every_family
def test_a_sequence_may_come_in_pieces(family):
    """Prefill, a ragged second piece, then one token each: the last logits are those of the whole sequence."""
    model, wholes, pages = eager(family), [tokens(20), tokens(15)], Pages(eager(family))
    pieces = [
        ([wholes[0][:11], wholes[1][:3]]),
        ([wholes[0][11:19], wholes[1][3:14]]),
        ([wholes[0][19:], wholes[1][14:]]),
    ]
    for whole, *parts in zip(wholes, *(pages.forward(piece) for piece in pieces), strict=True):
        assert_same(torch.cat(parts), alone(model, whole))


@every_family
def test_a_tree_node_equals_the_model_on_its_linear_path(family):
    """Logits at every node are those of prefix + path to the node: window, positions and ancestors hold inside the real
    model.
    """
    model, pages = eager(family), Pages(eager(family))
    prefixes, trees = [tokens(13), tokens(5)], [tokens(len(PARENTS), seed=1), tokens(len(PARENTS), seed=2)]
    pages.forward(prefixes)
    for ours, prefix, tree in zip(pages.forward(trees, tree=True), prefixes, trees, strict=True):
        checked = set()
        for leaf in LEAVES:
            path = [leaf]
            while PARENTS[path[0]] is not None:
                path.insert(0, PARENTS[path[0]])
            assert_same(ours[path], alone(model, torch.cat([prefix, tree[path]]))[len(prefix) :])
            checked.update(path)
        assert checked == set(range(len(PARENTS)))


@every_family
def test_a_prompt_and_its_tree_may_share_a_forward(family):
    """Plain tokens before a tree see the prefix causally, and the tree sees them: one forward equals two."""
    prefixes, trees = [tokens(13), tokens(5)], [tokens(len(PARENTS), seed=1), tokens(len(PARENTS), seed=2)]
    one, two = Pages(eager(family)), Pages(eager(family))
    separate = [torch.cat(parts) for parts in zip(two.forward(prefixes), two.forward(trees, tree=True), strict=True)]
    for ours, expected in zip(
        one.forward([torch.cat(parts) for parts in zip(prefixes, trees, strict=True)], tree=True), separate, strict=True
    ):
        assert_same(ours, expected)


@every_family
def test_a_committed_path_continues_as_the_linear_sequence(family):
    """Moved keys are right without being rotated again."""
    model, pages, path = eager(family), Pages(eager(family)), [0, 2, 5]
    prefixes, trees, more = (
        [tokens(13), tokens(5)],
        [tokens(len(PARENTS), seed=1), tokens(len(PARENTS), seed=2)],
        [tokens(2, seed=3), tokens(3, seed=4)],
    )
    pages.forward(prefixes)
    pages.forward(trees, tree=True)
    pages.cache.commit(pages.sequences, [13, 5], [path, path])
    for ours, prefix, tree, last in zip(pages.forward(more), prefixes, trees, more, strict=True):
        assert_same(ours, alone(model, torch.cat([prefix, tree[path], last]))[-len(last) :])


@every_family
def test_keep_picks_packed_indices(family):
    pages, twin, keep = Pages(eager(family)), Pages(eager(family)), torch.tensor([0, 8, 10])
    prompts = [tokens(9), tokens(4)]
    full = torch.cat(pages.forward(prompts))
    assert_same(twin.adapter.forward(*twin.step(prompts), keep), full[keep])


@every_family
@pytest.mark.parametrize("fails", [False, True], ids=["forward", "exception"])
@pytest.mark.parametrize("setting", ["eager", "default"])
def test_the_model_is_left_as_it_was(family, setting, fails, monkeypatch):
    """Its attention setting and its own outputs are the same, bit for bit, after a forward of ours, also after one that
    raised half-way.
    """
    model = eager(family) if setting == "eager" else build(family)
    prompt, before = tokens(12), model.config._attn_implementation
    expected = alone(model, prompt)
    pages, calls = Pages(model), []

    def broken(*args):
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("planted")
        return attention.paged_attention(*args)

    if fails:
        monkeypatch.setattr(attention.paged.layer, "attend", broken)
        with pytest.raises(RuntimeError, match="planted"):
            pages.adapter.forward_with_features(*pages.step([prompt, prompt]), None)
    else:
        pages.adapter.forward_with_features(*pages.step([prompt, prompt]), None)
    assert {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")} == {before}
    assert not model.get_output_embeddings()._forward_pre_hooks
    assert torch.equal(alone(model, prompt), expected)


@pytest.mark.parametrize("family", REFUSED)
def test_an_unsupported_architecture_is_refused_by_name_and_left_as_it_was(family):
    model = build(family)
    before, expected = model.config._attn_implementation, alone(model, tokens(7))
    with pytest.raises(UnsupportedArchitecture, match=type(model).__name__):
        ModelAdapter(model)
    assert model.config._attn_implementation == before and torch.equal(alone(model, tokens(7)), expected)


SLIDING, FULL = KeyValueLayer(2, 16, 16), KeyValueLayer(2, 32, 32)
LAYOUTS = {
    "gemma4": (SLIDING, KeyValueLayer(1, 512, 512)),
    "gemma4, shared": (SLIDING, FULL, SharedLayer(0), SharedLayer(1)),
    "mimo_v2_flash": (KeyValueLayer(2, 12, 8), KeyValueLayer(4, 12, 8), KeyValueLayer(2, 12, 8)),
}


@pytest.mark.parametrize("family", UNEVEN)
def test_the_probe_sees_the_shapes_of_each_layer(family):
    assert ModelAdapter(eager(family)).layout.layers == LAYOUTS[family]


@pytest.mark.parametrize("family", UNEVEN)
def test_a_fork_goes_its_own_way_in_every_layer(family):
    """A page that both share is copied in all parts of the cache before one side writes to it."""
    model, pages, prompt = eager(family), Pages(eager(family)), tokens(14)
    pages.forward([prompt, prompt[:5]])
    first = pages.sequences[0]
    pages.sequences = [first, pages.cache.fork(first)]
    ends = [tokens(3, seed=5), tokens(2, seed=6)]
    for ours, end in zip(pages.forward(ends), ends, strict=True):
        assert_same(ours, alone(model, torch.cat([prompt, end]))[-len(end) :])


@pytest.mark.parametrize("family", CONFIGS)
def test_the_probe_sees_the_shapes_of_the_model(family):
    model = eager(family)
    adapter, config = ModelAdapter(model), model.config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    assert adapter.layout == LayerLayout.uniform(3, heads, head_dim) and adapter.vocab_size == VOCAB


@pytest.mark.parametrize("keep", [None, torch.tensor([2, 11])], ids=["all", "kept"])
@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_the_output_embedding_of_the_hidden_states_is_the_logits(family, keep):
    model, prompts = eager(family), [tokens(9), tokens(4)]
    pages, twin = Pages(model), Pages(model)
    logits, hidden = pages.adapter.forward_with_features(*pages.step(prompts), keep)
    assert hidden.shape == (len(logits), model.config.hidden_size)
    with torch.no_grad():
        assert_same(model.get_output_embeddings()(hidden), logits)
    assert torch.equal(logits, twin.adapter.forward(*twin.step(prompts), keep))


class ComputesAllLogits(LlamaForCausalLM):
    """A model whose forward knows no `logits_to_keep`."""

    def forward(self, input_ids=None, position_ids=None, use_cache=None, return_dict=None, **kwargs):
        assert "logits_to_keep" not in kwargs
        return super().forward(
            input_ids, position_ids=position_ids, use_cache=use_cache, return_dict=return_dict, **kwargs
        )


def test_keep_also_holds_for_a_model_that_computes_all_logits():
    model = ComputesAllLogits(CONFIGS["llama"]()).eval()
    pages, prompts, keep = Pages(model), [tokens(9), tokens(4)], torch.tensor([2, 11])
    logits, hidden = pages.adapter.forward_with_features(*pages.step(prompts), keep)
    assert_same(logits, torch.stack([alone(model, prompts[0])[2], alone(model, prompts[1])[2]]))
    with torch.no_grad():
        assert_same(model.get_output_embeddings()(hidden), logits)


MASKED = {
    "llama4": lambda: Llama4TextConfig(
        **_COMMON, **_LLAMA_LIKE, head_dim=16, attention_chunk_size=8, num_local_experts=2, intermediate_size_mlp=64
    ),
    "phimoe": lambda: PhimoeConfig(**_COMMON, **_LLAMA_LIKE, num_local_experts=4, sliding_window=9),
}


@pytest.mark.parametrize(("name", "window"), [("llama4", 8), ("phimoe", 9)])
def test_a_window_that_only_the_mask_carries_limits_the_positions(name, window):
    """These models tell their chunks or window to the mask, not to the attention call; up to there the output is exact,
    beyond it refused.
    """
    torch.manual_seed(0)
    model, prompt = AutoModelForCausalLM.from_config(MASKED[name](), attn_implementation="eager").eval(), tokens(window)
    pages = Pages(model)
    assert pages.adapter.max_positions == window and f"the window or chunk of {window} tokens" in str(
        pages.adapter.limit
    )
    assert_same(pages.forward([prompt, prompt[:6]])[0], alone(model, prompt))


@every_family
def test_a_window_is_known_where_every_layer_has_one(family):
    adapter = ModelAdapter(eager(family))
    assert adapter.window == (9 if family == "mistral" else None)


def test_a_window_counts_until_settings_change():
    """A layer's own field and the configuration are both what a window may follow from."""
    config = CONFIGS["gemma2"]()
    config.layer_types = ["sliding_attention"] * 3
    model = AutoModelForCausalLM.from_config(config).eval()
    adapter = ModelAdapter(model)
    adapter.renew()
    assert adapter.window == 9
    model.model.layers[0].self_attn.sliding_window = None
    adapter.renew()
    assert adapter.window is None
    adapter = ModelAdapter(build("mistral"))
    adapter.model.config.sliding_window = 12
    assert adapter.window == 9, "it is the twin's, whose configuration is as it was"
    adapter.renew()
    assert adapter.window is None


def test_rope_that_depends_on_the_longest_row_limits_the_positions():
    """Phi-3 128k switches its rotary factors at the original context, for all rows at once; up to there rows are
    independent.
    """
    rope = dict(
        rope_type="longrope",
        rope_theta=1e4,
        short_factor=[1.0] * 4,
        long_factor=[2.0] * 4,
        original_max_position_embeddings=8,
    )
    torch.manual_seed(0)
    config = Phi3Config(**_COMMON, **_LLAMA_LIKE, original_max_position_embeddings=8, rope_parameters=rope)
    model, prompts = (
        AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval(),
        [tokens(8), tokens(6)],
    )
    pages = Pages(model)
    assert pages.adapter.max_positions == 8 and "rotary tables" in str(pages.adapter.limit)
    assert_same(pages.forward(prompts)[1], alone(model, prompts[1]))


WRONG_OVER_PAGES = {
    "doge": (
        lambda: transformers.DogeConfig(**_COMMON, **_LLAMA_LIKE, keep_window_size=4),
        "mask of its own|other logits over a paged cache",
    ),
    "mamba": (
        lambda: transformers.MambaConfig(**_COMMON, hidden_size=16, num_hidden_layers=2),
        "recurrent state|does not call",
    ),
}


ATTENDING_TWICE = {  # keys and values of each attention call are a layer of the cache, whatever module makes it
    "diffllama": lambda: transformers.DiffLlamaConfig(**_COMMON, **_LLAMA_LIKE),
    "nemotron_h": lambda: transformers.NemotronHConfig(
        **_COMMON,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        n_groups=2,
        mamba_num_heads=8,
        mamba_head_dim=8,
        n_group=1,
        topk_group=1,
        n_shared_experts=1,
        layers_block_type=["full_attention", "mlp", "full_attention", "moe"],
    ),
    "granitemoehybrid": lambda: transformers.GraniteMoeHybridConfig(
        **_COMMON,
        **_LLAMA_LIKE,
        layer_types=["full_attention"] * 3,
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_n_groups=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=32,
    ),
}


@pytest.mark.parametrize(("name", "layers"), [("diffllama", 6), ("nemotron_h", 2), ("granitemoehybrid", 3)])
def test_layers_of_the_cache_are_attention_calls(name, layers):
    """More than the model's layers, or fewer, where some layers attend twice or only multiply; one whose class may be
    recurrent runs without such layers.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(ATTENDING_TWICE[name](), attn_implementation="eager").eval()
    pages, prompts = Pages(model), [tokens(17), tokens(6)]
    assert len(pages.adapter.layout.layers) == layers
    first = pages.forward([prompts[0][:9], prompts[1][:2]])
    for ours, prompt in zip(
        zip(first, pages.forward([prompts[0][9:], prompts[1][2:]]), strict=True), prompts, strict=True
    ):
        assert_same(torch.cat(ours), alone(model, prompt))


@pytest.mark.parametrize("family", ["stablelm", "nemotron"])
def test_models_that_drop_keywords_on_the_way_to_attention_run(family):
    config = dict(stablelm=transformers.StableLmConfig, nemotron=transformers.NemotronConfig)[family](
        **_COMMON, **_LLAMA_LIKE, head_dim=8
    )
    torch.manual_seed(0)
    model, prompts = (
        AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval(),
        [tokens(9), tokens(4)],
    )
    for ours, prompt in zip(Pages(model).forward(prompts), prompts, strict=True):
        assert_same(ours, alone(model, prompt))


CHOOSING = {
    "deepseek_v32": (
        lambda: transformers.DeepseekV32Config(
            **_COMMON,
            **_LLAMA_LIKE | dict(num_key_value_heads=4),
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            index_topk=8,
            index_n_heads=2,
            index_head_dim=16,
            moe_intermediate_size=32,
            n_shared_experts=1,
        ),
        "by itself: DeepseekV32Attention reads attention_mask",
    ),
    "falcon": (
        lambda: transformers.FalconConfig(
            **_COMMON, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=False
        ),
        "by itself: FalconAttention reads attention_mask",
    ),
    "mpt": (
        lambda: transformers.MptConfig(vocab_size=VOCAB, d_model=32, n_heads=4, n_layers=2, max_seq_len=64),
        "by itself: MptModel reads attention_mask",
    ),
}


@pytest.mark.parametrize("name", CHOOSING)
def test_a_refusal_says_what_is_missing(name):
    """Not what a forward of ours happened to raise."""
    config, reason = CHOOSING[name]
    torch.manual_seed(0)
    with pytest.raises(UnsupportedArchitecture, match=reason):
        ModelAdapter(AutoModelForCausalLM.from_config(config()).eval())


class ChoosesKeys(transformers.LlamaForCausalLM):
    """Hands a choice of key blocks to its attention calls, as block-sparse models do to kernels that know it."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, block_indices=torch.zeros(1, 1, 1), **kwargs)


def test_what_chooses_keys_before_attention_is_refused():
    with pytest.raises(
        UnsupportedArchitecture, match="ChoosesKeys: LlamaAttention hands block_indices to its attention call"
    ):
        ModelAdapter(ChoosesKeys(CONFIGS["llama"]()).eval())


class LateState(LlamaForCausalLM):
    """Behaves as a Llama until a forward has somewhat more tokens than its configuration's `index_block`."""

    def forward(self, input_ids=None, **kwargs):
        out = super().forward(input_ids, **kwargs)
        if input_ids.shape[1] > self.config.index_block + 10:
            out.logits = out.logits.flip(-1)
        return out


def test_the_comparison_is_as_long_as_the_configuration_lets_anything_matter():
    """Fifty tokens would pass; what a setting of sixty does shows at 122."""
    config = CONFIGS["llama"]()
    config.index_block = 60
    with pytest.raises(UnsupportedArchitecture, match=r"other logits over a paged cache .* 122 tokens"):
        ModelAdapter(LateState(config).eval())


def test_a_model_that_writes_no_text_is_refused_for_that():
    with pytest.raises(UnsupportedArchitecture, match="LlamaForSequenceClassification is no causal language model"):
        ModelAdapter(transformers.LlamaForSequenceClassification(CONFIGS["llama"]()).eval())


@pytest.mark.parametrize("name", WRONG_OVER_PAGES)
def test_a_model_that_would_be_wrong_over_pages_is_refused(name):
    """They call the interface, or half of it; what they keep or mask beside it would be lost without a word."""
    config, reason = WRONG_OVER_PAGES[name]
    torch.manual_seed(0)
    with pytest.raises(UnsupportedArchitecture, match=reason):
        ModelAdapter(AutoModelForCausalLM.from_config(config()).eval())


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_tokens_behind_the_end_change_nothing(family, monkeypatch):
    """A kernel leaves their attention as it finds it in memory, NaN here; the model gets zeros."""
    attend, pages, prompts = attention.paged.layer.attend, Pages(eager(family)), [tokens(9), tokens(4)]
    monkeypatch.setattr(
        attention.paged.layer,
        "attend",
        lambda *arguments: attend(*arguments).index_fill(0, torch.arange(13, 20), float("nan")),
    )
    pages.cache.append(pages.sequences, [9, 4])
    static = StaticBatch(pages.cache, 2, num_tokens=20, num_pages=8)
    static.load(pages.sequences, [9, 4])
    found = pages.adapter.forward(
        torch.cat([*prompts, torch.full((7,), 3)]), static.batch.positions, static.batch, None
    )
    assert_same(found[:13], torch.cat([alone(eager(family), prompt) for prompt in prompts]))
    assert bool(found.isfinite().all())
