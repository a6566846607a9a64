"""transformers' processors that look at the text, as functions of tensors: at all nodes of a draft at once.

Each node has a text of its own: the row's, then the drafted tokens down to the node. A request's numbers are data here,
as in `specdec.sampling.warpers`: rows with different penalties share one call, and a captured round serves all requests
with the same kinds. Scores are those of transformers' classes, bit for bit on a CPU. On a GPU repetition penalty and
n-grams are one kernel each.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from transformers.generation import logits_process as hf

from attention.dispatch import resolve
from specdec.sampling.count_penalties import CountPenalties
from specdec.sampling.prefixes import NONE, Prefixes

INF = float("inf")
ANY_TEXT, ANY_TOKEN = -1, -2  # in a sequence: matches whatever is there, or any token
MOST_SUMMANDS = 8  # finite biases of one token; more of them go through the host


@dataclass(frozen=True, slots=True)
class PrefixProcessor:
    """A processor that looks at the text, without its numbers.

    kind: its class.
    shape: what fixes the shapes of its tensors.
    count, front: how many numbers each row has, and of how many tokens before the row's text (padding).
    """

    kind: type
    shape: tuple[int, ...]
    count: int
    front: int


@dataclass(frozen=True, slots=True)
class Kind:
    """How a class of processors is read, and how it is applied.

    read: (processor, how much padding it sees) -> its shape and its numbers; None: it needs the host.
    apply: (processor, scores, numbers `[count, A]`, prefixes, before); changes the scores `[A, n, V]` in place.
        before: the same scores in other memory, if there are any.
    tokens: the tokens that it names.
    front: (processor, the padding that it sees) -> what of it matters; None: it needs the host.
    """

    read: Callable[..., tuple[tuple[int, ...], list[float]] | None]
    apply: Callable[[PrefixProcessor, Tensor, Tensor, Prefixes, Tensor | None], None]
    tokens: Callable[..., list[int]] = lambda processor: []
    front: Callable[..., list[int] | None] = lambda processor, padding: []


def _in_float32(scores: Tensor) -> Callable[[], str | None]:
    return lambda: None if scores.dtype == torch.float32 else f"it takes float32 scores, got {scores.dtype}"


def last_of(count: int, padding: Sequence[int]) -> list[int] | None:
    """The last `count` tokens of the padding; before them may only be more of the same."""
    return list(padding[-count:]) if len(padding) <= count or len(set(padding)) == 1 else None


# repetition penalty, presence and frequency penalty


def _ignored(processor) -> int:
    return int(0 if processor.prompt_ignore_length is None else processor.prompt_ignore_length)


def _read_repetition(processor, padding: int) -> tuple[tuple[int, ...], list[float]]:
    return (), [float(processor.penalty), max(0, _ignored(processor) - padding)]


def _repetition(processor: PrefixProcessor, scores: Tensor, numbers: Tensor, prefixes: Prefixes,
                before: Tensor | None = None, impl: str | None = None) -> None:  # fmt: skip
    if resolve(impl, scores.device, _in_float32(scores)) == "triton":
        from specdec.sampling.prefix_kernel import launch_repetition

        source = scores.clone() if before is None else before
        launch_repetition(scores, source, numbers[0], numbers[1], processor.front, prefixes)
        return
    penalty, start = numbers.to(scores.dtype)[0, :, None, None], numbers[1]
    start = torch.where(start > 0, start + processor.front, 0)  # padding is seen only by rows that ignore nothing

    def penalised(old: Tensor, times: Tensor) -> Tensor:
        return torch.where(times > 0, torch.where(old < 0, old * penalty, old / penalty), old)

    _change(scores, prefixes.times(start, scores.shape[2], scores.dtype), penalised)


def _read_counts(processor, padding: int) -> tuple[tuple[int, ...], list[float]] | None:
    start = processor.prompt_length - padding
    return None if start < 0 else ((), [processor.presence, processor.frequency, start])


def _counts(processor: PrefixProcessor, scores: Tensor, numbers: Tensor, prefixes: Prefixes,
            before: Tensor | None = None) -> None:  # fmt: skip
    presence, frequency = numbers.to(scores.dtype)[:2, :, None, None]

    def lowered(old: Tensor, times: Tensor) -> Tensor:
        return old - (frequency * times + presence * (times > 0))

    _change(scores, prefixes.times(numbers[2], scores.shape[2], scores.dtype), lowered)


def _change(scores: Tensor, times: list[tuple[Tensor, Tensor]], change: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Write `change(score, times)` over the scores of tokens; later pairs of tokens and times come last."""
    new = [change(scores.gather(2, tokens), number) for tokens, number in times]
    for (tokens, _), values in zip(times, new, strict=True):
        scores.scatter_(2, tokens, values)


