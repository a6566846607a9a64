"""Training EAGLE-3 (Li et al. 2025) and P-EAGLE drafters (arXiv 2602.01469) on the hidden states of a frozen model."""

from collections.abc import Sequence
from pathlib import Path

from specdec.drafters.eagle3.drafter import Eagle3Drafter
from specdec.drafters.eagle3.module import Eagle3Model
from specdec.training.data import Rows
from specdec.training.eagle3.unrolled import unroll, unroll_in_parallel
from specdec.training.network_learner import about_network
from specdec.training.unrolled.settings import UnrolledSettings
from specdec.training.unrolled.training import UnrolledKind, train_unrolled


def train_eagle3(
    model,
    network: Eagle3Model,
    rows: Rows,
    output: str | Path,
    settings: UnrolledSettings,
    prompts: Sequence[list[int]] = (),
    accelerator=None,
    progress: bool = True,
) -> list[dict]:
    """Train `network` in place to draft for `model` over `rows`; returns the log, a list of records.

    A network with a `mask_token` is P-EAGLE's: its further steps read that token and `mask_hidden`, never what a step
    before them gave, and predict in parallel. Everything else, and what it raises, is as in
    `specdec.training.unrolled.training.train_unrolled`."""
    parallel = network.config.parallel
    run = unroll_in_parallel if parallel else unroll
    kind = UnrolledKind(
        "P-EAGLE" if parallel else "EAGLE-3",
        network.config.target_layers,
        lambda rows, tokens, features, depth: run(network, tokens, rows.documents, features, depth, rows.marked),
        Eagle3Drafter,
        about_network(network),
    )
    return train_unrolled(kind, model, network, rows, output, settings, prompts, accelerator, progress)
