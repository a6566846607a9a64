"""The kinds of drafters that `scripts.bench_learned` trains beside Medusa heads; another one is one more entry."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from specdec.drafters.base import Drafter
from specdec.drafters.block import saving as block_saving
from specdec.drafters.block.drafter import BlockDrafter
from specdec.drafters.block.growth import Growth
from specdec.drafters.block.loading import load_block
from specdec.drafters.block.module import BlockModel
from specdec.drafters.eagle3.drafter import Eagle3Drafter
from specdec.drafters.eagle3.loading import load_eagle3
from specdec.drafters.eagle3.saving import save_drafter
from specdec.model.fusion.projections import shallow_copy
from specdec.training.block.network import DSPARK, new_block
from specdec.training.block.settings import BlockSettings
from specdec.training.block.training import train_block
from specdec.training.eagle3.network import new_eagle3
from specdec.training.eagle3.training import train_eagle3
from specdec.training.network import choose_draft_tokens, choose_mask_token
from specdec.training.unrolled.settings import UnrolledSettings
from specdec.trees.tree import TokenTree


@dataclass(frozen=True, slots=True)
class LearnedKind:
    """How a kind of drafter is made, trained, kept and run; `chosen` is the preset's entry of its `key`.

    key       name of its files and of its entry in the preset
    new       `(model, rows, chosen)` -> an untrained module in float32
    train     `(model, module, rows, folder, chosen, steps, seed, every, accelerator)` -> the log; `every` steps are
              between its records and, None: none, between its checkpoints
    save      `(module, folder)`
    load      `(target runner, folder)` -> the module in the target's dtype
    methods   `(name, module, own preset, static tree)` -> {method: drafter}
    wide      `(module, tree)` -> a drafter of a static tree of the likeliest tokens, to fit one; None: it has none
    """

    key: str
    new: Callable
    train: Callable
    save: Callable
    load: Callable
    methods: Callable[[str, torch.nn.Module, Mapping, TokenTree | None], dict[str, Drafter]]
    wide: Callable[[torch.nn.Module, TokenTree], Drafter] | None = None


def chain(name, length):
    """The name of a method."""
    return f"{name} chain of {length}"


def grown(name, own):
    """The name of a method: a tree of each row and round."""
    return f"{name} dynamic tree of {own['tree'][0]}"


def marginals(name, length):
    """The name of a method: a chain of the same block without what its tokens say of each other."""
    return f"{name} chain of {length}, independent"


def eagle3_methods(name, module, own, tree):
    """Chains, EAGLE-2's trees, and the fitted tree; where nothing is drawn, the two static trees are the same."""
    found = {chain(name, length): Eagle3Drafter(module, num_tokens=length) for length in own["chains"]}
    found[grown(name, own)] = Eagle3Drafter(module, dynamic=tuple(own["tree"]))
    for text, sample in (("most likely", False), ("drawn", True)):
        found[f"{name} static tree of {own['tree'][0]}, {text}"] = Eagle3Drafter(module, tree=tree, sample=sample)
    return found


def without_head(module: BlockModel) -> BlockModel:
    """The same network whose slots know nothing of each other's tokens; it shares all weights."""
    twin = shallow_copy(module)
    twin.config = replace(module.config, markov="none", markov_rank=0, confidence="none")
    twin.markov_head = twin.confidence_head = None
    return twin


def dspark_methods(name, module, own, tree):
    """Chains, best-first trees of as many rows as `own["grown"]`, and a chain whose tokens are independent."""
    longest, slots = max(own["chains"]), module.config.num_slots
    found = {chain(name, length): BlockDrafter(module, length) for length in own["chains"]}
    found[marginals(name, longest)] = BlockDrafter(without_head(module), longest)
    for rows in own["grown"]:
        found[f"{name} best-first tree of {rows}"] = BlockDrafter(module, growth=Growth.fast(rows - 1, slots))
    return found


def new_network(model, rows, chosen):
    """An EAGLE-3 network of the model's shape over the most frequent tokens."""
    vocabulary = model.get_output_embeddings().weight.shape[0]
    tokens, share = choose_draft_tokens(rows, chosen["draft_vocabulary"] or vocabulary, vocabulary)
    print(f"EAGLE-3 drafts {vocabulary if tokens is None else len(tokens)} tokens, {share:.1%} of the rows", flush=True)
    return new_eagle3(model, tokens)


def new_dspark(model, rows, chosen):
    """A DSpark network of the model's shape over its vocabulary, whose layers begin as its last ones."""
    fields = {name: tuple(value) if name == "windows" else value for name, value in chosen["network"].items()}
    return new_block(model, choose_mask_token(rows, model), **DSPARK | fields)


def trained_by(train, settings_of):
    """`LearnedKind.train` by `train`, without validations; settings_of(steps, ...): its settings."""

    def run(model, network, rows, folder, chosen, steps, seed, every, accelerator):
        log_every, save_every = every
        settings = settings_of(
            steps, **chosen["settings"], seed=seed, log_every=log_every, validate_every=steps, save_every=save_every
        )
        return train(model, network, rows, folder, settings, (), accelerator, progress=False)

    return run


def block_settings(steps, loss, **others):
    """The settings of a block drafter, whose losses JSON keeps as lists."""
    return BlockSettings(steps, loss=tuple(map(tuple, loss)), **others)


def saved_by(save):
    """`LearnedKind.save` by `save`: in the target's 16 bits on a GPU, as drafters ship."""

    def run(network, folder):
        low = next(network.parameters()).device.type == "cuda"
        save(network.to(torch.bfloat16 if low else torch.float32), folder)

    return run


KINDS = {
    "EAGLE-3": LearnedKind(
        "eagle3", new_network, trained_by(train_eagle3, UnrolledSettings), saved_by(save_drafter),
        lambda target, folder: load_eagle3(target, folder)[0], eagle3_methods,
        lambda module, tree: Eagle3Drafter(module, tree=tree, sample=False),
    ),
    "DSpark": LearnedKind(
        "dspark", new_dspark, trained_by(train_block, block_settings), saved_by(block_saving.save_drafter),
        lambda target, folder: load_block(target, folder)[0], dspark_methods,
    ),
}  # fmt: skip