# tokens that would complete n tokens which the text has already


def _read_ngram(processor, padding: int) -> tuple[tuple[int, ...], list[float]]:
    return (processor.ngram_size,), []


def _ngram(processor: PrefixProcessor, scores: Tensor, numbers: Tensor, prefixes: Prefixes,
           before: Tensor | None = None, impl: str | None = None) -> None:  # fmt: skip
    """Compare the last n - 1 tokens at each node with those before each token of the text and of the path."""
    if resolve(impl, scores.device, _in_float32(scores)) == "triton":
        from specdec.sampling.prefix_kernel import launch_ngram

        return launch_ngram(scores, processor.shape[0], prefixes)
    (size,), (_, nodes, deepest), width = processor.shape, prefixes.paths.shape, prefixes.tokens.shape[1]
    shifted = lambda back: torch.nn.functional.pad(prefixes.tokens, (back, 0), value=NONE)[:, None, :width]
    near, last = prefixes.near(size - 1)
    place = torch.arange(width, device=scores.device)
    same = (place < prefixes.lengths[:, None, None]) & (shifted(size - 1) >= 0)  # n tokens end here
    for back in range(1, size):
        same = same & (shifted(back) == last[..., -back, None])
    _ban(scores, prefixes.tokens[:, None].expand(-1, nodes, -1), same.expand(-1, nodes, -1))
    if deepest:
        same = (torch.arange(deepest, device=scores.device) < prefixes.depths[..., None]) & (near[..., :deepest] >= 0)
        for back in range(1, size):
            same = same & (near[..., size - 1 - back :][..., :deepest] == last[..., -back, None])
        _ban(scores, prefixes.paths, same)


def _ban(scores: Tensor, tokens: Tensor, banned: Tensor) -> None:
    """Set `scores [A, n, V]` to -inf at those of `tokens [A, n, m]` that are `banned [A, n, m]`."""
    most = torch.where(banned, -INF, INF).to(scores.dtype)
    scores.scatter_reduce_(2, tokens.clamp(min=0), most, "amin")


# biases of tokens that complete a sequence, and bad words


@cache
def only_inside() -> bool:
    """Whether this release of transformers leaves out a sequence with which the text would begin."""
    bias = hf.SequenceBiasLogitsProcessor([[[1, 2], 1.0]])
    return not bool(bias(torch.tensor([[1]]), torch.zeros(1, 3)).any())


def _named(processor) -> list[int]:
    return [int(token) for sequence in processor.sequence_bias for token in sequence]


def _looks_back(processor) -> int:
    """How many tokens at the end of a text matter."""
    return max(map(len, processor.sequence_bias)) - 1 + only_inside()


