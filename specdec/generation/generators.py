"""The generators a user calls."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from attention.gpu import on
from specdec.acceptance import AcceptanceRule, block, greedy, lossless, rejection, tree_distinct, tree_exact, tree_iid
from specdec.drafters import Drafter, require_drafter
from specdec.drafters.base import runners_of
from specdec.drafters.shapes import fixed_policy, require_shape
from specdec.drafters.suffix_memory import clear_memories
from specdec.generation.automatic import AutomaticShapes, watch_for_loss
from specdec.model.runner import ModelRunner
from specdec.planning.loss_watch import LossWatch
from specdec.planning.policy import Policy, ReplayPolicy, Shape
from specdec.planning.step_clock import StepClock
from specdec.report.stats import GenerationStats
from specdec.requests.inputs import require_device_of
from specdec.requests.request import Request, build_request
from specdec.requests.rows import Row
from specdec.rounds.captured import CapturedRounds
from specdec.rounds.loop import decode
from specdec.sampling.processors import name_of
from specdec.trees.tree import TokenTree

SAMPLING = (lossless, rejection, block, tree_iid, tree_distinct, tree_exact)


@dataclass(frozen=True, slots=True)
class GenerationOutput:
    """The result of a `generate` call.

    sequences [B, S + longest] int64: the prompts as given, each row's new tokens, then pad tokens
    lengths [B] int64: new tokens of each row, a final end-of-text token included
    stats: statistics of the call
    scores, logits: float32 `[B, V]` for each new token of the longest row, with `output_scores` and `output_logits`:
        the target's logits after and before the processors; zeros where a row has ended
    """

    sequences: Tensor
    lengths: Tensor
    stats: GenerationStats
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None


class SpeculativeGenerator:
    """Decodes a target model faster: a drafter proposes tokens, and the target checks them all in one forward.

    `target` is a transformers causal language model or a `ModelRunner`; it stays unchanged and can be used by itself or
    by other generators in other threads meanwhile. Calls of one generator from several threads wait for each other.
    Greedy output equals the target's own, sampled output is distributed exactly as the target's samples (Leviathan et
    al. 2023). `drafter` None gives plain decoding. `rule` replaces the acceptance rule that follows from `do_sample`
    (greedy, or the exact one that fits the draft); `stats.lossless` tells whether it keeps the target's distribution.

    `tree` is the shape to draft, for drafters that accept one (None: the drafter's own). "auto" learns acceptance and
    times while it decodes and chooses a chain, a tree, or plain steps where speculation does not pay, for the number of
    rows that there are; `stats.pooled.shapes` lists its choices. The generator keeps times and the usual acceptance
    between calls, on a GPU times also in the user's cache folder. Since the choices depend on times and on the whole
    batch, a seed does not repeat a sampled run with "auto", although the distribution is the target's. A fixed shape
    whose captured rounds are slower than plain steps is named by a warning. Raises ValueError for a target, drafter and
    tree that do not fit.

    `kv_dtype` "int8" or "fp8" stores the target's keys and values in 8 bits. The text is then distributed exactly as
    that of the target with the quantised cache, not of the full-precision one; float noise between batch shapes may
    push a number over a rounding boundary and move logits by some hundredths. `mode` is that of `ModelRunner` ("auto"
    if None): with "graph" or "compile" whole rounds are captured, or `stats.host` gives the reason why not. A
    `ModelRunner` brings its own settings instead.

    >>> import specdec
    >>> pair = specdec.load_tiny_pair()
    >>> generator = specdec.SpeculativeGenerator(pair.target, specdec.ModelDrafter(pair.draft, num_tokens=4))
    >>> out = generator.generate(pair.tokenizer("def add(a, b):", return_tensors="pt").input_ids, max_new_tokens=16)
    >>> out.sequences.shape[0], int(out.lengths[0]) <= 16
    (1, True)
    """

    def __init__(self, target, drafter: Drafter | None, rule: AcceptanceRule | None = None, kv_dtype: str | None = None,
                 tree: TokenTree | str | None = None, mode: str | None = None):  # fmt: skip
        for name, given in (("kv_dtype", kv_dtype), ("mode", mode)) if isinstance(target, ModelRunner) else ():
            own = getattr(target, name)
            if given not in (None, own) and not (given == "auto" and target.auto):
                raise ValueError(f"target is a ModelRunner with {name}={own!r}, so {name}={given!r} is not possible")
        if drafter is not None:
            require_drafter(drafter)
        if rule is not None and (isinstance(rule, type) or not callable(rule)):
            raise TypeError(
                f"rule must be an acceptance rule, such as specdec.acceptance.block or Typical(), got {rule!r}"
            )
        if not isinstance(target, ModelRunner):
            target = ModelRunner(target, kv_dtype=kv_dtype, mode=mode or "auto")
        self.target: ModelRunner = target
        self.drafter, self._rule, self._tree = drafter, rule, tree
        self._clock, self._captured = StepClock(), CapturedRounds(self.target)
        self._automatic, self._watch = AutomaticShapes(self.target, self._captured), LossWatch()
        if drafter is not None:
            drafter.validate(self.target)
            if drafter.traits.max_tokens >= self.target.MAX_TREE:
                raise ValueError(
                    f"a draft may have {self.target.MAX_TREE - 1} tokens, got a drafter of {drafter.traits.max_tokens}"
                )
        if tree is not None:
            require_shape(drafter, tree, self.target)

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, max_new_tokens: int | None = None,
                 do_sample: bool | None = None, temperature: float | None = None, top_k: int | None = None,
                 top_p: float | None = None, generation_config=None, logits_processor: Sequence[Callable] | None = None,
                 stopping_criteria: Sequence[Callable] | None = None, streamer=None, seed: int | None = None,
                 tokenizer=None, prefix_allowed_tokens_fn: Callable | None = None,
                 shapes: Sequence[Shape] | None = None, **options) -> GenerationOutput:  # fmt: skip
        """Generate for a batch of prompts.

        `input_ids [B, S]` is padded on the left, with `attention_mask [B, S]` 0 on the padding (None: inferred from the
        pad token, as in transformers). Options that are None come from `generation_config`; without one they are
        do_sample=False, temperature=1.0, no top-k and no top-p, and everything else (end-of-text tokens, penalties, bad
        words, max_new_tokens, which defaults to 128) comes from the model's own generation config.

        `options` are further settings of a `GenerationConfig` and come before it: eos_token_id, repetition_penalty,
        min_new_tokens, max_length, num_return_sequences (with do_sample: rows of one prompt follow each other),
        output_scores, output_logits, stop_strings (with `tokenizer`) and so on; None turns one off. Two more are
        OpenAI's: `presence_penalty` lowers the scores of tokens that have been generated, `frequency_penalty` does so
        once for each time. Settings of transformers' own cache and compilation change nothing.

        Images are what the processor of a vision-language target gives: `generate(**processor(text=…, images=…))`. With
        pixel_values, all inputs of the model's forward go to its own forward over the prompts, which runs whole and
        eagerly; a prompt must end with text. Draft models see token ids alone, which costs acceptance and changes no
        text; heads and modules that read the target's features read those of images too. Without images such inputs,
        token_type_ids say, are checked to change nothing.

        A processor must be a function of `(input_ids, scores)`: it is called for drafted tokens too, more than once and
        in any order, one text at a time (`[1, L]` and `[1, V]`), but never after a token to which the processors gave
        -inf. Transformers' own processors with a memory raise ValueError; matchers with a state go through
        `specdec.sampling.grammar`; a processor with a method `for_row(row, width)` is replaced in each row by what that
        returns (`width`: tokens of the padded prompt). Criteria are called for each row after every token that is kept,
        without scores (None).

        The user's processors and criteria see a row with its padding, as in transformers' `generate`, so that lengths
        count from the padded width; one of a type that the config makes too replaces the config's. Those made from the
        config see the row without padding, as if it ran alone. `streamer.put` gets the prompt, then each round's new
        tokens (`[n]`, or `[B, n]` padded for several rows). `seed` makes a run repeatable; None draws one from torch's
        generator. `shapes`, those that the rounds of one text had before (`Handle.shapes` of an engine, which chooses
        by the load), repeat it with the same seed. Raises ValueError or TypeError naming the bad value; all cache pages
        are freed."""
        named = {"do_sample": do_sample, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        options |= {name: value for name, value in named.items() if value is not None}
        require_device_of(self.target, input_ids)
        request = build_request(
            self.target, input_ids, attention_mask, generation_config, logits_processor, stopping_criteria, seed,
            max_new_tokens, tokenizer, prefix_allowed_tokens_fn, **options,
        )  # fmt: skip
        input_ids = input_ids.repeat_interleave(len(request.prompts) // len(input_ids), 0)
        rule = self._rule or (lossless if request.do_sample else greedy)
        if rule in SAMPLING and not request.do_sample or rule is greedy and request.do_sample:
            raise ValueError(
                f"the rule {name_of(rule)} does not go with do_sample={request.do_sample}: leave rule out, or change "
                "do_sample"
            )
        if streamer is not None:
            if not (hasattr(streamer, "put") and hasattr(streamer, "end")):
                raise TypeError(f"streamer must have the methods put and end, as transformers' have, got {streamer!r}")
            streamer.put(input_ids.cpu())
        emit = None if streamer is None else _stream_to(streamer, request)
        clock = None if self.drafter is None or self._tree == "auto" else self._clock
        with _alone(self.target, self.drafter), on(self.target.device):
            policy = self._policy(request, rule) if shapes is None else self._replay(request, shapes)
            decoded = decode(self.target, self.drafter, rule, request, policy, self._captured, emit, clock)
        if streamer is not None:
            streamer.end()
        if clock is not None and decoded.stats.host is None:
            watch_for_loss(self._watch, self.drafter, self._tree, decoded.stats.rows)
        lengths = [len(row) for row in decoded.rows]
        padded = [row + [request.pad] * (max(lengths) - len(row)) for row in decoded.rows]
        sequences = torch.cat([input_ids.long(), torch.tensor(padded, device=input_ids.device)], 1)
        outputs = {name: pad_sequence(rows).unbind() for name, rows in decoded.outputs.items()}
        return GenerationOutput(sequences, torch.tensor(lengths), decoded.stats, **outputs)

    def explain(self) -> str:
        """Tables, of the target and each draft model, of operations that are fused into kernels or why they are not.

        After them why the rounds of no call are captured, where the drafter is the reason."""
        return self._captured.explain(self.drafter)

    def forget_texts(self) -> None:
        """Drop what calls so far have taught: acceptance of tree="auto", and answers that a `SuffixMemory` remembers.

        The next call begins as that of a new generator, but for times of rounds, captured rounds and frozen memories,
        which no text changes."""
        self._automatic.forget_texts()
        clear_memories(self.drafter)

    def _policy(self, request: Request, rule: AcceptanceRule) -> Policy:
        if self.drafter is not None and self._tree == "auto":
            return self._automatic.policy(self.drafter, self._rule, rule, request)
        return fixed_policy(self.drafter, self._tree)

    def _replay(self, request: Request, shapes: Sequence[Shape]) -> Policy:
        if self.drafter is None or len(request.prompts) > 1:
            raise ValueError(
                f"shapes are those of one text's rounds with a drafter, got {self.drafter!r} and "
                f"{len(request.prompts)} texts"
            )
        return ReplayPolicy(shapes, max([self.drafter.traits.max_tokens, *(shape.tokens for shape in shapes)]))


class AutoregressiveGenerator:
    """Plain decoding of the target with the same cache and loop: the baseline of every speedup here.

    `kv_dtype` and `mode` are those of `SpeculativeGenerator`; compare generators with equal ones.
    """

    def __init__(self, target, kv_dtype: str | None = None, mode: str | None = None):
        self._generator = SpeculativeGenerator(target, None, kv_dtype=kv_dtype, mode=mode)
        self.target = self._generator.target

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options) -> GenerationOutput:
        """See `SpeculativeGenerator.generate`; the same options."""
        return self._generator.generate(input_ids, attention_mask, **options)

    def explain(self) -> str:
        """See `SpeculativeGenerator.explain`."""
        return self._generator.explain()


@contextmanager
def _alone(target: ModelRunner, drafter: Drafter | None) -> Iterator[None]:
    """Wait until no other thread decodes with these runners, whose caches and graphs serve one call at a time."""
    runners = {id(runner): runner for runner in (target, *runners_of(drafter))}
    with ExitStack() as stack:
        for _, runner in sorted(runners.items()):  # in one order in all threads, against deadlocks
            stack.enter_context(runner.lock)
        yield


def _stream_to(streamer, request: Request) -> Callable[[Sequence[Row]], None]:
    def emit(rows: Sequence[Row]) -> None:
        new_tokens: list[list[int]] = [[] for _ in request.prompts]
        for row in rows:
            new_tokens[row.number] = row.new_tokens
        width = max(len(row) for row in new_tokens)
        if len(new_tokens) == 1:
            streamer.put(torch.tensor(new_tokens[0]))
        else:
            streamer.put(torch.tensor([row + [request.pad] * (width - len(row)) for row in new_tokens]))

    return emit
