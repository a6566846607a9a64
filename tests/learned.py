"""EAGLE-3 drafters, block drafters and MTP modules for tiny random targets, that are right now and then.

They are random but for an output layer that was fitted."""

import copy

import torch
from transformers import DynamicCache

from scripts.generate_bench.peers import cache_argument
from specdec import ModelRunner
from specdec.drafters.block.config import BlockConfig
from specdec.drafters.block.dense import block_places
from specdec.drafters.block.drafter import BlockDrafter
from specdec.drafters.block.module import BlockModel
from specdec.drafters.eagle3.config import Eagle3Config
from specdec.drafters.eagle3.drafter import Eagle3Drafter
from specdec.drafters.eagle3.module import Eagle3Model
from specdec.drafters.mtp.drafter import MtpDrafter, MtpModule
from specdec.drafters.mtp.layouts import LAYOUTS
from specdec.drafters.mtp.network import build_module
from specdec.drafters.network.rotation import Rotation
from specdec.model.decoder_layers import name_of_layers

FITTED: dict[tuple, Eagle3Model] = {}
BLOCKS: dict[tuple, BlockModel] = {}
HEADS: dict[tuple, list[torch.Tensor]] = {}  # of MTP modules, one a depth
TEXTS: dict[tuple, torch.Tensor] = {}  # of targets


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
    if network.config.parallel:
        torch.nn.init.normal_(network.mask_hidden)
    return network.to(next(target.parameters()).dtype).eval()


def causal(rows: int):
    """Attention of `rows` packed texts of equal length over dense tensors; see `Attend`."""

    def attend(layer, q, k, v):
        q, k, v = (x.unflatten(0, (rows, -1)).transpose(1, 2) for x in (q, k, v))
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return mixed.transpose(1, 2).flatten(0, 1)

    return attend


@torch.no_grad()
def outputs_of(network, target, texts, **inputs):
    """`[B, L - 1, h]`: what `network` gives for the target's features at every token of `texts [B, L]` but the last.

    inputs: of the target's forward."""
    states = target(input_ids=texts, output_hidden_states=True, **inputs).hidden_states
    features = torch.cat([states[layer] for layer in network.config.target_layers], -1)[:, :-1]
    rows, length = texts.shape
    positions = torch.arange(length - 1).repeat(rows)
    embedded, fused = network.embed(texts[:, 1:].flatten()), network.fuse(features.flatten(0, 1))
    return network(embedded, fused, positions, causal(rows))[0].unflatten(0, (rows, -1))


@torch.no_grad()
def own_texts(target, count=96, width=6, tokens=24):
    """`[count, width + n]`: random beginnings of `width` tokens, and what an equal target says then, once."""
    tokens = min(tokens, getattr(target.config.get_text_config(), "max_position_embeddings", 160) - width)
    key = repr(target.config), sum_of(target), target.device, target.dtype, count, width, tokens
    if key not in TEXTS:
        own = new = torch.randint(
            0, target.config.get_text_config().vocab_size, (count, width), generator=torch.Generator().manual_seed(3)
        )
        cache = DynamicCache(config=target.config)
        for _ in range(tokens):
            out = target(input_ids=new, use_cache=True, **{cache_argument(target): cache})
            new = out.logits[:, -1:].argmax(-1)
            own = torch.cat([own, new], 1)
        TEXTS[key] = own
    return TEXTS[key]


def regression(given, wanted, vocabulary):
    """`[V, h]`: an output layer that tells tokens `wanted [n]` from `given [n, h]`, by ridge regression."""
    given, wanted = given.double(), torch.nn.functional.one_hot(wanted, vocabulary).double()
    kernel = given.T @ given + 1e-2 * torch.eye(given.shape[1], dtype=torch.float64)
    return 8 * torch.linalg.solve(kernel, given.T @ wanted).T


@torch.no_grad()
def fit(network, target, width=6):
    """Let the output layer tell the target's own greedy tokens."""
    own = own_texts(target, width=width)
    given = outputs_of(network, target, own)[:, width - 2 : -1].flatten(0, 1)
    weight = regression(given, own[:, width:].flatten(), target.config.get_text_config().vocab_size)
    network.lm_head.weight.copy_(weight[network.draft_tokens])


def on_host(model):
    """`model`, or a copy of it on the CPU, where drafters are fitted."""
    return model if model.device.type == "cpu" else copy.deepcopy(model).cpu()


def sum_of(model) -> float:
    """What tells models of one configuration apart."""
    return sum(float(parameter.detach().double().abs().sum()) for parameter in model.parameters())


