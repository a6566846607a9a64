"""Forwards of a model as CUDA graphs, for rounds that run partly on the host.

There is one graph for each number of sequences, number of tokens and tree. The host copies block tables, lengths and
tokens into the graph's input tensors, then one launch replays the forward. A graph is captured when a forward of its
kind is requested for the second time. Prompts, whose sizes all differ, are padded to few sizes. Rounds that run without
the host are captured whole (`specdec.rounds.captured`).
"""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from attention.kv.recurrent import RecurrentStates
from attention.paged.batch import StaticBatch
from attention.paged.device_batch import DeviceSequences
from specdec.cuda_graph import GraphCache, round_up, up_to_power
from specdec.model.features import Features
from specdec.model.output import RunnerOutput
from specdec.trees.tensors import TreeMask

if TYPE_CHECKING:  # importing it takes seconds
    from transformers import PreTrainedModel

MAX_TOKENS = 1024  # larger forwards gain nothing: the time to launch kernels no longer matters
MAX_LOGITS = 1 << 26  # numbers in the logits of a graph, which hold memory as long as the graph exists
MIN_TOKENS = 32  # in a graph for ragged sequences
MIN_CAPACITY = 1024  # tokens a sequence may have in a graph's block table; longer ones get the next power of two
PROMPT_CAPACITY = 4096  # the same in graphs for prompts
TIMES, PROMPT_TIMES = 2, 3  # a graph is captured when a forward of its kind is requested so many times


class GraphHolder(Protocol):
    """An object that captured graphs of a model, and has to drop them when the model or its cache changes."""

    def drop_graphs(self) -> None:
        """Free all graphs."""


def capture_name(model: "PreTrainedModel") -> str:
    """The model's class for messages, and its experts implementation where that one cannot be captured."""
    name, experts = type(model).__name__, getattr(model.config.get_text_config(), "_experts_implementation", None)
    settable = getattr(type(model), "_can_set_experts_implementation", lambda: False)()
    if experts is None or experts == "batched_mm" or not settable:
        return name
    return f'{name} with {experts} experts (model.set_experts_implementation("batched_mm") asks the device nothing)'


class GraphRunner:
    """Runs forwards of one `ModelRunner` as CUDA graphs, at most MAX_GRAPHS of which are kept."""

    MAX_GRAPHS = 64

    def __init__(self, runner):
        self._runner, self.graphs = runner, GraphCache(self.MAX_GRAPHS, lambda graph: graph.bytes)
        self._requested: Counter[Hashable] = Counter()

    @property
    def captures_ragged(self) -> bool:
        """Whether ragged forwards are captured: on a CPU, which has no graphs, their padding only costs time."""
        return self._runner.device.type == "cuda"

    def drop_graphs(self) -> None:
        """Free all graphs."""
        self.graphs.clear()

    def run(self, sequences: Sequence[int], tokens: Tensor, counts: Sequence[int], tree: TreeMask,
            keep: Tensor | None, features: Features | None, prompts: bool = False) -> RunnerOutput | None:  # fmt: skip
        """`ModelRunner.forward` by replaying a graph, after the cache has made room for the tokens.

        None where the forward should run without a graph: it is too large, of a kind that has none, or one that has
        not been requested often enough. Raises CannotCapture."""
        num_logits = sum(counts) if keep is None else len(keep)
        if tree.parts or sum(counts) > MAX_TOKENS or num_logits * self._runner.vocab_size > MAX_LOGITS:
            return None
        if (states := self._runner.cache.states) is not None and not self._follows(states, sequences, counts, keep):
            return None
        if keep is None and len(set(counts)) == 1:
            return self._run_uniform(sequences, tokens, counts[0], tree, features)
        if keep is not None and tree.tensors is None and self.captures_ragged:
            return self._run_ragged(sequences, tokens, counts, tree, keep, features, prompts and tree.size <= 1)
        return None

    def _follows(self, states: RecurrentStates, sequences: Sequence[int], counts: Sequence[int],
                 keep: Tensor | None) -> bool:  # fmt: skip
        """Whether recurrent states have seen just the tokens before the new ones, which a graph takes for granted."""
        length = self._runner.cache.length
        seen = [length(one) - count for one, count in zip(sequences, counts, strict=True)]
        now = [states.checkpoint(one).tokens for one in sequences]
        return keep is None and max(counts) <= states.room and seen == now

    def _run_uniform(self, sequences: Sequence[int], tokens: Tensor, count: int, tree: TreeMask,
                     features: Features | None):  # fmt: skip
        runner = self._runner
        lengths = [runner.cache.length(sequence) for sequence in sequences]
        num_rows, capacity = runner.slots_for(len(sequences)), _capacity(lengths)
        graph = self._graph(
            (num_rows, count, capacity, features, runner.compiles_forwards, tree.static or tree.size),
            lambda: _UniformGraph(runner, num_rows, count, capacity, tree, features),
        )
        return None if graph is None else graph(sequences, [length - count for length in lengths], tokens, tree)

    def _run_ragged(self, sequences: Sequence[int], tokens: Tensor, counts: Sequence[int], tree: TreeMask,
                    keep: Tensor, features: Features | None, prompts: bool):  # fmt: skip
        runner = self._runner
        capacity = _capacity([runner.cache.length(sequence) for sequence in sequences])
        key = len(sequences), round_up(sum(counts), MIN_TOKENS), capacity, len(keep), features
        if prompts:
            capacity = max(capacity, PROMPT_CAPACITY)
            key = up_to_power(len(sequences)), prompt_size(sum(counts)), capacity, up_to_power(len(keep)), features
        graph = self._graph(
            ("ragged", *key, tree.static), lambda: _RaggedGraph(runner, *key, tree), PROMPT_TIMES if prompts else TIMES
        )
        return None if graph is None else graph(sequences, counts, tokens, keep)

    def _graph(self, key: Hashable, make: Callable, times: int = TIMES):
        """The graph under `key`; None for the first `times` - 1 requests."""
        self._requested[key] += 1
        return self.graphs.get(key, make) if self._requested[key] >= times else None


