"""Acceptance rules. Rejection sampling is integrated exactly over its random numbers: the output must be the target's
own, to rounding.
"""

from dataclasses import dataclass, replace
from functools import partial
from math import lcm

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper

from specdec.acceptance import Acceptance, greedy, rejection
from specdec.sampling.draws import draw, residual
from specdec.sampling.noise import Stream, round_noise
from specdec.sampling.processors import Processors
from specdec.trees.draft import Draft
from specdec.trees.tree import TokenTree

CPU = torch.device("cpu")
LAST = 1 - 2**-53  # the largest number that noise can yield


# greedy


def draft_with_distinct_siblings(tree, batch, vocabulary, generator):
    tokens = torch.randint(vocabulary, (batch, tree.size), generator=generator)
    for parent in set(tree.parents[1:]):
        children = [node for node in range(1, tree.size) if tree.parents[node] == parent]
        for row in range(batch):
            tokens[row, children] = torch.randperm(vocabulary, generator=generator)[: len(children)]
    return Draft(tree, tokens)


def walk(parents, tokens, best):
    """Nodes passed on the way down while some child holds the best token."""
    nodes = [0]
    while child := next(
        (n for n in range(1, len(parents)) if parents[n] == nodes[-1] and tokens[n] == best[nodes[-1]]), None
    ):
        nodes.append(child)
    return nodes


@st.composite
def trees(draw, most_children=3):
    parents = [None]
    for node in range(1, draw(st.integers(1, 14))):
        parents.append(draw(st.sampled_from([n for n in range(node) if parents.count(n) < most_children])))
    return TokenTree(tuple(parents))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.one_of(trees(), st.integers(0, 5).map(TokenTree.chain)), st.integers(0, 2**20))
def test_greedy_walks_down_the_tree_along_the_targets_best_tokens(tree, seed):
    generator = torch.Generator().manual_seed(seed)
    batch, vocabulary = 4, 3
    draft = draft_with_distinct_siblings(tree, batch, vocabulary, generator)
    scores = torch.randn(batch, tree.size, vocabulary, generator=generator)
    verdict = greedy(draft, scores)
    emitted, best = verdict.emitted(draft).tolist(), scores.argmax(-1).tolist()
    assert verdict.path.shape == (batch, max(tree.depths))
    for row in range(batch):
        tokens = draft.tokens[row].tolist()
        nodes = walk(tree.parents, tokens, best[row])
        count = len(nodes) - 1
        assert verdict.counts[row] == count
        assert verdict.path[row].tolist() == nodes[1:] + [0] * (max(tree.depths) - count)
        assert verdict.next_tokens[row] == best[row][nodes[-1]]
        assert emitted[row][: count + 1] == [*(tokens[n] for n in nodes[1:]), best[row][nodes[-1]]]


def test_greedy_takes_all_or_nothing_of_a_right_or_wrong_chain():
    scores = torch.eye(4)[[1, 2, 3]].expand(2, 3, 4)
    draft = Draft(
        TokenTree.chain(2), torch.tensor([[0, 1, 2], [0, 3, 2]])
    )  # row 1: wrong first, a right token behind it is lost
    verdict = greedy(draft, scores)
    assert (
        verdict.counts.tolist() == [2, 0]
        and verdict.path.tolist() == [[1, 2], [0, 0]]
        and verdict.next_tokens.tolist() == [3, 1]
    )
    assert verdict.emitted(draft)[0].tolist() == [1, 2, 3] and verdict.emitted(draft)[1, 0] == 1


def test_emitted_follows_the_path_through_a_tree():
    draft = Draft(TokenTree((None, 0, 0, 2, 3)), torch.tensor([[9, 11, 12, 13, 14]] * 3))
    verdict = Acceptance(
        torch.tensor([3, 1, 0]), torch.tensor([[2, 3, 4], [1, 0, 0], [0, 0, 0]]), torch.tensor([50, 51, 52])
    )
    emitted = verdict.emitted(draft).tolist()
    assert [row[: n + 1] for row, n in zip(emitted, [3, 1, 0], strict=True)] == [[12, 13, 14, 50], [11, 51], [52]]


# rejection: p[d], q[d] are tables [V ** d, V] of the next token's distribution after each history of d tokens, so
# everything depends on the prefix


