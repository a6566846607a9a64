"""Every drafter and every acceptance rule of the library, each under a name: the matrix of the tests.

A new drafter or rule is added here, once; tests of what holds for all take their lists from here, and
`tests/test_matrix.py` fails while one is missing. What a drafter can do is read from its `traits`."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import medusa
import specdec
from attention.recording import current
from specdec import Draft, TokenTree
from specdec.acceptance import Typical, block, greedy, lossless, rejection, tree_distinct, tree_exact, tree_iid
from specdec.acceptance.base import is_lossless
from specdec.drafters.base import runners_of as inner_runners
from specdec.drafters.block.growth import Growth
from specdec.sampling.draws import draw
from specdec.sampling.noise import RoundNoise, Stream
from specdec.trees.tensors import TreeBatch
from tests.families import build, noisy_copy
from tests.learned import deep_mtp, dflash, dspark, eagle3, mtp, parallel_eagle3

TREE = TokenTree((None, 0, 0, 1, 1, 3, 2, 5))  # of uneven depth, and not ordered by level
WIDE = TokenTree.from_widths((3, 2, 1))


# what the drafters draft with


def model_of(target):
    """The transformers model of a target that may be a `ModelRunner`."""
    return target.model if isinstance(target, specdec.ModelRunner) else target


def random_heads(model, num_heads=4, seed=0, **options):
    """Untrained Medusa heads moved a little, so that they differ from the model and from each other."""
    heads = medusa.MedusaHeads.for_model(model, num_heads, **options)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(
                0.3 * parameter.std() * torch.randn_like(parameter)
                if parameter.std() > 0
                else 0.02 * torch.randn_like(parameter)
            )
    return heads


def words(count):
    """The texts of a vocabulary of `count` tokens, the first of which stands for unknown words."""
    return ["<unk>", *(f"w{i}" for i in range(1, count))]


def word_tokenizer(vocabulary):
    """A tokenizer that splits at spaces; token i is the word `vocabulary[i]`."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=vocabulary[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=vocabulary[0])


def renumbered(model, seed=0):
    """A copy of `model` whose token i is the old token `order[i]` -> (copy, order); token 0 stays."""
    copied, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    order = [0, *(1 + torch.randperm(model.config.vocab_size - 1, generator=generator)).tolist()]
    with torch.no_grad():
        weights = copied.get_input_embeddings().weight, copied.get_output_embeddings().weight
        for weight in {id(weight): weight for weight in weights}.values():  # may be tied
            weight.copy_(weight[order].clone())
    return copied, order


def translated(draft, num_tokens=3):
    """`draft` with its tokens renumbered; it lacks about one word in ten of the target's."""
    renamed, order = renumbered(draft)
    known = words(len(order))
    theirs = [f"x{i}" if i == 1 or i % 10 == 9 else known[old] for i, old in enumerate(order)]
    return specdec.TranslatedDrafter(renamed, word_tokenizer(known), word_tokenizer(theirs), num_tokens)


def sliding(model):
    """Whether a model has sliding windows of its own, which go without sinks."""
    return getattr(model.config, "sliding_window", None) is not None


def remembering(draft):
    """A memory of two answers, which stays as it is."""
    memory, length = specdec.SuffixMemory(max_answers=40), draft.config.vocab_size
    for step in (1, 3):
        memory.add([(5 + step * place) % length for place in range(length)])
    memory.frozen = True
    return memory


def early_exit(target, share, **options):
    layers = model_of(target).config.get_text_config().num_hidden_layers
    return specdec.EarlyExitDrafter(target, max(1, int(layers * share)), **options)


# drafters: make(target, draft) -> a drafter for `target`, a model or a runner; `draft` is a model of its vocabulary