def prompt_size(tokens: int) -> int:
    """Tokens of the graph in which so many tokens of prompts run: few sizes where weights, not tokens, take the time.

    >>> [prompt_size(n) for n in (3, 65, 257, 500, 513)]
    [64, 128, 320, 512, 640]
    """
    return up_to_power(max(tokens, 64)) if tokens <= 256 else round_up(tokens, 256)


def _capacity(lengths: Sequence[int]) -> int:
    return max(MIN_CAPACITY, up_to_power(max(lengths)))


class _UniformGraph:
    """A captured forward over `count` new tokens in each of up to `num_rows` sequences, with its input tensors."""

    def __init__(self, runner, num_rows: int, count: int, capacity: int, tree: TreeMask,
                 features: Features | None):  # fmt: skip
        self._runner, self._features, self._compiled = runner, features, runner.compiles_forwards
        with torch.inference_mode(False):
            alive = torch.zeros(num_rows, dtype=torch.bool, device=runner.device)
            self._tokens = torch.zeros(num_rows, count, dtype=torch.int64, device=runner.device)
            own = [x.new_zeros(num_rows, *x.shape[1:]) for x in tree.tensors or ()]
        self._tree = TreeMask(tensors=(own[0], own[1])) if own else tree
        self._sequences = DeviceSequences(runner.cache, capacity, alive)
        self._graph = runner.capture(self._run, "a forward")
        self.bytes = self._graph.bytes

    def _run(self):
        return self._runner.forward_rows(
            self._sequences, self._tokens, self._tree, features=self._features, compiled=self._compiled
        )

    def __call__(self, sequences: Sequence[int], lengths: Sequence[int], tokens: Tensor, tree: TreeMask):
        count = len(sequences)
        self._sequences.load(sequences, lengths)
        self._tokens[:count] = tokens.view(count, -1)
        for own, given in zip(self._tree.tensors or (), tree.tensors or (), strict=True):
            own[:count] = given
        # copied, as the next replay of any graph in the pool may overwrite the result
        return self._graph().map(lambda x: x[:count].flatten(0, 1).clone())


class _RaggedGraph:
    """A captured forward over up to `total` packed tokens of up to `count` sequences, each with its own number."""

    def __init__(self, runner, count: int, total: int, capacity: int, kept: int, features: Features | None,
                 tree: TreeMask):  # fmt: skip
        self._runner, self._features = runner, features
        self._all_tokens = features is not None and features.tokens == "prompt"
        self._tree, pages = tree, runner.cache.pages_for(capacity)
        self._static = StaticBatch(runner.cache, count, total, pages, -(-tree.size // 64), count * tree.size)
        with torch.inference_mode(False):
            self._tokens = torch.zeros(total, dtype=torch.int64, device=runner.device)
            self._keep = torch.zeros(kept, dtype=torch.int64, device=runner.device)
        self._graph = runner.capture(self._run, "a forward")
        self.bytes = self._graph.bytes

    def _run(self):
        self._static.batch.forget()
        return self._runner.forward_batch(self._tokens, self._static.batch, self._keep, self._features)

    def __call__(self, sequences: Sequence[int], counts: Sequence[int], tokens: Tensor, keep: Tensor):
        self._static.load(sequences, counts, self._tree.of_rows(len(sequences)))
        self._tokens[: len(tokens)] = tokens
        self._keep[: len(keep)] = keep
        out = self._graph()
        features = out.features  # of the kept tokens, or of all with padding at the end
        if features is not None:
            features = features[: len(tokens) if self._all_tokens else len(keep)].clone()
        return RunnerOutput(out.logits[: len(keep)].clone(), features)