@dataclass(frozen=True)
class Chosen:
    """Stands in for the noise of a round: the numbers are those that the test chose."""

    draft: Tensor
    accept: Tensor
    next: Tensor

    def uniform(self, stream, count):
        return {Stream.DRAFT: self.draft, Stream.ACCEPT: self.accept, Stream.NEXT: self.next}[stream][:, :count]

    def along(self, count):
        return torch.cat([self.next[:, :1], self.accept[:, 1:count]], 1)


def after(tables, tokens):
    """`[B, V]`: the distribution after each row of `tokens [B, d]`."""
    history = torch.zeros(len(tokens), dtype=torch.int64)
    for column in tokens.unbind(1):
        history = history * tables[0].shape[1] + column
    return tables[tokens.shape[1]][history]


def draw_draft(q, noise, length):
    """Draft as a model does: one token after the other, each with its own number of the draft stream."""
    uniform = noise.uniform(Stream.DRAFT, length)
    tokens, probs = torch.zeros(len(uniform), 1, dtype=torch.int64), []
    for step in range(length):
        probs.append(after(q, tokens[:, 1:]))
        tokens = torch.cat([tokens, draw(probs[-1], uniform[:, step])[:, None]], 1)
    return Draft(TokenTree.chain(length), tokens, torch.stack(probs, 1))


def draw_nothing(q, noise, length):
    """A deterministic drafter: q gives one token all the probability, and the draft carries no distribution."""
    return replace(draw_draft(q, noise, length), probs=None)


def certain(q):
    return [torch.nn.functional.one_hot(table.argmax(-1), table.shape[1]).double() for table in q]


def target_scores(p, draft):
    return torch.stack([after(p, draft.tokens[:, 1:n]) for n in range(1, draft.tree.size + 1)], 1).log()


def sequences(p):
    """The target's own distribution over sequences of `len(p)` tokens."""
    mass = torch.ones(1, dtype=torch.float64)
    for table in p:
        mass = (mass[:, None] * table).flatten()
    return mass


def outputs(p, emitted, lengths, weights):
    """The distribution over sequences of `len(p)` tokens when `emitted[b, : lengths[b]]` has weight b and the rest is
    drawn from p.
    """
    mass = torch.zeros(1, dtype=torch.float64)
    for n, table in enumerate(p, 1):
        here, history = lengths == n, torch.zeros(len(emitted), dtype=torch.int64)
        for column in emitted[:, :n].unbind(1):
            history = history * table.shape[1] + column
        mass = (mass[:, None] * table).flatten()  # those that stopped before go on with the target
        mass = mass + torch.bincount(history[here], weights[here], minlength=len(mass))
    return mass


def total_variation(rule, draw_draft, p, q, cells):
    """Total variation between the target and what `rule` makes of drafts from q, integrated over all random numbers.

    Outcomes are piecewise constant in the uniforms. With steps only at multiples of 1 / cells (one number each for the
    draft, accept and next streams) the midpoints of all cells integrate them exactly. Steps that a bug moves by less
    than half a cell escape; `total_variation_of_thresholds` sees those."""
    length = len(p) - 1
    sizes = [cells[0]] * length + [cells[1]] * length + [cells[2]]
    grid = torch.cartesian_prod(*((torch.arange(n, dtype=torch.float64) + 0.5) / n for n in sizes)).reshape(
        -1, len(sizes)
    )
    noise = Chosen(grid[:, :length], grid[:, length : 2 * length], grid[:, 2 * length :])
    draft = draw_draft(q, noise, length)
    verdict = rule(draft, target_scores(p, draft), noise)
    out = outputs(
        p, verdict.emitted(draft), verdict.counts + 1, torch.full((len(grid),), 1 / len(grid), dtype=torch.float64)
    )
    assert abs(out.sum() - 1) < 1e-12
    return (out - sequences(p)).abs().sum().item() / 2


def tables(depths, vocabulary, unit, support, generator):
    """Per depth, random distributions in multiples of 1 / unit: over all tokens, none left out ("full"), over any
    tokens ("any"), or over a list of them.
    """
    tokens = list(range(vocabulary)) if isinstance(support, str) else support
    made = []
    for depth in range(depths):
        counts = torch.full((vocabulary**depth, vocabulary), float(support == "full"), dtype=torch.float64)
        picks = torch.tensor(tokens)[
            torch.randint(len(tokens), (len(counts), unit - int(counts[0].sum())), generator=generator)
        ]
        made.append(counts.scatter_add_(1, picks, torch.ones(picks.shape, dtype=torch.float64)) / unit)
    return made


