"""Tiny random vision-language models, and what their processors would give for prompts with random images."""

import torch
import transformers as tf

from tests.families import spread_out

VOCAB, IMAGE, VIDEO, BEGIN, END, NEWLINE = 97, 90, 91, 92, 93, 94
_TEXT = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=160,
    bos_token_id=0,
    eos_token_id=2,
    pad_token_id=1,
)
_SIGHT = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, image_size=28, patch_size=14
)
_PLANES = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
_TOKENS = dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=BEGIN, vision_end_token_id=END)
_QWEN_SIGHT = dict(depth=2, hidden_size=32, out_hidden_size=32, intermediate_size=64, num_heads=4, patch_size=4)
_QWEN3_SIGHT = _QWEN_SIGHT | dict(num_position_embeddings=16, deepstack_visual_indexes=[0, 1])
_DEEP = dict(
    layer_types=["linear_attention", "full_attention", "linear_attention"],
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_conv_kernel_dim=4,
)


def _qwen3_config():
    text = _TEXT | {"head_dim": 8, "rope_parameters": _PLANES | {"mrope_interleaved": True}}
    return tf.Qwen3VLConfig(text_config=text, vision_config=_QWEN3_SIGHT, **_TOKENS)


def _qwen3_5_config():
    text = _TEXT | _DEEP | {"head_dim": 16, "rope_parameters": _PLANES | {"mrope_interleaved": True}}
    sight = {name: value for name, value in _QWEN3_SIGHT.items() if name != "deepstack_visual_indexes"}
    return tf.Qwen3_5Config(text_config=text, vision_config=sight, **_TOKENS)


CONFIGS = {
    "qwen2_5_vl": lambda: tf.Qwen2_5_VLConfig(
        text_config=_TEXT | {"rope_parameters": _PLANES},
        vision_config=_QWEN_SIGHT | {"window_size": 8, "fullatt_block_indexes": [1]},
        **_TOKENS,
    ),
    "qwen3_vl": _qwen3_config,
    "gemma3": lambda: tf.Gemma3Config(
        text_config=_TEXT
        | {
            "head_dim": 8,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"] * 1 + ["sliding_attention"],
        },
        vision_config=_SIGHT,
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
    ),
    "llava": lambda: tf.LlavaConfig(
        text_config=tf.LlamaConfig(**_TEXT),
        vision_config=tf.CLIPVisionConfig(**_SIGHT | {"num_hidden_layers": 2}),
        image_token_index=IMAGE,
    ),
    "mistral3": lambda: tf.Mistral3Config(
        text_config=tf.MistralConfig(**_TEXT, head_dim=8),
        vision_config=tf.PixtralVisionConfig(**_SIGHT, head_dim=8),
        image_token_index=IMAGE,
        spatial_merge_size=2,
    ),
    "qwen3_5": _qwen3_5_config,  # with recurrent states
}


def build(family: str, seed: int = 0):
    """A random model whose greedy choices are far from ties."""
    torch.manual_seed(seed)
    model = tf.AutoModelForImageTextToText.from_config(CONFIGS[family]()).eval()
    spread_out(model, 4.0)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 1
    return model


def _pixels(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _qwen(sizes):
    """Patches of images of `sizes` (height, width) patches, of which 2 x 2 become a token."""
    grid = torch.tensor([(1, *size) for size in sizes])
    patches = _pixels(int(grid.prod(1).sum()), 3 * 2 * 4 * 4, seed=1)
    return [[BEGIN, *[IMAGE] * (h * w // 4), END] for h, w in sizes], {"pixel_values": patches, "image_grid_thw": grid}


def _gemma(sizes):
    return [[BEGIN, *[IMAGE] * 4, END] for _ in sizes], {"pixel_values": _pixels(len(sizes), 3, 28, 28, seed=1)}


def _llava(sizes):
    return [[IMAGE] * 4 for _ in sizes], {"pixel_values": _pixels(len(sizes), 3, 28, 28, seed=1)}


def _mistral(sizes):
    """Images of height and width 28 or 56, padded to the largest."""
    sizes = [(28 * (h // 4 or 1), 28 * (w // 4 or 1)) for h, w in sizes]
    pixels = _pixels(len(sizes), 3, max(h for h, _ in sizes), max(w for _, w in sizes), seed=1)
    tokens = [[*([IMAGE] * (w // 28) + [NEWLINE]) * (h // 28 - 1), *[IMAGE] * (w // 28), END] for h, w in sizes]
    return tokens, {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


IMAGES = {
    "qwen2_5_vl": _qwen,
    "qwen3_vl": _qwen,
    "qwen3_5": _qwen,
    "gemma3": _gemma,
    "llava": _llava,
    "mistral3": _mistral,
}
SIZES = [(4, 8), (4, 4), (8, 8)]  # in patches of 2.5's and 3's


def prompts(family: str, layout=((2, 1, 4), (3,), (1, 1, 1, 1, 3)), seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs for prompts, one for each item of `layout`: lengths of texts, between which there are images.

    The default is a row with an image, one of text alone and one with two images, of different lengths."""
    draw = torch.Generator().manual_seed(seed)
    text = lambda length: torch.randint(3, 90, (length,), generator=draw).tolist()
    sizes = [SIZES[place % 3] for place in range(sum(len(lengths) // 2 for lengths in layout))]
    tokens, inputs = IMAGES[family](sizes) if sizes else ([], {})
    images = iter(tokens)
    rows = [[token for place, length in enumerate(lengths)
             for token in (next(images) if place % 2 else text(length))] for lengths in layout]  # fmt: skip
    longest = max(map(len, rows))
    ids = torch.tensor([[1] * (longest - len(row)) + row for row in rows])
    lengths = torch.tensor([[longest - len(row)] for row in rows])
    inputs |= {"input_ids": ids, "attention_mask": (torch.arange(longest) >= lengths).long()}
    kinds = (ids == IMAGE).long()
    names = {"gemma3": "token_type_ids"} | dict.fromkeys(("qwen2_5_vl", "qwen3_vl", "qwen3_5"), "mm_token_type_ids")
    return inputs | ({names[family]: kinds} if family in names else {})
