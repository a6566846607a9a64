"""Flash attention inside transformers models: one training step and generation against eager, layouts against
transformers' own masks.
"""

import math

import pytest
import torch
import transformers as tf
from torch import Tensor
from transformers import masking_utils

from attention.hf.flash import batch_layout, register_flash_attention
from tests.attention.devices import DEVICE
from tests.families import _COMMON, _LLAMA_LIKE, CONFIGS, VOCAB, build, ragged_prompts

pytestmark = pytest.mark.seam
FAMILIES = [family for family in CONFIGS if family != "gpt_oss"]  # attention sinks: refused below


def training_model(family: str):
    """In training mode, without the dropout that some families have by default."""
    model = build(family, spread=1.0).train().to(DEVICE)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    return model


def batches() -> dict[str, dict]:
    """Keyword arguments of a forward with a loss, for every way to lay out a batch. No label stands behind padding:
    nothing predicts it well.
    """
    ids, mask = ragged_prompts(4)
    right = torch.stack([torch.cat([row[real == 1], row[real == 0]]) for row, real in zip(ids, mask, strict=True)])
    predicted = (mask == 1) & (mask.cumsum(1) > 1)
    positions = torch.cat([torch.arange(n) for n in (5, 1, 15)])[None]
    return {
        "dense": dict(input_ids=ids, labels=ids),
        "left padding": dict(
            input_ids=ids,
            attention_mask=mask,
            labels=ids.where(predicted, -100),
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        ),
        "right padding": dict(
            input_ids=right, attention_mask=mask.flip(1), labels=right.where(mask.flip(1) == 1, -100)
        ),
        "packed": dict(input_ids=ids[:1], position_ids=positions, labels=ids[:1].where(positions > 0, -100)),
    }