def problem(kind, vocabulary, length, unit, seed):
    """Tables p and q of one kind."""
    make = partial(tables, vocabulary=vocabulary, unit=unit, generator=torch.Generator().manual_seed(seed))
    low, high = list(range(vocabulary // 2)), list(range(vocabulary // 2, vocabulary))
    support_p, support_q = {
        "full": ("full", "full"),
        "q has gaps": ("any", low),
        "p has gaps": (high, "any"),
        "both have gaps": ("any", "any"),
        "nothing in common": (high, low),
        "equal": ("any", "any"),
    }[kind]
    p = make(length + 1, support=support_p)
    return p, p[:length] if kind == "equal" else make(length, support=support_q)


def cells_of(p, q, unit):
    """Cells per uniform number of each stream such that every step of the right rule falls on a border, for p and q in
    multiples of 1 / unit.
    """

    def denominators(part, whole):
        whole = torch.as_tensor(whole).clamp(min=1).expand_as(part)
        return lcm(*(whole // torch.gcd(part, whole)).unique().tolist())

    p, q = ([(table * unit).round().long() for table in tables] for tables in (p, q))
    rest = [(x - y).clamp(min=0) for x, y in zip(p, q, strict=False)]
    draft = lcm(*(denominators(y.cumsum(1), unit) for y in q))
    accept = lcm(*(denominators(torch.minimum(x, y), y) for x, y in zip(p, q, strict=False)))
    following = lcm(
        *(denominators(x.cumsum(1), unit) for x in p),
        *(denominators(r.cumsum(1), r.sum(1, keepdim=True)) for r in rest),
    )
    return draft, accept, following


KINDS = ["full", "q has gaps", "p has gaps", "both have gaps", "nothing in common", "equal"]
SIZES = [(3, 1, 6), (4, 1, 6), (3, 2, 4), (4, 2, 4), (3, 3, 3), (4, 3, 3)]  # vocabulary, draft length, unit
DRAFTS = {"drawn": (draw_draft, lambda q: q), "deterministic": (draw_nothing, certain)}


@pytest.mark.parametrize("drafts", DRAFTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("vocabulary", "length", "unit"), SIZES)
def test_output_has_exactly_the_targets_distribution(drafts, kind, vocabulary, length, unit):
    propose, form = DRAFTS[drafts]
    if kind == "full":
        unit = max(unit, vocabulary + 1)  # something to spread beyond one unit for each token
    for seed in range(3):
        p, q = problem(kind, vocabulary, length, unit, seed)
        assert total_variation(rejection, propose, p, form(q), cells_of(p, form(q), unit)) < 1e-12


@pytest.mark.parametrize(("which", "length"), [("both", 1), ("both", 2), ("target only", 1), ("draft only", 1)])
def test_output_is_exact_after_temperature_and_top_k_of_transformers(which, length):
    generator = torch.Generator().manual_seed(4)
    processors = Processors([LogitsProcessorList([TemperatureLogitsWarper(0.5), TopKLogitsWarper(2)])])

    def shuffled(depths, processed):
        """Permutations of 4 : 2 : 1 : 1, which top-k turns into 2 : 1."""
        weights = [
            torch.tensor([4.0, 2.0, 1.0, 1.0], dtype=torch.float64)[torch.rand(4**d, 4, generator=generator).argsort(1)]
            for d in range(depths)
        ]
        scores = [processors(w.log() / 2, [0] * len(w)) if processed else w.log() for w in weights]
        return [s.softmax(-1) for s in scores]

    p, q = shuffled(length + 1, which != "draft only"), shuffled(length, which != "target only")
    assert [(table[-1] > 0).sum().item() for table in (p[0], q[0])] == [
        2 if which in ("both", side) else 4 for side in ("target only", "draft only")
    ]
    assert total_variation(rejection, draw_draft, p, q, cells_of(p, q, 24)) < 1e-12


def dirichlet(rows, vocabulary, concentration, generator):
    gammas = (
        torch._standard_gamma(torch.full((rows, vocabulary), concentration, dtype=torch.float64), generator=generator)
        + 1e-9
    )
    return gammas / gammas.sum(-1, keepdim=True)


def bisect(holds, rows):
    """Per row, the share of the unit interval on which `holds(u [rows])`, true below some threshold and false above
    it.
    """
    low, high = torch.zeros(rows, dtype=torch.float64), torch.ones(rows, dtype=torch.float64)
    for _ in range(53):
        middle = (low + high) / 2
        true = holds(middle)
        low, high = torch.where(true, middle, low), torch.where(true, high, middle)
    return (low + high) / 2


def total_variation_of_thresholds(rule, p, q, deterministic=False, dtype=torch.float64):
    """As `total_variation` for any real p and q: the rule is a black box whose probabilities are found as thresholds on
    its random numbers.

    q and the target's scores are given to it in `dtype`.
    """
    length, vocabulary = len(q), p[0].shape[1]
    tokens = torch.cartesian_prod(*[torch.arange(vocabulary)] * length).reshape(-1, length)  # every draft there is
    rows, borders = len(tokens), vocabulary - 1
    many = tokens.repeat_interleave(borders, 0)  # one copy for each border between two next tokens
    border = torch.arange(borders).repeat(rows)
    probs = torch.stack([after(q, many[:, :n]) for n in range(length)], 1).to(dtype)
    draft = Draft(TokenTree.chain(length), torch.nn.functional.pad(many, (1, 0)), None if deterministic else probs)
    scores, drawn_from = target_scores(p, draft).to(dtype), probs.double() / probs.double().sum(-1, keepdim=True)

    def verify(at, accept, following):
        """The verdict with the given numbers for position `at` and for the next token, when all positions before are
        accepted (u = 0).
        """
        uniform = torch.zeros(len(many), length + 1, dtype=torch.float64)
        uniform[:, at] = accept
        return rule(draft, scores, Chosen(None, uniform[:, :length], following[:, None]))

    def share(at, token):
        """The share of the next token's numbers for which it lies at or below the border, after a rejection at `at`."""
        return bisect(lambda u: verify(at, LAST, u).next_tokens <= token, len(many)).reshape(rows, borders)

    lines, lengths, weights = [], [], []
    reached = drawn_from[::borders].gather(2, tokens[..., None])[..., 0].prod(1)  # the draft's own probability
    for at in range(length + 1):
        accepted = torch.zeros(rows, dtype=torch.float64)
        if at < length:
            accepted = bisect(lambda u: verify(at, u, u).counts > at, len(many))[::borders]  # noqa: B023 - called within the iteration
        following = torch.nn.functional.pad(share(at, border), (1, 1), value=0.0)
        following[:, -1] = 1
        for token in range(vocabulary):
            lines.append(torch.nn.functional.pad(tokens[:, :at], (0, length + 1 - at), value=token))
            lengths.append(torch.full((rows,), at + 1))
            weights.append(reached * (1 - accepted) * (following[:, token + 1] - following[:, token]))
        reached = reached * accepted
    out = outputs(p, torch.cat(lines), torch.cat(lengths), torch.cat(weights))
    return (out - sequences(p)).abs().sum().item() / 2


def real_problem(vocabulary, length, concentration):
    generator = torch.Generator().manual_seed(vocabulary * 10 + length)
    p = [dirichlet(vocabulary**d, vocabulary, concentration, generator) for d in range(length + 1)]
    return p, [dirichlet(vocabulary**d, vocabulary, concentration, generator) for d in range(length)]


@pytest.mark.covering
@pytest.mark.parametrize(("vocabulary", "length"), [(2, 1), (5, 1), (3, 2), (5, 2), (4, 3), (5, 3)])
@pytest.mark.parametrize("concentration", [0.3, 3.0])
def test_output_is_exact_for_any_real_distributions(vocabulary, length, concentration):
    p, q = real_problem(vocabulary, length, concentration)
    assert total_variation_of_thresholds(rejection, p, q) < 1e-12
    assert total_variation_of_thresholds(rejection, p, certain(q), deterministic=True) < 1e-12


# float32, and drafts or targets so sure that float32 has few digits left for the rest, or none

SURE = [
    (0.0, 20.0, 40.0, 60.0),
    (0.0, 86.0, 87.0, 88.5),
    (0.0, 90.0, 90.5, 91.0),
    (0.0, 95.0, 95.3, 95.6),
    (0.0, 103.0, 103.2, 103.3),
    (0.0, 0.5, 100.0, 100.5),
    (0.0, 60.0, 101.0, 200.0),
    (0.0, 200.0, 200.0, 200.0),
    (0.0, 88.0, float("inf"), float("inf")),
]


def sure_tables(depths, gaps, seed):
    """Distributions whose logits lie `gaps` below the largest, in another order after each history: what a float32
    softmax makes of them.
    """
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.rand(len(gaps) ** depth, len(gaps), generator=generator).argsort(1) for depth in range(depths)]
    made = [(-torch.tensor(gaps)[order]).softmax(-1).double() for order in orders]
    return [table / table.sum(-1, keepdim=True) for table in made]


def unsure_tables(depths, vocabulary, seed):
    """Distributions that leave out the last token after the first history and are far from sure elsewhere."""
    made = [dirichlet(vocabulary**d, vocabulary, 3.0, torch.Generator().manual_seed(seed + d)) for d in range(depths)]
    for table in made:
        table[0] = torch.tensor([*range(1, vocabulary), 0], dtype=torch.float64) / sum(range(vocabulary))
    return made


def float32_tolerance(tree):
    """A probability comes out of a softmax right to some units of 2^-24; each node on the way makes two of them and
    their difference.
    """
    return 16 * 2**-24 * tree.size


@pytest.mark.covering
@pytest.mark.parametrize("gaps", SURE, ids=str)
@pytest.mark.parametrize("length", [1, 2])
def test_output_is_exact_in_float32_for_a_draft_or_a_target_that_is_very_sure(length, gaps):
    tolerance = float32_tolerance(TokenTree.chain(length))
    unsure, sure, other = (
        unsure_tables(length + 1, len(gaps), length),
        sure_tables(length + 1, gaps, length),
        sure_tables(length + 1, gaps, length + 1),
    )
    for p, q in ((unsure, sure), (sure, unsure), (sure, other)):
        assert total_variation_of_thresholds(rejection, p, q[:-1], dtype=torch.float32) < tolerance
    assert (
        total_variation_of_thresholds(rejection, sure, certain(unsure)[:-1], deterministic=True, dtype=torch.float32)
        < tolerance
    )


# planted bugs: the checks above must see them


def plain_rule(
    draft,
    scores,
    noise,
    *,
    threshold=lambda p, q: p / q,
    rest=residual,
    bonus=lambda p, q: p,
    seen_q=lambda q: q,
    kept=torch.cumprod,
):
    """Rejection sampling written a second time, with a handle on every step that a bug could be in."""
    length = draft.tree.size - 1
    p, q = scores.softmax(-1), seen_q(draft.probs)
    p_token, q_token = (x.gather(2, draft.tokens[:, 1:, None])[..., 0] for x in (p[:, :-1], q))
    accepted = noise.uniform(Stream.ACCEPT, length) < threshold(p_token, q_token)
    counts = kept(accepted.long(), 1).sum(1)
    choices = torch.stack([*(rest(p[:, n], q[:, n]) for n in range(length)), bonus(p[:, -1], q[:, -1])], 1)
    following = draw(choices[torch.arange(len(p)), counts], noise.uniform(Stream.NEXT, 1)[:, 0])
    return Acceptance(counts, draft.tables.path[0, counts], following)


@dataclass(frozen=True)
class Shared:
    """Noise in which one stream returns another's numbers."""

    noise: object
    stream: Stream
    instead: Stream

    def uniform(self, stream, count):
        return self.noise.uniform(self.instead if stream == self.stream else stream, count)


def sharing(stream, instead):
    return lambda draft, scores, noise: rejection(draft, scores, Shared(noise, stream, instead))


def cooler(q):
    return q**2 / (q**2).sum(-1, keepdim=True)


PLANTED = {
    "accept with probability p": partial(plain_rule, threshold=lambda p, q: p),
    "the residual is p": partial(plain_rule, rest=lambda p, q: p),
    "the residual is |p - q|": partial(plain_rule, rest=lambda p, q: (p - q).abs()),
    "q at another temperature": partial(plain_rule, seen_q=cooler),
    "the bonus token comes from q": partial(plain_rule, bonus=lambda p, q: q),
    "tokens behind a rejected one count": partial(plain_rule, kept=lambda accepted, dim: accepted),
    "p of the position before": lambda draft, scores, noise: rejection(draft, scores.roll(1, 1), noise),
    "p of the position behind": lambda draft, scores, noise: rejection(draft, scores.roll(-1, 1), noise),
    "draft and accept share their noise": sharing(Stream.ACCEPT, Stream.DRAFT),
    "draft and next share their noise": sharing(Stream.NEXT, Stream.DRAFT),
    "accept and next share their noise": sharing(Stream.NEXT, Stream.ACCEPT),
}
TWO_STEPS = {"tokens behind a rejected one count"}  # one drafted token has none behind it
FINE_STEPS = {
    "q at another temperature"
}  # q squared, 9 : 1 : 1 : 1, steps at multiples of 1 / 72: too many cells for two drafted tokens
RULE_ONLY = [name for name, rule in PLANTED.items() if "share" not in name and name not in TWO_STEPS]


def telling_problem(length):
    """Every p a permutation of 1 : 2 : 3 : 0 and every q of 3 : 1 : 1 : 1, so that all steps of rule and bugs are
    multiples of 1 / 6.
    """
    generator = torch.Generator().manual_seed(0)
    p, q = (
        [
            torch.tensor(weights, dtype=torch.float64)[torch.rand(4**d, 4, generator=generator).argsort(1)] / 6
            for d in range(depths)
        ]
        for weights, depths in (((1, 2, 3, 0), length + 1), ((3, 1, 1, 1), length))
    )
    p[0], q[0] = torch.tensor([[1, 2, 3, 0]]).double() / 6, torch.tensor([[3, 1, 1, 1]]).double() / 6
    return p, q


@pytest.mark.parametrize("length", [1, 2])
def test_the_second_writing_of_the_rule_is_right_without_a_bug(length):
    assert total_variation(plain_rule, draw_draft, *telling_problem(length), (6, 6, 6)) < 1e-12
    assert total_variation_of_thresholds(plain_rule, *real_problem(3, length, 1.0)) < 1e-12


@pytest.mark.parametrize(
    ("bug", "length"), [(b, n) for b in PLANTED for n in (1, 2) if b not in (TWO_STEPS if n == 1 else FINE_STEPS)]
)
def test_enumeration_sees_a_planted_bug(bug, length):
    p, q = telling_problem(length)
    cells = (6, 72, 72) if bug in FINE_STEPS else (6, 6, 6)
    assert total_variation(rejection, draw_draft, p, q, cells) < 1e-12
    assert total_variation(PLANTED[bug], draw_draft, p, q, cells) > 1e-3


@pytest.mark.parametrize("bug", RULE_ONLY)
def test_thresholds_see_a_planted_bug(bug):
    assert total_variation_of_thresholds(PLANTED[bug], *real_problem(4, 2, 1.0)) > 1e-3


@pytest.mark.parametrize("length", [1, 2])
def test_enumeration_sees_a_deterministic_draft_whose_rejected_token_may_come_back(length):
    def wrong(draft, scores, noise):
        token = torch.nn.functional.one_hot(draft.tokens[:, 1:], scores.shape[-1]).double()
        return plain_rule(replace(draft, probs=token), scores, noise, rest=lambda p, q: p)

    p, q = telling_problem(length)
    cells = cells_of(p, certain(q), 6)
    assert total_variation(rejection, draw_nothing, p, certain(q), cells) < 1e-12
    assert total_variation(wrong, draw_nothing, p, certain(q), cells) > 1e-3


@pytest.mark.parametrize("length", [1, 2])
def test_enumeration_sees_a_draft_that_claims_another_distribution_than_its_own(length):
    """The most likely token was taken without a draw, but the draft says that it was drawn from q."""
    p, q = telling_problem(length)

    def claims_q(certain_q, noise, length):
        draft = draw_draft(certain_q, noise, length)
        return replace(draft, probs=torch.stack([after(q, draft.tokens[:, 1:n]) for n in range(1, length + 1)], 1))

    assert total_variation(rejection, claims_q, p, certain(q), (1, 6, 6)) > 1e-3


# rejection with the library's own noise


def chi_square_p_values(rule, rows=100_000, vocabulary=50):
    """p-values of the first emitted token, and of the second given the first where there is one, in float32 with real
    noise.
    """
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(vocabulary**depth, vocabulary, generator=generator) * 0.7 for depth in range(2)]
    p = [x.softmax(-1) for x in logits]
    q = [torch.randn(1, vocabulary, generator=generator).mul(0.7).softmax(-1)]
    noise = round_noise(1, range(rows), [2] * rows, CPU)
    draft = draw_draft(q, noise, 1)
    verdict = rule(draft, target_scores(p, draft), noise)
    first, second = verdict.emitted(draft).unbind(1)
    two = verdict.counts == 1
    seen = torch.bincount(first * vocabulary + second, two.double(), minlength=vocabulary**2).reshape(
        vocabulary, vocabulary
    )
    ones = torch.bincount(first, minlength=vocabulary).double()
    expected = [rows * p[0][0].double(), seen.sum(1, keepdim=True) * p[1].double()]
    statistics = [
        ((got - want) ** 2 / want.clamp(min=1e-9)).sum().item()
        for got, want in zip([ones, seen], expected, strict=True)
    ]
    return chi2.sf(statistics[0], vocabulary - 1), chi2.sf(statistics[1], vocabulary * (vocabulary - 1))


def test_chi_square_accepts_the_rule():
    assert min(chi_square_p_values(rejection)) > 1e-3


@pytest.mark.parametrize("bug", sorted(set(PLANTED) - TWO_STEPS))
def test_chi_square_sees_a_planted_bug(bug):
    assert min(chi_square_p_values(PLANTED[bug])) < 1e-10


# rejection at its edges


def test_residual_is_the_normed_positive_part_of_the_difference_or_p_where_there_is_none():
    p = torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25], [0.0, 0.0, 1.0]])
    q = torch.tensor([[0.25, 0.75, 0.0], [0.5, 0.25, 0.25], [1.0, 0.0, 0.0]])
    assert residual(p, q).tolist() == [[0.5, 0, 0.5], [0.5, 0.25, 0.25], [0, 0, 1.0]]


