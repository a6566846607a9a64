"""Training MTP modules (DeepSeek-AI 2024; FastMTP, arXiv 2509.18362) on the hidden states of their frozen target."""

from collections.abc import Sequence
from pathlib import Path

from specdec.training.data import Rows
from specdec.training.mtp.network import MtpNetwork
from specdec.training.mtp.unrolled import UnrolledModules
from specdec.training.unrolled.settings import UnrolledSettings
from specdec.training.unrolled.training import UnrolledKind, train_unrolled


def train_mtp(
    model,
    network: MtpNetwork,
    rows: Rows,
    output: str | Path,
    settings: UnrolledSettings,
    prompts: Sequence[list[int]] = (),
    accelerator=None,
    progress: bool = True,
) -> list[dict]:
    """Train the MTP modules of `network` in place to draft for `model` over `rows`; returns the log.

    One module takes all `settings.depth` steps after a token; of several each takes one. Everything else, and what it
    raises, is as in `specdec.training.unrolled.training.train_unrolled`; ValueError too for modules of another model,
    and for more steps, or tokens of a validation, than there are modules where these are several."""
    if network.target is not model:
        raise ValueError(f"the MTP modules are those of another {type(network.target).__name__} than the model")
    count = len(network.parts)
    for name in ("depth", "num_tokens"):
        if count > 1 and getattr(settings, name) > count:
            raise ValueError(
                f"{count} MTP modules, one a depth, take as many steps, got {name} {getattr(settings, name)}"
            )
    kind = UnrolledKind(
        "MTP", "output" if network.normed else "last_block", UnrolledModules(network), MtpNetwork.drafter,
        network.describe(),
    )  # fmt: skip
    return train_unrolled(kind, model, network, rows, output, settings, prompts, accelerator, progress)