DRAFTERS: dict[str, Callable] = {
    "chain": lambda target, draft: specdec.ModelDrafter(draft, 4),
    "chain with a window": lambda target, draft: specdec.ModelDrafter(
        draft, 3, window=6, sinks=0 if sliding(draft) else 2
    ),
    "confident chain": lambda target, draft: specdec.ModelDrafter(
        draft,
        4,
        confidence=2.5 / draft.config.vocab_size,  # some chains of a random model end early, not all
    ),
    "tree": lambda target, draft: specdec.ModelDrafter(draft, tree=TREE),
    "most likely tree": lambda target, draft: specdec.ModelDrafter(draft, tree=WIDE, sample=False),
    "dynamic tree": lambda target, draft: specdec.DynamicTreeDrafter(draft, 9, depth=4, width=3),
    "prompt lookup": lambda target, draft: specdec.PromptLookupDrafter(5, 3),
    "suffix": lambda target, draft: specdec.SuffixDrafter(5, factor=2.0, min_probability=0.3),
    "suffix tree": lambda target, draft: specdec.SuffixDrafter(7, factor=3.0, tree=True, memory=remembering(draft)),
    "early exit": lambda target, draft: early_exit(target, 0.7, num_tokens=3),
    "early exit, tree": lambda target, draft: early_exit(target, 0.4, tree=TREE),
    "quantised self": lambda target, draft: specdec.QuantisedSelfDrafter(target, 3, bits=8),
    "Medusa heads": lambda target, draft: medusa.MedusaDrafter(random_heads(model_of(target)), TREE),
    "EAGLE-3": lambda target, draft: eagle3(target, tree=TREE),
    "MTP": lambda target, draft: mtp(target, 3),
    "MTP, a module a depth": lambda target, draft: deep_mtp(target, tree=TokenTree.from_widths((2, 2, 1))),
    "P-EAGLE": lambda target, draft: parallel_eagle3(target, tree=TREE),
    "EAGLE-3, dynamic tree": lambda target, draft: eagle3(target, dynamic=(9, 4, 3)),
    "DFlash": lambda target, draft: dflash(target),
    "DSpark": lambda target, draft: dspark(target, tree=TREE),
    "DSpark, best-first tree": lambda target, draft: dspark(target, growth=Growth(9, 3, children=4)),
    "synthetic": lambda target, draft: specdec.SyntheticDrafter(copy.deepcopy(model_of(target)), 0.6, 4),
    "translated": lambda target, draft: translated(draft),
    "merged trees": lambda target, draft: specdec.MergedDrafter(
        specdec.DynamicTreeDrafter(draft, 6, 3, 3), specdec.PromptLookupDrafter(4, 2), 11
    ),
    "merged chains": lambda target, draft: specdec.MergedDrafter(
        specdec.PromptLookupDrafter(4, 2), specdec.ModelDrafter(draft, 3, sample=False)
    ),
    "merged with heads": lambda target, draft: specdec.MergedDrafter(
        medusa.MedusaDrafter(random_heads(model_of(target), 2)), early_exit(target, 0.7, num_tokens=2, sample=False)
    ),
}


@cache
def traits_of(name: str) -> specdec.DrafterTraits:
    """The traits of one of `DRAFTERS`."""
    return DRAFTERS[name](build("llama"), noisy_copy("llama")).traits


def speculative(name: str, family: str = "llama", **options) -> specdec.SpeculativeGenerator:
    """A generator for a new model of `family` with one of `DRAFTERS`."""
    model = build(family)
    return specdec.SpeculativeGenerator(model, DRAFTERS[name](model, noisy_copy(family)), **options)


def runners_of(generator) -> list[specdec.ModelRunner]:
    """The target's runner and those of all draft models, also of drafters inside a drafter."""
    return [generator.target, *inner_runners(generator.drafter)]


def require_free(generator) -> None:
    """Fail unless every cache that a generator has made is empty, as it is between calls."""
    for held in (runner._own.held for runner in runners_of(generator)):
        assert held is None or (held.sequences == () and held.free_pages == held.num_pages)


# acceptance rules, and the kinds of draft that one may have to verify


@dataclass(frozen=True, slots=True)
class Rule:
    """An acceptance rule, and the names of the `DRAFTS` that it verifies; it raises ValueError for all others.

    samples: whether it draws at random, and so goes with `do_sample=True` only (None: it goes with both)."""

    rule: Callable
    takes: frozenset[str]
    samples: bool | None

    @property
    def lossless(self) -> bool:
        """Whether it keeps the target's distribution."""
        return is_lossless(self.rule)


def drawn(tree: TokenTree, q: Tensor, noise: RoundNoise, distinct: bool = False, ends: bool = False) -> Draft:
    """Draw the children of every node from `q [B, V]`; with `ends` rows 0, 3, … have no draft, 1, 4, … one token."""
    uniform, tokens = noise.uniform(Stream.DRAFT, tree.size - 1), torch.zeros(len(q), tree.size, dtype=torch.int64)
    for node in tree.internal:
        rest = q
        for child in tree.children[node]:
            tokens[:, child] = draw(rest, uniform[:, child - 1])
            rest = rest.scatter(1, tokens[:, child, None], 0.0) if distinct else rest
    probs = q[:, None].expand(-1, len(tree.internal), -1)
    valid = torch.arange(tree.size) <= (torch.arange(len(q)) % 3)[:, None] if ends else None
    return Draft(tree, tokens, probs, distinct=distinct, valid=valid)