def random_round(batch=64, length=3, vocabulary=7, seed=6):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(batch, length + 1, vocabulary, generator=generator) * 2
    probs = torch.randn(batch, length, vocabulary, generator=generator).softmax(-1)
    tokens = torch.randint(vocabulary, (batch, length + 1), generator=generator)
    return Draft(TokenTree.chain(length), tokens, probs), scores


def test_an_empty_draft_yields_one_token_drawn_from_the_target():
    draft, scores = random_round(length=0)
    noise = round_noise(0, range(64), [0] * 64, CPU)
    for given_draft in (draft, replace(draft, probs=None)):
        verdict = rejection(given_draft, scores, noise)
        assert verdict.counts.tolist() == [0] * 64 and verdict.path.shape == (64, 0)
        assert torch.equal(verdict.next_tokens, draw(scores[:, 0].softmax(-1), noise.uniform(Stream.NEXT, 1)[:, 0]))
        assert torch.equal(verdict.emitted(given_draft), verdict.next_tokens[:, None])


def test_the_path_lists_the_accepted_nodes_and_zeros():
    draft, scores = random_round()
    verdict = rejection(draft, scores, round_noise(0, range(64), [0] * 64, CPU))
    assert set(verdict.counts.tolist()) == {0, 1, 2, 3}
    assert verdict.path.tolist() == [[n if n <= count else 0 for n in (1, 2, 3)] for count in verdict.counts.tolist()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_draft_model_equal_to_the_target_is_never_rejected(dtype):
    _, scores = random_round()
    scores = scores.to(dtype)
    probs = scores.softmax(-1)[:, :-1]
    tokens = torch.cat([torch.zeros(64, 1, dtype=torch.int64), probs.argmin(-1)], 1)
    noise = Chosen(None, torch.full((64, 3), LAST, dtype=torch.float64), torch.full((64, 1), LAST, dtype=torch.float64))
    assert (rejection(Draft(TokenTree.chain(3), tokens, probs), scores, noise).counts == 3).all()


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("uniform", [0.0, LAST])
def test_a_token_the_target_cannot_say_never_comes_out(deterministic, uniform):
    draft, scores = random_round()
    scores[:, :, [0, 3, 6]] = -torch.inf
    draft.tokens[:, 1:] = torch.tensor([0, 3, 6])
    numbers = torch.full((64, 3), uniform, dtype=torch.float64)
    verdict = rejection(replace(draft, probs=None) if deterministic else draft, scores, Chosen(None, numbers, numbers))
    assert (verdict.counts == 0).all()
    assert not torch.isin(verdict.next_tokens, torch.tensor([0, 3, 6])).any()


def test_rejection_refuses_a_tree_and_names_it():
    draft = Draft(TokenTree((None, 0, 0)), torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"chains.*\(None, 0, 0\)"):
        rejection(draft, torch.zeros(1, 3, 5), round_noise(0, [0], [0], CPU))
