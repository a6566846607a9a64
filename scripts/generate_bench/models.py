"""Models and prompts for `scripts.bench_generate`, and the speed that a card's memory allows them.

A shape is a Llama with random weights, made on the device from a seed, so that every process has the very same. Its
layers from `draft_layers` on contribute zero: the model of the first ones is exactly right, and both do the work of
their size. Exactly right holds in exact arithmetic; in bf16 two logits of random weights tie now and then, and then
draft and target may round them differently (about once in 70 tokens at a vocabulary of 128,256). With
`weights="counting"` the output layer says "the token after t is t + 1" by a wide margin (8B shape, bf16, 2,048 random
tokens: the second best logit is at most a third of the best), and no tie is left: such text tests speed, and of
equality little."""

import copy
import json
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import specdec
from scripts.generate_bench.quantised import kinds_of, quantise_pair, stored_bytes
from scripts.generate_bench.speeds import NotAvailable
from specdec.drafters.early_exit import first_layers

SHAPES = {
    "llama-3.1-8b": dict(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=131072,
    ),
    "wide": dict(  # that of Qwen2-0.5B, but for biases and an output layer of its own
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=32768,
    ),
    "toy": dict(
        vocab_size=512, hidden_size=64, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=1024,
    ),
}  # fmt: skip
WEIGHTS = ("random", "counting")
LOUD = 100  # of embeddings that count: most of the last hidden state then says which token it is at
TINY = "tiny"  # the name of the shipped pair


@dataclass(frozen=True, slots=True)
class Models:
    """The `target`, the `draft` or None, and the target's `tokenizer`, or None for prompts of random tokens.

    kept: of a quantised "target" or "draft", the layers that stay in 16 bits, beside the output layer."""

    target: torch.nn.Module
    draft: torch.nn.Module | None
    tokenizer: object | None = None
    kept: dict[str, list[str]] = field(default_factory=dict)


def build_shape(
    name: str, draft_layers: int, weights: str, dtype: torch.dtype, device: torch.device | str, seed: int
) -> Models:
    """A target of a known shape, and its first layers as its exact draft.

    Raises ValueError for a number of layers it cannot have."""
    config = LlamaConfig(
        **SHAPES[name], rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, tie_word_embeddings=False
    )
    torch.manual_seed(seed)
    with torch.device(device):  # 8 billion random numbers take minutes on a CPU, and a moment here
        target = (
            AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
            .eval()
            .requires_grad_(False)
        )
    draft = first_layers(target, draft_layers)
    for layer in target.model.layers[draft_layers:]:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    if weights == "counting":
        embedding = target.get_input_embeddings().weight
        embedding.mul_(LOUD)
        target.get_output_embeddings().weight.copy_(embedding.roll(1, 0) / LOUD)
    return Models(target, draft)


def load(options, device: torch.device | str | None = None) -> Models:
    """The models of the command line; they never end a text, so that all methods write the same number of tokens."""
    device, dtype = device or options.device, getattr(torch, options.dtype)
    if options.model is None:
        models = build_shape(options.shape, options.draft_layers, options.weights, dtype, device, options.seed)
    elif options.model == TINY:
        pair = specdec.load_tiny_pair(dtype, device)
        models = Models(pair.target, pair.draft, pair.tokenizer)
    else:
        draft = None if options.draft is None else specdec.load_model(options.draft, dtype, device)
        models = Models(
            specdec.load_model(options.model, dtype, device), draft, AutoTokenizer.from_pretrained(options.model)
        )
    draft, kept = quantise_pair(models.target, models.draft, *kinds_of(vars(options)))
    models = replace(models, draft=draft, kept=kept)
    models.target.generation_config.eos_token_id = None
    if models.draft is not None:
        # a draft of the target's own layers shares its generation config, and assisted generation writes into it
        models.draft.generation_config = copy.deepcopy(models.draft.generation_config)
        models.draft.generation_config.eos_token_id = None
    return models


def to_host(models: Models, options) -> None:
    """Move `options.host_layers` layers of the target to host memory; a draft of its first layers keeps its own."""
    if options.host_layers:
        if options.model is None:
            assert models.draft is not None
            models.draft.model.layers = copy.deepcopy(models.draft.model.layers)
        specdec.stream_layers(models.target, options.host_layers)


def prompts(models: Models, options, batch: int) -> tuple[Tensor, Tensor]:
    """`(ids, mask) [batch, S]`, padded on the left: random tokens, or texts in turn, repeated if too few."""
    if models.tokenizer is None:
        ids = torch.randint(
            models.target.config.vocab_size,
            (batch, options.prompt),
            generator=torch.Generator().manual_seed(options.seed),
        )
        return ids.to(options.device), torch.ones_like(ids).to(options.device)
    tokenizer = models.tokenizer
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    texts = list(islice(cycle(read_texts(options.prompts)), batch))
    found = tokenizer(
        texts, return_tensors="pt", padding=True, padding_side="left", truncation=True, max_length=options.prompt
    )
    return found.input_ids.to(options.device), found.attention_mask.to(options.device)


def unpadded(models: Models, options, batch: int) -> list[Tensor]:
    """Those prompts without their padding, `[S]` each."""
    return [row[kept.bool()] for row, kept in zip(*prompts(models, options, batch), strict=True)]


def read_texts(path: Path | None) -> list[str]:
    """The lines of a file, each a text or `{"text": …}`; without a file the shipped prompts, the kinds in turn."""
    if path is None:
        kinds = json.loads((Path(specdec.__file__).parent / "tiny_pair" / "prompts.json").read_text())
        return [entry["text"] for entries in zip(*kinds.values(), strict=False) for entry in entries]
    lines = [line for line in path.read_text().splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path} holds no prompts")
    return [json.loads(line)["text"] if line.startswith("{") else line for line in lines]


def weight_bytes(model) -> int:
    """Bytes of weights that a token's forward reads: all but the input embedding, unless that is the output layer."""
    embedding, output = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return sum(stored_bytes(p) for p in model.parameters() if p is not embedding or embedding is output)


def kv_bytes(model) -> int:
    """Bytes of keys and values of one token, in the model's dtype."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * head_dim * next(model.parameters()).element_size()


def card_of(models: Models) -> dict:
    """The bytes that decoding moves."""
    target, draft = models.target, models.draft
    found = {"parameters": target.num_parameters(), "weight_bytes": weight_bytes(target), "kv_bytes": kv_bytes(target)}
    return found | {
        "draft_weight_bytes": None if draft is None else weight_bytes(draft),
        "draft_kv_bytes": None if draft is None else kv_bytes(draft),
        "in_16_bits": models.kept,
    }


def ceiling(
    card: dict, bandwidth: float, batch: int, context: float, length: int = 0, tokens_per_round: float = 1.0
) -> float | None:
    """Tokens a second at which `batch` rows of `context` tokens do nothing but read memory of `bandwidth` bytes/s.

    A round drafts `length` tokens and gives `tokens_per_round` a row; without drafting that is a step. None without a
    draft to read.

    >>> ceiling({"weight_bytes": 90, "kv_bytes": 1}, 1000.0, batch=2, context=5)
    20.0
    """
    if length and card["draft_weight_bytes"] is None:
        return None
    step = card["weight_bytes"] + batch * context * card["kv_bytes"]
    drafted = length * (card["draft_weight_bytes"] + batch * context * card["draft_kv_bytes"]) if length else 0
    return batch * tokens_per_round * bandwidth / (step + drafted)


def needs_draft(models: Models):
    """The draft model; raises NotAvailable without one."""
    if models.draft is None:
        raise NotAvailable("needs a draft model: --draft")
    return models.draft