def chosen(tree: TokenTree, q: Tensor) -> Draft:
    """Choose the most likely tokens of `q [B, V]` as children of every node."""
    best = q.topk(max(map(len, tree.children)) or 1).indices
    ranks = [tree.ranks[node] for node in range(1, tree.size)]
    return Draft(tree, torch.nn.functional.pad(best[:, ranks], (1, 0)))


def chosen_by_row(q: Tensor) -> Draft:
    """Rows with trees of their own, by turns a chain, two siblings, and nothing."""
    parents = torch.tensor([[-1, 0, 1], [-1, 0, 0], [-1, -1, -1]])[torch.arange(len(q)) % 3]
    best = q.topk(2).indices
    return Draft(TreeBatch(parents, 2, 2), torch.nn.functional.pad(best, (1, 0)))


def drawn_by_row(q: Tensor, noise: RoundNoise) -> Draft:
    """Rows with trees of their own: two siblings, the first with a child, in two orders by turns, and nothing."""
    turn = (torch.arange(len(q)) % 3)[:, None]
    parents = torch.tensor([[-1, 0, 0, 1], [-1, 0, 1, 0], [-1, -1, -1, -1]])[turn[:, 0]]
    uniform = noise.uniform(Stream.DRAFT, 3)
    first = draw(q, uniform[:, 0])
    left = q.scatter(1, first[:, None], 0.0)
    others = [draw(torch.where(turn == place, left, q), uniform[:, 1 + place]) for place in (0, 1)]
    tokens = torch.stack([torch.zeros_like(first), first, *others], 1)
    return Draft(TreeBatch(parents, 2, 2), tokens, q[:, None].expand(-1, 2, -1), distinct=True)


CHAIN, FORK = TokenTree.chain(2), TokenTree.from_widths((2, 1))
DRAFTS: dict[str, Callable[[Tensor, RoundNoise], Draft]] = {  # make(q [B, V], noise) -> a draft of B rows
    "nothing": lambda q, noise: Draft(TokenTree.chain(0), torch.zeros(len(q), 1, dtype=torch.int64)),
    "drawn chain": lambda q, noise: drawn(CHAIN, q, noise),
    "drawn chain that may end early": lambda q, noise: drawn(CHAIN, q, noise, ends=True),
    "chosen chain": lambda q, noise: chosen(CHAIN, q),
    "tree drawn independently": lambda q, noise: drawn(FORK, q, noise),
    "tree drawn without replacement": lambda q, noise: drawn(FORK, q, noise, distinct=True),
    "chosen tree": lambda q, noise: chosen(FORK, q),
    "chosen trees of each row": lambda q, noise: chosen_by_row(q),
    "trees of each row drawn without replacement": drawn_by_row,
}
DISTINCT = {"tree drawn without replacement", "trees of each row drawn without replacement"}
DRAWN_CHAINS = {"drawn chain", "drawn chain that may end early"}
CHAINS = frozenset({"nothing", "chosen chain", *DRAWN_CHAINS})  # all that a rule for chains takes
EVERY_DRAFT = frozenset(DRAFTS)

RULES: dict[str, Rule] = {
    "greedy": Rule(greedy, EVERY_DRAFT, samples=False),
    "lossless": Rule(lossless, EVERY_DRAFT, samples=True),
    "rejection": Rule(rejection, CHAINS, samples=True),
    "block": Rule(block, CHAINS, samples=True),
    "tree_iid": Rule(tree_iid, frozenset({"nothing", *DRAWN_CHAINS, "tree drawn independently"}), samples=True),
    "tree_distinct": Rule(tree_distinct, frozenset({"nothing", *DRAWN_CHAINS, *DISTINCT}), samples=True),
    "tree_exact": Rule(
        tree_exact, frozenset({"nothing", "chosen chain", "chosen tree", "chosen trees of each row"}), samples=True
    ),
    "Typical": Rule(Typical(), EVERY_DRAFT, samples=None),
}


def kind_of(draft: Draft) -> str:
    """Which of `DRAFTS` a draft of the loop is like."""
    if isinstance(draft.tree, TreeBatch):
        return "chosen trees of each row" if draft.probs is None else "trees of each row drawn without replacement"
    if draft.tree.size == 1:
        return "nothing"
    if draft.probs is None:
        return "chosen chain" if draft.tree.is_chain else "chosen tree"
    if draft.tree.is_chain:
        return "drawn chain" if draft.valid is None else "drawn chain that may end early"
    return "tree drawn without replacement" if draft.distinct else "tree drawn independently"


def at_each_run(read) -> None:
    """Call `read`, which looks at values; within a recording also in each replay."""
    recorder = current()
    if recorder is None:
        read()
    else:
        recorder.leaf(read)