def fitted_once(held: dict, target, make, fit, options: dict):
    """`make(target, **options)` after `fit`, where the target is; on the CPU the same for equal targets."""
    host = on_host(target)
    key = repr(host.config), sum_of(host), repr(options)
    if key not in held:
        held[key] = make(host, **options)
        fit(held[key], host)
    return held[key] if host is target else copy.deepcopy(held[key]).to(target.device)


def fitted(target, **options) -> Eagle3Model:
    """`eagle3_model` with a fitted output layer, see `fitted_once`."""
    return fitted_once(FITTED, target, eagle3_model, fit, options)


def eagle3(target, *shape, **options) -> Eagle3Drafter:
    """A fitted drafter of this shape for a target, a model or a runner."""
    model = target.model if isinstance(target, ModelRunner) else target
    return Eagle3Drafter(fitted(model), *shape, **options)


def parallel_eagle3(target, *shape, **options) -> Eagle3Drafter:
    """A fitted P-EAGLE drafter of this shape for a target, a model or a runner."""
    model = target.model if isinstance(target, ModelRunner) else target
    return Eagle3Drafter(fitted(model, mask_token=1), *shape, **options)


def block_model(target, reduced=True, **options) -> BlockModel:
    """A random block network for a target, which lacks one token in eight or, if not `reduced`, none."""
    config = target.config.get_text_config()
    count, vocabulary = config.num_hidden_layers, config.vocab_size
    size = vocabulary - max(1, vocabulary // 8) if reduced else vocabulary
    torch.manual_seed(6)
    network = BlockModel(
        BlockConfig(**{
            "hidden_size": config.hidden_size, "target_vocab_size": vocabulary, "draft_vocab_size": size,
            "target_layers": (count - 1, 0), "block_size": 4, "mask_token": 1, "num_heads": 4, "num_kv_heads": 2,
            "intermediate_size": 32, "rotation": Rotation(12), "own_embeddings": True, "output": "own",
        } | options),
        torch.randperm(vocabulary)[:size] if reduced else None,
    )  # fmt: skip
    for name, weight in network.named_parameters():  # which begin as nothing
        if "base_kernel" in name or "codebook" in name:
            torch.nn.init.normal_(weight, std=0.5)
    if network.confidence_head is not None:  # it doubts some tokens and is sure of others
        torch.nn.init.normal_(network.confidence_head.proj.weight)
    return network.to(next(target.parameters()).dtype).eval()


def features_of(network, target, text):
    """`[L, F]`: the target's features, which a network reads, at every token of `text [L]`."""
    states = target(input_ids=text[None], output_hidden_states=True).hidden_states
    return torch.cat([states[layer][0] for layer in network.config.target_layers], -1)


@torch.no_grad()
def fit_block(network, target, width=6):
    """Let the output layer tell the target's own greedy tokens, whatever the Markov head says."""
    slots, given, wanted = network.config.num_slots, [], []
    for text in own_texts(target, count=48, width=width):
        anchors = torch.arange(width - 1, len(text) - slots)
        places = block_places(network, features_of(network, target, text), text, anchors)
        given.append(network.slots(places).flatten(0, 1))
        wanted.append((text[anchors[:, None] + 1 + torch.arange(slots)]).flatten())
    weight = regression(torch.cat(given), torch.cat(wanted), target.config.get_text_config().vocab_size)
    network.lm_head.weight.copy_(weight if network.draft_tokens is None else weight[network.draft_tokens])


def fitted_block(target, **options) -> BlockModel:
    """`block_model` with a fitted output layer, see `fitted_once`."""
    return fitted_once(BLOCKS, target, block_model, fit_block, options)


def dflash(target, *shape, **options) -> BlockDrafter:
    """A fitted drafter of this shape whose slots do not depend on each other, for a target, a model or a runner."""
    model = target.model if isinstance(target, ModelRunner) else target
    return BlockDrafter(fitted_block(model, reduced=False, num_layers=2, windows=(None, 5), causal=(False, True)),
                        *shape, **options)  # fmt: skip


def dspark(target, *shape, **options) -> BlockDrafter:
    """A fitted drafter of this shape with Markov and confidence heads, for a target, a model or a runner."""
    model = target.model if isinstance(target, ModelRunner) else target
    heads = dict(from_anchor=True, markov="vanilla", markov_rank=8, confidence="markov")
    return BlockDrafter(fitted_block(model, **heads), *shape, **options)


def dflash2(target, *shape, **options) -> BlockDrafter:
    """A fitted drafter of this shape with a selector and convolutions, for a target, a model or a runner."""
    model = target.model if isinstance(target, ModelRunner) else target
    candidates = min(12, model.config.get_text_config().vocab_size // 2)
    heads = dict(markov="selector", markov_rank=8, candidates=candidates, conv_taps=2, conv_group=4)
    return BlockDrafter(fitted_block(model, reduced=False, **heads), *shape, **options)


def domino(target, *shape, **options) -> BlockDrafter:
    """A fitted drafter of this shape with a GRU over its tokens, for a target, a model or a runner."""
    model = target.model if isinstance(target, ModelRunner) else target
    heads = dict(from_anchor=True, markov="domino", markov_rank=8, memory_size=12, plain_slots=1)
    return BlockDrafter(fitted_block(model, reduced=False, **heads), *shape, **options)


@torch.no_grad()
def mtp_weights(model, seed=7) -> dict[str, torch.Tensor]:
    """Weights of an MTP module for `model`, named as by `find_modules`: its last layer, moved, and random ends."""
    torch.manual_seed(seed)
    layers, norm = name_of_layers(model), model.get_decoder().norm.state_dict()
    moved = lambda x: x + 0.1 * x.std() * torch.randn_like(x) if x.numel() > 1 and x.is_floating_point() else x.clone()
    weights = {f"layers.0.{k}": moved(v) for k, v in model.get_submodule(layers)[-1].state_dict().items()}
    for part in ("token_norm", "hidden_norm", "final_norm"):
        weights |= {f"{part}.{leaf}": value + 0.2 * torch.randn_like(value) for leaf, value in norm.items()}
    size = model.config.get_text_config().hidden_size
    weights["projection.weight"] = (torch.eye(size).repeat(1, 2) + 0.3 * torch.randn(size, 2 * size)) / 2
    return weights


@torch.no_grad()
def mtp_module(model) -> MtpModule:
    """An MTP module for `model` with an output layer of its own, which is fitted once for equal targets."""
    return mtp_modules(model, 1)[0]


@torch.no_grad()
def mtp_modules(model, count=3) -> list[MtpModule]:
    """As many MTP modules, one a depth."""
    host = on_host(model)
    key, layout = (repr(host.config), sum_of(host), host.dtype), LAYOUTS[0]
    weights = [mtp_weights(host, 7 + depth) for depth in range(count)]

    def build(of, depth, head) -> MtpModule:
        return MtpModule(of, build_module(of, layout, weights[depth] | {"head.weight": head}), layout, depth, count)

    fitted = HEADS.setdefault(key, [])
    modules = [build(host, depth, head) for depth, head in enumerate(fitted[:count])]
    for depth in range(len(fitted), count):
        modules.append(
            build(
                host,
                depth,
                torch.zeros(host.config.get_text_config().vocab_size, host.config.get_text_config().hidden_size),
            )
        )
        fitted.append(fitted_head(modules))
        modules[-1] = build(host, depth, fitted[-1])
    return modules if host is model else [build(model, depth, fitted[depth]) for depth in range(count)]


@torch.no_grad()
def outputs_of_modules(modules, tokens, states) -> list[torch.Tensor]:
    """What each module gives at places p of `tokens [B, L]`, of the first of which the target has `states [B, n, h]`.

    Entry d is `[B, min(n, L - 1 - d), h]`: module d reads token p + d + 1 and what the module before gave at p."""
    found = []
    for depth, module in enumerate(modules):
        count = min(states.shape[1], tokens.shape[1] - 1 - depth)
        states = states[:, :count]
        with module.network.get_input_embeddings().reading(states):
            given = tokens[:, 1 + depth : 1 + depth + count]
            states = module.network.get_decoder()(input_ids=given, use_cache=False).last_hidden_state
        found.append(states)
    return found


def fitted_head(modules, width=6) -> torch.Tensor:
    """`[V, h]`: an output layer that tells the target's own greedy tokens from what the last module gives."""
    model = modules[0].model
    own, target, depth = own_texts(model, width=width), copy.deepcopy(model), len(modules) - 1
    states = target(input_ids=own, output_hidden_states=True).hidden_states[-1]
    given = outputs_of_modules(modules, own, states)[-1][:, width - 2 - depth : -1].flatten(0, 1)
    return regression(given, own[:, width:].flatten(), model.config.get_text_config().vocab_size)


def mtp(target, *shape, **options) -> MtpDrafter:
    """A fitted MTP drafter of this shape for a target, a model or a runner."""
    return MtpDrafter(mtp_module(target.model if isinstance(target, ModelRunner) else target), *shape, **options)


def deep_mtp(target, *shape, count=3, **options) -> MtpDrafter:
    """A fitted drafter with `count` MTP modules, one a depth, of this shape for a target, a model or a runner."""
    model = target.model if isinstance(target, ModelRunner) else target
    return MtpDrafter(mtp_modules(model, count), *shape, **options)