def _read_bias(processor, padding: int) -> tuple[tuple[int, ...], list[float]] | None:
    """The sequences by their last token: U such tokens, K sequences each, of up to m tokens before the last one."""
    sequences = [(tuple(map(int, s)), float(torch.tensor(bias).float())) for s, bias in processor.sequence_bias.items()]
    if not only_inside():  # then the release adds them up length by length
        lengths = [len(sequence) for sequence, _ in sequences]
        sequences.sort(key=lambda pair: lengths.index(len(pair[0])))
    alone = {sequence[0]: bias for sequence, bias in sequences if len(sequence) == 1}
    ending: dict[int, list[tuple[tuple[int, ...], float]]] = {sequence[-1]: [] for sequence, _ in sequences}
    for sequence, bias in sequences:
        if len(sequence) > 1:
            ending[sequence[-1]].append((sequence[:-1], bias))
    most, longest = max(map(len, ending.values())), _looks_back(processor)
    bans = all(bias == -INF for _, bias in sequences)
    if most > MOST_SUMMANDS and not bans:
        return None
    biases, table = list[float](), list[float]()
    for some in ending.values():
        for tokens, bias in [*some, *[((), 0.0)] * (most - len(some))]:
            there = [ANY_TOKEN] * only_inside() if tokens else []
            table += [*[ANY_TEXT] * (longest - len(there) - len(tokens)), *there, *tokens]
            biases.append(bias)
    return (len(ending), most, longest, int(bans)), [*ending, *(alone.get(u, 0.0) for u in ending), *biases, *table]


def _bias(processor: PrefixProcessor, scores: Tensor, numbers: Tensor, prefixes: Prefixes,
          before: Tensor | None = None) -> None:  # fmt: skip
    """Compare the last tokens at each node with those of every sequence, and add the biases up for each last token."""
    (ends, most, longest, bans), (count, nodes, size) = processor.shape, scores.shape
    tokens, single, biases, table = numbers.split([ends, ends, ends * most, ends * most * longest])
    index = as_tokens(tokens, size).clamp(min=0).t()[:, None].expand(-1, nodes, -1)
    total = single.t()[:, None].to(scores.dtype).expand(-1, nodes, -1)  # [A, n, U]
    if most:
        last, wanted = prefixes.near(longest)[1], as_tokens(table, size).t().view(count, 1, ends * most, longest)
        met = torch.ones((), dtype=torch.bool, device=scores.device)
        for back in range(1, longest + 1):
            want, have = wanted[..., -back], last[..., -back, None]
            met = met & ((want == have) | (want == ANY_TEXT) | (want == ANY_TOKEN) & (have >= 0))
        added = torch.where(met, biases.t()[:, None].to(scores.dtype), 0.0).unflatten(2, (ends, most))
        total = torch.minimum(total, added.amin(-1)) if bans else sum(added.unbind(-1), total)
    scores.scatter_(2, index, scores.gather(2, index) + total)


# tokens that are forbidden to texts of certain lengths


def _forbids(low: Callable, high: Callable, tokens: Callable) -> Kind:
    """Forbids `tokens` to texts of at least `low` and fewer than `high` tokens."""

    def read(processor, padding: int) -> tuple[tuple[int, ...], list[float]]:
        return (), [low(processor) - padding, high(processor) - padding, *tokens(processor).tolist()]

    return Kind(read, _forbid, lambda processor: tokens(processor).tolist())


def _forbid(processor: PrefixProcessor, scores: Tensor, numbers: Tensor, prefixes: Prefixes,
            before: Tensor | None = None) -> None:  # fmt: skip
    index = as_tokens(numbers[2:], scores.shape[2]).clamp(min=0).t()[:, None].expand(-1, scores.shape[1], -1)
    length, (low, high) = prefixes.lengths[:, None] + prefixes.depths, numbers[:2, :, None]
    forbidden = ((length >= low) & (length < high))[..., None]
    scores.scatter_(2, index, torch.where(forbidden, -INF, scores.gather(2, index)))


def as_tokens(numbers: Tensor, size: int) -> Tensor:
    """Numbers as tokens; a slot without a row may hold anything, which must be within bounds all the same."""
    return numbers.long().clamp(ANY_TOKEN, size - 1)


