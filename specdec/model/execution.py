"""How the forwards of a `ModelRunner` run: the mode, the twin with its fusions, and what these were made of."""

import threading
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import nn

from attention import ModelAdapter
from attention.gpu import on
from specdec.cuda_graph import CannotCapture
from specdec.model.fingerprint import Fingerprint, fingerprint
from specdec.model.fusion import fused_model
from specdec.model.modes import best_mode, require_mode
from specdec.model.parallel import Ranks
from specdec.model.streaming import streamed_layers

if TYPE_CHECKING:  # importing it takes seconds
    from transformers import PreTrainedModel

HOOKED = "it has hooks, or weights that are offloaded, which a replay would not call or bring"
_FUSING = threading.Lock()  # fusing projections moves weights: two threads must not do that to one model at a time


class Execution:
    """The mode of `model`, which `adapter` runs on `ranks`, and whether it is "auto"; see `ModelRunner`.

    drop_graphs: called before the twin is made anew, whose addresses graphs hold.
    fusion: what is fused in this mode.

    Raises ValueError for a mode in which the model cannot run."""

    def __init__(self, model: "PreTrainedModel", adapter: ModelAdapter, ranks: Ranks, mode: str, fuse: bool,
                 drop_graphs: Callable[[], None]):  # fmt: skip
        self._model, self._adapter, self._ranks, self._drop_graphs = model, adapter, ranks, drop_graphs
        self.auto, self._fuse = mode == "auto", fuse
        mode = self._best_mode() if self.auto else mode
        require_mode(mode, adapter.device, ranks.count)
        self._switch(mode)

    @property
    def mode(self) -> str:
        """How forwards run: one of MODES. Setting it ends "auto"."""
        return self._mode

    @mode.setter
    def mode(self, mode: str) -> None:
        require_mode(mode, self._adapter.device, self._ranks.count)
        self.auto = False
        self._switch(mode)

    def _best_mode(self) -> str:
        return best_mode(self._adapter.device) if self._why_eager() is None else "eager"

    def _why_eager(self) -> str | None:
        """Why this model runs in mode "eager" only; None: it runs in all."""
        if self._ranks.several:
            return f"its weights are split over {self._ranks.count} ranks"
        if self._adapter.spread:
            return f"its layers are on {', '.join(map(str, dict.fromkeys(self._adapter.all_devices)))}"
        return None if (found := streamed_layers(self._model)) is None else found.explain()

    @property
    def _compiles(self) -> bool:
        """Whether mode "compile" is possible: compiled blocks would look up the mixers' own functions."""
        return self._adapter.device.type == "cpu" or not self._adapter.layout.recurrent

    def _switch(self, mode: str) -> None:
        """Drop all graphs, then make the twin, its fusions and its compiled blocks anew for `mode`."""
        kinds = {
            "with streamed layers": streamed_layers(self._model),
            "on several devices": self._adapter.spread,
        }
        for kind in [kind for kind, found in kinds.items() if found and mode != "eager"]:
            raise ValueError(f'a model {kind} runs in mode="eager" only, got {mode!r}')
        if mode == "compile" and not self._compiles:
            raise ValueError('a model with recurrent states runs in mode="eager" or "graph" on a GPU, got "compile"')
        self._mode = mode
        self._runs_eagerly: str | None = None
        self._drop_graphs()
        with _FUSING, on(self._adapter.device):
            twin = self._adapter.renew()
            self.fusion = fused_model.fuse_model(twin, self._adapter.layers, self.fuses, mode)
            self._adapter.run_through(self.fusion.eager, self.fusion.compiled)
            # graphs read weights where they lie, from where another runner may move them
            self._weights = [] if mode == "eager" else [parameter.data for parameter in self._model.parameters()]
            self._fingerprint = self._fingerprint_now()

    def _fingerprint_now(self) -> Fingerprint:
        return fingerprint(self._model, self._adapter.twin.originals)

    @property
    def fuses(self) -> bool:
        """Whether operations are fused in this mode."""
        return self._fuse and self._mode != "eager"

    def fused(self, module: nn.Module) -> nn.Module:
        """See `ModelRunner.fused`."""
        return fused_model.fuse_module(module) if self.fuses else module

    def explain(self) -> str:
        """See `ModelRunner.explain`."""
        told = fused_model.explain(self._model, self._mode, self.fusion if self.fuses else None)
        if self._adapter.expanded is not None:
            told += f"\n{self._adapter.expanded}"
        hooked = HOOKED if self.auto and self._fingerprint.hooked else None
        why = self._why_eager() or self._runs_eagerly or hooked
        return told if why is None else f"{told}\nruns eagerly: {why}"

    def refresh(self) -> None:
        """See `ModelRunner.refresh`."""
        current, mode = self._fingerprint_now(), self._mode
        if self.auto:
            mode = "eager" if current.hooked else self._best_mode()
        if mode != self._mode or current != self._fingerprint or not self.fusion.current():
            self._switch(mode)

    def fall_back(self, error: CannotCapture) -> None:
        """See `ModelRunner.fall_back`."""
        if not self.auto:
            raise error
        self._runs_eagerly = str(error)
        warnings.warn(f'mode="auto" does without: {error}', stacklevel=3)

    def match(self, target: "Execution") -> None:
        """See `ModelRunner.match_mode`."""
        current, mode = self._fingerprint_now(), target.mode
        if target.auto and (current.hooked or self._why_eager() is not None):
            mode = "eager"
        elif mode != "eager" and self._adapter.device.type != target._adapter.device.type:
            mode = best_mode(self._adapter.device)
        mode = "graph" if mode == "compile" and not self._compiles else mode
        same = (self._mode, self._fuse, self.auto) == (mode, target._fuse, target.auto)
        if not same or current != self._fingerprint or not self.fusion.current():
            self._fuse, self.auto = target._fuse, target.auto
            self._switch(mode)
