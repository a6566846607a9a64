"""The targets whose quantisation is measured, and what is measured of each: a cell of the table."""

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import specdec
from attention import UnsupportedArchitecture
from scripts.common.quantise import GROUP
from scripts.generate_bench.speeds import NotAvailable
from scripts.quantised_bench.acceptance import drafters_of, measure_acceptance
from scripts.quantised_bench.kinds import SMALL_GROUP, UNQUANTISED, Quantisation, quantised_target
from scripts.quantised_bench.quality import Predictions, held_out_windows, predict
from scripts.quantised_bench.wide import Streams, read_streams, wide_target

TINY, WIDE = "tiny", "wide"
SUBJECTS = (TINY, WIDE)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Held-out `windows` of `length` tokens, and `prompts` of each kind with up to `tokens` new tokens; the
    wide model's `preset`, and of how many files one is read (`every`)."""

    windows: int
    length: int
    prompts: int
    tokens: int
    preset: str
    every: int


class Subject:
    """A target by its checkpoint, the drafts for it, and texts. `folder` holds what is trained and calibrated."""

    def __init__(self, name: str, sizes: Sizes, folder: Path, streams: Streams, pair):
        self.name, self.sizes, self.folder, self.pair = name, sizes, folder, pair
        self._streams = streams
        self.group = SMALL_GROUP if name == TINY else GROUP  # of most checkpoints; no width of the shipped target fits

    @cached_property
    def checkpoint(self) -> Path:
        """The folder of its weights; the wide model's are trained on the spot."""
        if self.name == TINY:
            return Path(specdec.__file__).parent / "tiny_pair" / "target"
        return wide_target(self.folder / WIDE, self._streams, self.pair.tokenizer, self.sizes.preset)

    @cached_property
    def windows(self):
        """`[N, S]`: held-out text."""
        return held_out_windows(self._streams.held_out, self.sizes.windows, self.sizes.length)

    @cached_property
    def unquantised(self) -> Predictions:
        """What the target predicts as it is, in float32."""
        return predict(self._load(UNQUANTISED)[0], self.windows)

    def measure(self, what: Quantisation) -> dict:
        """The line of the table for this target. Raises NotAvailable, also for a model that pages cannot serve."""
        model, layers = self._load(what)
        try:
            found = predict(model, self.windows, what.kv_dtype)
        except UnsupportedArchitecture as error:
            raise NotAvailable(f"refused: {error}") from error
        texts = [text for kind in self.pair.prompts.values() for text in kind[: self.sizes.prompts]]
        draft = specdec.load_model(Path(specdec.__file__).parent / "tiny_pair" / "draft", what.dtype, "cpu")
        drafters = drafters_of(model, draft, self.name == TINY, self.group)
        accepted = measure_acceptance(
            model, drafters, texts, self.pair.tokenizer, self.sizes.tokens, what.kv_dtype
        )  # fmt: skip
        return {
            "model": self.name, "quantisation": what.name, "title": what.title, "layers": asdict(layers),
            "loss": found.loss, "loss_added": found.loss - self.unquantised.loss,
            "agreement": found.agreement(self.unquantised), "positions": self.windows.numel(),
            "window": self.sizes.length, "drafters": accepted,
        }  # fmt: skip

    def _load(self, what: Quantisation):
        return quantised_target(self.checkpoint, what, self.folder / f"{self.name}-calibrated", self.group)


def subjects_of(names, sizes: Sizes, folder: Path) -> list[Subject]:
    """The targets of these names, with the shipped pair's tokenizer, prompts and draft model."""
    pair = specdec.load_tiny_pair()
    streams = read_streams(pair.tokenizer, sizes.every)
    return [Subject(name, sizes, folder, streams, pair) for name in names]