_OF_SEQUENCES = Kind(_read_bias, _bias, _named, lambda processor, padding: last_of(_looks_back(processor), padding))
KINDS: dict[type, Kind] = {
    hf.RepetitionPenaltyLogitsProcessor: Kind(
        _read_repetition, _repetition, front=lambda processor, padding: sorted(set(padding[_ignored(processor) :]))
    ),
    CountPenalties: Kind(_read_counts, _counts),
    hf.NoRepeatNGramLogitsProcessor: Kind(
        _read_ngram, _ngram, front=lambda processor, padding: last_of(processor.ngram_size, padding)
    ),
    hf.SequenceBiasLogitsProcessor: _OF_SEQUENCES,
    hf.NoBadWordsLogitsProcessor: _OF_SEQUENCES,
    hf.MinLengthLogitsProcessor: _forbids(lambda p: -INF, lambda p: p.min_length, lambda p: p.eos_token_id),
    hf.MinNewTokensLengthLogitsProcessor: _forbids(
        lambda p: -INF, lambda p: p.prompt_length_to_skip + p.min_new_tokens, lambda p: p.eos_token_id
    ),
    hf.SuppressTokensAtBeginLogitsProcessor: _forbids(
        lambda p: p.begin_index, lambda p: p.begin_index + 1, lambda p: p.begin_suppress_tokens
    ),
    hf.SuppressTokensLogitsProcessor: _forbids(lambda p: -INF, lambda p: INF, lambda p: p.suppress_tokens),
}


def split_leading(lists: Sequence[Sequence[Callable]], padding: Callable[[int, int], Sequence[int]],
                  vocab_size: int | None) -> tuple[tuple[PrefixProcessor, ...], list[list[float]]]:  # fmt: skip
    """The first processors that all rows share and that are known here, and their numbers in each row.

    padding: `padding(row, i)`, the tokens before the row's text that its i-th processor sees.
    vocab_size: to leave out processors that name other tokens (None: there are none)."""
    found, numbers = list[PrefixProcessor](), list[list[float]]()
    for i, column in enumerate(zip(*lists, strict=False)):
        kind = type(column[0])
        if kind not in KINDS or any(type(processor) is not kind for processor in column):
            break
        how, seen = KINDS[kind], [padding(row, i) for row in range(len(lists))]
        named = [token for tokens in seen for token in tokens]
        named += [token for processor in column for token in how.tokens(processor)]
        read = [how.read(processor, len(tokens)) for processor, tokens in zip(column, seen, strict=True)]
        fronts = [how.front(processor, tokens) for processor, tokens in zip(column, seen, strict=True)]
        known, before = [one for one in read if one is not None], [front for front in fronts if front is not None]
        outside = vocab_size is not None and any(not 0 <= token < vocab_size for token in named)
        alike = {(shape, len(mine)) for shape, mine in known}
        if outside or len(known) + len(before) < 2 * len(column) or len(alike) != 1:
            break
        (shape, count), width = alike.pop(), max(map(len, before))
        found.append(PrefixProcessor(kind, shape, count, width))
        pairs = zip(known, before, strict=True)
        of_rows = [[*mine, *[NONE] * (width - len(front)), *front] for (_, mine), front in pairs]
        numbers += [list(of_row) for of_row in zip(*of_rows, strict=True)]
    return tuple(found), numbers


def apply_leading(processors: Sequence[PrefixProcessor], logits: Tensor, numbers: Tensor, prefixes: Prefixes) -> Tensor:
    """Process `logits [A, n, V]` -> scores in float32 at least; `numbers [P, A]` float64: see `split_leading`."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    scores = logits.to(wide, copy=True, memory_format=torch.contiguous_format)
    rest = iter(numbers.split([size for processor in processors for size in (processor.count, processor.front)]))
    for i, processor in enumerate(processors):
        own, front = next(rest), as_tokens(next(rest), scores.shape[2])
        KINDS[processor.kind].apply(processor, scores, own, prefixes.behind(front), None if i else logits)
    return scores