def step(model, implementation: str, **batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients."""
    model.set_attn_implementation(implementation)
    model.zero_grad()
    loss = model(
        use_cache=False, **{name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in batch.items()}
    ).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(ours: tuple, theirs: tuple) -> None:
    assert math.isclose(ours[0], theirs[0], rel_tol=1e-6)
    assert ours[1].keys() == theirs[1].keys()
    largest = max(gradient.abs().max() for gradient in theirs[1].values())
    for name, gradient in theirs[1].items():
        error = (ours[1][name] - gradient).abs().max() / largest
        assert error < 1e-5, f"{name}: {error:.1e}"


@pytest.mark.parametrize("layout", ["dense", "left padding", "right padding", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_step_is_the_eager_one(family, layout):
    model, batch = training_model(family), batches()[layout]
    assert_same_step(step(model, register_flash_attention(), **batch), step(model, "eager", **batch))


@pytest.mark.parametrize(("family", "layout"), [("llama", "dense"), ("gemma2", "right padding")])
def test_a_training_step_through_the_kernels(family, layout):
    model, batch = training_model(family), {name: x[:2] for name, x in batches()[layout].items()}
    assert_same_step(
        step(model, register_flash_attention("specdec_dense_triton", impl="triton"), **batch),
        step(model, "eager", **batch),
    )


def test_gradient_checkpointing():
    model, batch = training_model("mistral"), batches()["right padding"]
    theirs = step(model, "eager", **batch)
    model.gradient_checkpointing_enable()
    assert_same_step(step(model, register_flash_attention(), **batch), theirs)


def test_a_collator_may_say_where_sequences_begin():
    """FlashAttention keywords with running positions, against a block-diagonal mask."""
    model, ids = training_model("llama"), ragged_prompts(1)[0]
    ends, n = torch.tensor([0, 5, 6, 21], dtype=torch.int32, device=DEVICE), ids.shape[1]
    sequence = torch.cat([torch.full((length,), i) for i, length in enumerate((5, 1, 15))])
    seen = (sequence[:, None] == sequence) & torch.ones(n, n, dtype=torch.bool).tril()
    batch = dict(input_ids=ids, labels=ids, position_ids=torch.arange(n)[None])
    theirs = step(
        model, "eager", attention_mask=torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None], **batch
    )
    ours = step(
        model,
        register_flash_attention(),
        cu_seq_lens_q=ends,
        cu_seq_lens_k=ends,
        max_length_q=15,
        max_length_k=15,
        **batch,
    )
    assert_same_step(ours, theirs)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3", "gpt_neox"])
def test_generation_over_transformers_own_cache_is_the_eager_one(family):
    model = build(family).to(DEVICE)
    ids, mask = (x.to(DEVICE) for x in ragged_prompts(4))
    outputs = []
    for implementation in ("eager", register_flash_attention()):
        model.set_attn_implementation(implementation)
        outputs.append(model.generate(ids, attention_mask=mask, max_new_tokens=15, do_sample=False, pad_token_id=1))
    assert torch.equal(*outputs)


def test_compiles_for_training():
    """Not as one graph: under tracing transformers cannot rule out packed positions, and only their values tell."""
    torch.compiler.reset()
    model, ids = training_model("llama"), ragged_prompts(2)[0].to(DEVICE)
    model.set_attn_implementation(register_flash_attention())
    losses = []
    for forward in (model, torch.compile(model, backend="aot_eager")):
        model.zero_grad()
        losses.append(forward(input_ids=ids, labels=ids, use_cache=False).loss)
        losses[-1].backward()
    assert math.isclose(losses[0].item(), losses[1].item(), rel_tol=1e-6)


def dense_mask(layout, shape: tuple[int, int, int]) -> Tensor:
    """`[B, S, S_k]` bool: which keys each query sees by the layout; rows that are not real queries see none."""
    batch, queries, keys = shape
    flat = torch.zeros(batch * queries, batch * keys, dtype=torch.bool)
    if layout is None or layout.queries is None:
        window = None if layout is None else layout.window
        rows = [
            (torch.arange(b * queries, (b + 1) * queries), torch.arange(b * keys, (b + 1) * keys)) for b in range(batch)
        ]
    else:
        window = layout.window
        q, k = layout.cu_seqlens_q.tolist(), layout.cu_seqlens_k.tolist()
        rows = [(layout.queries[q[i] : q[i + 1]], layout.keys[k[i] : k[i + 1]]) for i in range(len(q) - 1)]
        assert layout.max_seqlen_q == max(len(r) for r, _ in rows) and layout.max_seqlen_k == max(
            len(c) for _, c in rows
        )
    for row, column in rows:
        distance = torch.arange(len(column) - len(row), len(column))[:, None] - torch.arange(len(column))
        flat[row[:, None], column] = (distance >= 0) & (distance < (window or 10**9))
    return flat.view(batch, queries, batch, keys).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


LEFT = (torch.arange(21) >= torch.tensor([[0], [20], [7]])).long()
RIGHT = LEFT.flip(1)
HOLES = torch.tensor([[1, 1, 0, 0, 1, 1, 1, 0, 1] * 2] * 3)
PACKED = torch.tensor([[0] * 5 + [1] * 1 + [2] * 15] * 2 + [[0] * 11 + [1] * 10])
CHUNKED = masking_utils.chunked_causal_mask_function
SLIDING = masking_utils.sliding_window_causal_mask_function
CAUSAL = masking_utils.causal_mask_function
MASKS = {
    "causal": dict(q_length=21, kv_length=21, mask_function=CAUSAL),
    "left": dict(q_length=21, kv_length=21, mask_function=CAUSAL, attention_mask=LEFT),
    "right": dict(q_length=21, kv_length=21, mask_function=CAUSAL, attention_mask=RIGHT),
    "holes": dict(q_length=18, kv_length=18, mask_function=CAUSAL, attention_mask=HOLES),
    "nothing padded": dict(q_length=21, kv_length=21, mask_function=CAUSAL, attention_mask=torch.ones(3, 21)),
    "cached": dict(q_length=2, kv_length=21, q_offset=19, mask_function=CAUSAL, attention_mask=LEFT),
    "sliding": dict(q_length=21, kv_length=21, mask_function=SLIDING(9), local_size=9),
    "sliding, left": dict(q_length=21, kv_length=21, mask_function=SLIDING(9), local_size=9, attention_mask=LEFT),
    "sliding, right": dict(q_length=21, kv_length=21, mask_function=SLIDING(9), local_size=9, attention_mask=RIGHT),
    "sliding, cached": dict(
        q_length=2, kv_length=10, q_offset=19, kv_offset=11, mask_function=SLIDING(9), local_size=9, attention_mask=LEFT
    ),
    "window of 1": dict(q_length=21, kv_length=21, mask_function=SLIDING(1), local_size=1),
    "chunked": dict(
        q_length=21, kv_length=21, mask_function=CHUNKED(6, torch.zeros(3, dtype=torch.long)), local_size=6
    ),
    "chunked, left": dict(
        q_length=21, kv_length=21, mask_function=CHUNKED(6, torch.tensor([0, 20, 7])), local_size=6, attention_mask=LEFT
    ),
    "packed": dict(
        q_length=21,
        kv_length=21,
        allow_is_causal_skip=False,
        mask_function=masking_utils.and_masks(CAUSAL, masking_utils.packed_sequence_mask_function(PACKED)),
    ),
    "packed, sliding": dict(
        q_length=21,
        kv_length=21,
        allow_is_causal_skip=False,
        local_size=4,
        mask_function=masking_utils.and_masks(SLIDING(4), masking_utils.packed_sequence_mask_function(PACKED)),
    ),
}


@pytest.mark.parametrize("name", MASKS)
def test_layouts_say_what_transformers_masks_say(name):
    arguments = dict(batch_size=3, device=torch.device("cpu"), **MASKS[name])
    theirs = masking_utils.sdpa_mask(
        **(arguments | dict(allow_is_causal_skip=False, attention_mask=_bool(arguments.get("attention_mask"))))
    )[:, 0]
    layout = batch_layout(**arguments)
    ours = dense_mask(layout, theirs.shape)
    real = torch.ones(ours.shape[:2], dtype=torch.bool)
    if "attention_mask" in arguments:
        offset = arguments.get("q_offset", 0)
        real = arguments["attention_mask"][:, offset : offset + arguments["q_length"]].bool()
    assert torch.equal(ours[real], theirs[real])
    assert (layout is None) == (name in ("causal", "nothing padded"))


def _bool(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.bool()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(use_vmap=True), "a mask of its own"),
        (dict(allow_is_bidirectional_skip=True), "a mask of its own"),
        (
            dict(
                mask_function=masking_utils.or_masks(CAUSAL, masking_utils.blockwise_overlay(PACKED)),
                allow_is_causal_skip=False,
            ),
            "see a later one",
        ),
        (dict(q_offset=torch.tensor(3)), "static caches"),
        (dict(kv_length=40), "static caches"),
        (
            dict(q_length=18, kv_length=18, attention_mask=HOLES, mask_function=SLIDING(3), local_size=3),
            "a sliding window of 3 tokens over padding between",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_masks_that_no_layout_describes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        batch_layout(
            **(dict(batch_size=3, q_length=21, kv_length=21, mask_function=CAUSAL, device=torch.device("cpu")) | change)
        )


def test_models_that_need_more_are_refused_by_name():
    name, ids = register_flash_attention(), torch.randint(3, VOCAB, (2, 7), device=DEVICE)
    cases = [
        (build("gpt_oss").to(DEVICE), {}, "GptOssAttention: flash attention has no attention sinks"),
        (
            tf.LlamaForCausalLM(tf.LlamaConfig(**_COMMON, **_LLAMA_LIKE, attention_dropout=0.1)).to(DEVICE).train(),
            {},
            "has no dropout, got 0.1",
        ),
        (
            build("llama").to(DEVICE),
            dict(attention_mask=torch.zeros(2, 1, 7, 7, device=DEVICE)),
            r"got a mask tensor \[2, 1, 7, 7\]",
        ),
        (
            tf.BertModel(
                tf.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
            )
            .to(DEVICE)
            .eval(),
            {},
            "a mask of its own",
        ),
    ]
    for model, arguments, message in cases:
        model.set_attn_implementation(name)
        with pytest.raises(ValueError, match=message):
            model(input_ids=ids, **arguments)


def test_static_caches_are_refused():
    model = build("llama").to(DEVICE)
    model.set_attn_implementation(register_flash_attention())
    with pytest.raises(ValueError, match="static caches are not supported"):
        model.generate(
            torch.tensor([[5, 6, 7]], device=DEVICE),
            max_new_tokens=2,
            cache_implementation="static",
            disable_compile=True,
            pad_token_id=1,
        )


def test_a_name_that_transformers_would_download_is_refused():
    with pytest.raises(ValueError, match="'my_flash' contains \"flash\""):
        register_flash_attention("my_flash")
    assert register_flash_attention("specdec_dense") == "specdec_dense"
