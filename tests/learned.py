"""EAGLE-3 drafters for tiny random targets, right now and then: random, but for a fitted output layer."""

import torch

from specdec import ModelRunner
from specdec.drafters.eagle3.config import Eagle3Config
from specdec.drafters.eagle3.drafter import Eagle3Drafter
from specdec.drafters.eagle3.module import Eagle3Model
from specdec.drafters.eagle3.rotation import Rotation

FITTED: dict[tuple, Eagle3Model] = {}


def eagle3_model(target, **options) -> Eagle3Model:
    """An EAGLE-3 network for a target, which lacks one token in eight and reads three states in no particular order."""
    config = target.config.get_text_config()
    count, vocabulary = config.num_hidden_layers, config.vocab_size
    size = vocabulary - max(1, vocabulary // 8)
    torch.manual_seed(5)
    network = Eagle3Model(
        Eagle3Config(**{
            "hidden_size": 48, "target_hidden_size": config.hidden_size, "target_vocab_size": vocabulary,
            "draft_vocab_size": size, "target_layers": (count, 0, (count + 1) // 2), "num_heads": 4, "num_kv_heads": 2,
            "intermediate_size": 32, "rotation": Rotation(12), "own_embeddings": True,
        } | options),
        torch.randperm(vocabulary)[:size],
    )  # fmt: skip
    return network.to(next(target.parameters()).dtype).eval()


def causal(rows: int):
    """Attention of `rows` packed texts of equal length over dense tensors; see `Attend`."""

    def attend(layer, q, k, v):
        q, k, v = (x.unflatten(0, (rows, -1)).transpose(1, 2) for x in (q, k, v))
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return mixed.transpose(1, 2).flatten(0, 1)

    return attend


@torch.no_grad()
def outputs_of(network, target, texts):
    """What `network` gives for the target's features of `texts [B, L]`, after all tokens but one: `[B, L - 1, h]`."""
    states = target(input_ids=texts, output_hidden_states=True).hidden_states
    features = torch.cat([states[layer] for layer in network.config.target_layers], -1)[:, :-1]
    rows, length = texts.shape
    positions = torch.arange(length - 1).repeat(rows)
    embedded, fused = network.embed(texts[:, 1:].flatten()), network.fuse(features.flatten(0, 1))
    return network(embedded, fused, positions, causal(rows))[0].unflatten(0, (rows, -1))


@torch.no_grad()
def fit(network, target, count=96, tokens=24):
    """Let the output layer tell the target's own greedy tokens, by ridge regression over `count` texts."""
    width, vocabulary = 6, target.config.vocab_size
    tokens = min(tokens, getattr(target.config, "max_position_embeddings", 160) - width)
    own = torch.randint(0, vocabulary, (count, width), generator=torch.Generator().manual_seed(3))
    for _ in range(tokens):
        own = torch.cat([own, target(input_ids=own).logits[:, -1:].argmax(-1)], 1)
    given = outputs_of(network, target, own)[:, width - 2 : -1].flatten(0, 1).double()
    wanted = torch.nn.functional.one_hot(own[:, width:].flatten(), vocabulary).double()
    kernel = given.T @ given + 1e-2 * torch.eye(given.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(kernel, given.T @ wanted).T[network.draft_tokens]
    network.lm_head.weight.copy_(8 * weight)


def fitted(target, **options) -> Eagle3Model:
    """`eagle3_model` with a fitted output layer; the same for equal targets."""
    told = sum(float(parameter.double().abs().sum()) for parameter in target.parameters())
    key = repr(target.config), told, repr(options)
    if key not in FITTED:
        FITTED[key] = eagle3_model(target, **options)
        fit(FITTED[key], target)
    return FITTED[key]


def eagle3(target, *shape, **options) -> Eagle3Drafter:
    """A fitted drafter of this shape for a target, a model or a runner."""
    model = target.model if isinstance(target, ModelRunner) else target
    return Eagle3Drafter(fitted(model), *shape, **options)
