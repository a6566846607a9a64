"""MTP as a drafter: a target's own modules for further tokens, step by step over pages of their own.

The module reads the target's last hidden state of token i and the embedding of token i + 1, and predicts token i + 2.
After a round it runs again over the accepted tokens, with the target's states; every further level reads what the level
above gave, after the module's norm, and is the work of the same module, or of the next one where there is one a depth.
Source: DeepSeek-AI 2024 (DeepSeek-V3), sections 2.2 and 5.4.3."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from specdec.drafters.base import DraftSession
from specdec.drafters.feature_drafting import FeatureDrafting, MakeState
from specdec.drafters.mtp.layouts import MtpLayout, find_modules
from specdec.drafters.mtp.network import build_module
from specdec.drafters.mtp.state import ModulesState
from specdec.drafters.mtp.steps import MtpModules, MtpSteps
from specdec.loading import fetch_weights, read_weights, weight_places
from specdec.model.feature_runner import FeatureRunner
from specdec.model.runner import ModelRunner
from specdec.requests.rows import Rows
from specdec.trees.tree import TokenTree

if TYPE_CHECKING:  # importing it takes seconds
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class MtpModule:
    """An MTP module of the target `model`: `network`, one of `count` in its checkpoint, which has the `layout`."""

    model: "PreTrainedModel"
    network: "PreTrainedModel"
    layout: MtpLayout
    number: int = 0
    count: int = 1


def load_mtp(model: "PreTrainedModel", name: str | Path | None = None, number: int = 0) -> MtpModule:
    """MTP module `number` of the target `model` from the checkpoint that it was loaded from, or from `name`.

    Raises as `load_modules`."""
    return load_modules(model, name, number)[0]


def load_modules(model: "PreTrainedModel", name: str | Path | None = None,
                 number: int | None = None) -> list[MtpModule]:  # fmt: skip
    """All MTP modules of the target `model`, or module `number` alone; see `load_mtp`.

    Raises ValueError or FileNotFoundError, naming what, for a checkpoint without it or with another target's."""
    place = name or model.config.name_or_path
    if not place:
        raise ValueError(
            f"the {type(model).__name__} was not loaded from a checkpoint: name the one with its MTP modules"
        )
    places = weight_places(fetch_weights(place))
    layout, modules = find_modules(places, model.config.get_text_config().num_hidden_layers)
    if number is not None and not 0 <= number < len(modules):
        raise ValueError(f"{place} has {len(modules)} MTP modules, number {number} is not one of them")
    found = []
    for one in range(len(modules)) if number is None else (number,):
        held = read_weights(places, modules[one].values())
        weights = {mine: held[theirs] for mine, theirs in modules[one].items()}
        found.append(MtpModule(model, build_module(model, layout, weights), layout, one, len(modules)))
    return found


def make_mtp(target: ModelRunner, path: str | None, number: int | None = None, **options) -> "MtpDrafter":
    """A drafter with the MTP modules of the target, from `path` or the checkpoint that the target was loaded from.

    number: the only one that drafts, repeated at every depth (None: each at its own depth, where there are several)."""
    modules = load_modules(target.model, path, number)
    return MtpDrafter(modules if len(modules) > 1 else modules[0], **options)


def _modules_state(runner: FeatureRunner, rows: Rows, max_tokens: int, depth: int) -> ModulesState:
    return ModulesState(runner, rows, max_tokens)


class MtpDrafter:
    """Drafts with an MTP module (`load_mtp`) a chain of `num_tokens`, or `tree`, or trees of each row's own.

    One module is repeated at every depth; of several (`load_modules`) each drafts one level, so that drafts are as deep
    as there are modules at most. num_tokens: None is 3 for one module, and one for each of several. `dynamic`,
    `sample`, `kv_dtype`, `window` and `sinks` are those of `Eagle3Drafter`.

    normed: whether the states that it reads are those after the final norm, the target's and then its own, as in vLLM
        and transformers; else those before it, as in exllamav3 and mlx-lm. What a checkpoint was trained with only
        acceptance tells.
    zero_first: whether the embedding at position 0 of the first module counts as zero, as in vLLM; transformers keeps
        it.

    Raises ValueError for numbers out of range and, in `validate`, for another target than the module's."""

    def __init__(self, module: MtpModule | Sequence[MtpModule], num_tokens: int | None = None,
                 tree: TokenTree | None = None, dynamic: tuple[int, int, int] | None = None, sample: bool = True,
                 kv_dtype: str | None = None, normed: bool = True, zero_first: bool = False,
                 window: int | None = None, sinks: int = 0):  # fmt: skip
        self.modules = (module,) if isinstance(module, MtpModule) else tuple(module)
        several, first = not isinstance(module, MtpModule), MtpSteps(self.modules[0].network, normed, zero_first)
        if sinks and first.adapter.has_windows:
            raise ValueError(f"the MTP module has sliding windows, beside which there are no {sinks} sinks")
        count = num_tokens if num_tokens is not None else len(self.modules) if several else 3
        source: MtpSteps | MtpModules = first
        make_state: MakeState | None = None
        if several:
            depth = dynamic[1] if dynamic is not None else count if tree is None else tree.max_depth
            if depth > len(self.modules):
                raise ValueError(
                    f"{len(self.modules)} MTP modules, one a depth, draft as many tokens at most, got a draft of "
                    f"{depth} levels; a single one of them (number=0) is repeated"
                )
            rest = (MtpSteps(one.network, normed) for one in self.modules[1 : max(1, depth)])
            source, make_state = MtpModules((first, *rest)), _modules_state
        shape = count, tree, dynamic
        self._drafting = FeatureDrafting(source, *shape, sample, kv_dtype, window, sinks, make_state)
        self.runner, self.traits = self._drafting.runner, self._drafting.traits

    @property
    def module(self) -> MtpModule:
        """The first one of `modules`."""
        return self.modules[0]

    def validate(self, target: ModelRunner) -> None:
        """Raise ValueError unless `target` runs the model that the module belongs to."""
        if target.model is not self.module.model:
            raise ValueError(
                f"the MTP module is that of a {type(self.module.model).__name__} that is not the generator's target"
            )
        self._drafting.require_fit(target, self.runner.source.traits.vocab_size)

    def start(self, rows: Rows, max_tokens: int) -> DraftSession:
        """Begin to draft; the module's own cache gets room for every row."""
        return self._drafting.session(rows, max_tokens)

    def describe(self) -> str:
        """What the checkpoint's layout decided, and what was chosen."""
        module, layout, source = self.module, self.module.layout, self.runner.source
        order = "[hidden; token]" if layout.hidden_first else "[token; hidden]"
        steps = source.depths[0] if isinstance(source, MtpModules) else source
        assert isinstance(steps, MtpSteps)
        first, norm = "counts as zero" if steps.zero_first else "is kept", "after" if steps.normed else "before"
        several = isinstance(source, MtpModules)
        which = f"{len(self.modules)} MTP modules, one a depth," if several else f"MTP module {module.number}"
        return (
            f"{which} of {module.count} in the {layout.name} layout: its projection reads {order}, "
            f"hidden states are those {norm} the final norm, the target's and then its own; the embedding at position "
            f"0 {first}"
        )
