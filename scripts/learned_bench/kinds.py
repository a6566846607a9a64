"""The kinds of drafters that `scripts.bench_learned` trains beside Medusa heads; another one is one more entry."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from specdec.drafters.eagle3.drafter import Eagle3Drafter
from specdec.drafters.eagle3.loading import load_eagle3
from specdec.drafters.eagle3.saving import save_drafter
from specdec.training.eagle3.network import new_eagle3
from specdec.training.eagle3.training import train_eagle3
from specdec.training.network import choose_draft_tokens
from specdec.training.unrolled.settings import UnrolledSettings


@dataclass(frozen=True, slots=True)
class LearnedKind:
    """How a kind of drafter is made, trained, kept and run; `chosen` is the preset's entry of its `key`.

    key       name of its files and of its entry in the preset
    new       `(model, rows, chosen)` -> an untrained module in float32
    train     `(model, module, rows, folder, chosen, steps, seed, every, accelerator)` -> the log; `every` steps are
              between its records and, None: none, between its checkpoints
    save      `(module, folder)`
    load      `(target runner, folder)` -> the module in the target's dtype
    drafter   `(module, num_tokens= | tree= | dynamic=, sample=)` -> a drafter
    """

    key: str
    new: Callable
    train: Callable
    save: Callable
    load: Callable
    drafter: Callable


def new_network(model, rows, chosen):
    """An EAGLE-3 network of the model's shape over the most frequent tokens."""
    vocabulary = model.get_output_embeddings().weight.shape[0]
    tokens, share = choose_draft_tokens(rows, chosen["draft_vocabulary"] or vocabulary, vocabulary)
    print(f"EAGLE-3 drafts {vocabulary if tokens is None else len(tokens)} tokens, {share:.1%} of the rows", flush=True)
    return new_eagle3(model, tokens)


def train_network(model, network, rows, folder, chosen, steps, seed, every, accelerator):
    """EAGLE-3 by training-time test, without validations."""
    log_every, save_every = every
    settings = UnrolledSettings(
        steps, **chosen["settings"], seed=seed, log_every=log_every, validate_every=steps, save_every=save_every
    )
    return train_eagle3(model, network, rows, folder, settings, (), accelerator, progress=False)


def save_network(network, folder):
    """In the target's 16 bits on a GPU, as drafters ship."""
    low = next(network.parameters()).device.type == "cuda"
    save_drafter(network.to(torch.bfloat16 if low else torch.float32), folder)


KINDS = {
    "EAGLE-3": LearnedKind(
        "eagle3", new_network, train_network, save_network,
        lambda target, folder: load_eagle3(target, folder)[0], Eagle3Drafter,
    ),
}  # fmt: skip
