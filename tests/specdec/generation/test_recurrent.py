"""Targets with recurrent states: greedy text equals transformers', and states follow the text through every round."""

import re
from functools import partial

import pytest
import torch
from transformers import DynamicCache

import attention.hf.mixers as mixers
import medusa
import specdec
import specdec.rounds.flight as flight
import specdec.rounds.round as rounds
from attention.kv.recurrent import RecurrentStates
from scripts.generate_bench.peers import cache_argument
from specdec import Draft, DrafterTraits, TokenTree
from specdec.drafters.base import StatelessSession
from tests.families import RECURRENT, VOCAB, build, noisy_copy, ragged_prompts
from tests.matrix import random_heads, require_free

TREE = TokenTree((None, 0, 0, 0, 1, 1, 2, 3, 4, 4, 5, 8, 9))  # 13 nodes
MIXERS = (
    "qwen3_next",
    "kimi_linear",
    "bamba",
    "jamba",
    "lfm2",
    "mamba2",
)  # one of each kind, and one without attention


@torch.no_grad()
def own_logits(model, text):
    """The model's logits after the last token of `text [L]`: of one forward, and token by token over its own cache."""
    cache = DynamicCache(config=model.config)
    for token in text:
        stepwise = model(token.view(1, 1), use_cache=True, **{cache_argument(model): cache}).logits[0, -1]
    return model(text[None], use_cache=False).logits[0, -1], stepwise


def assert_greedy(model, ours, expected):
    """Equal texts, up to a token whose logits differ by no more than the model's own two forms do."""
    if ours.equal(expected):
        return
    for mine, its in zip(ours, expected, strict=True):
        differs = (mine != its).nonzero()
        if len(differs):
            place = int(differs[0])
            chunked, stepwise = own_logits(model, its[:place][its[:place] != 1])
            gap = chunked[its[place]] - chunked[mine[place]]
            assert gap.abs() <= 2 * (chunked - stepwise).abs().max(), f"token {place} is no near-tie: {gap}"


DRAFTERS = {
    "none": lambda model, draft: None,
    "chain": lambda model, draft: specdec.ModelDrafter(draft, 4),
    "tree": lambda model, draft: specdec.ModelDrafter(draft, tree=TREE),
    "Medusa heads": lambda model, draft: medusa.MedusaDrafter(random_heads(model), TREE),
    "prompt lookup": lambda model, draft: specdec.PromptLookupDrafter(5, 2),
    "early exit": lambda model, draft: specdec.EarlyExitDrafter(model, 1, num_tokens=3),
}


@pytest.mark.parametrize("family", RECURRENT)
def test_greedy_equals_transformers(family):
    """Chains, trees of 13, heads and lookup, for ragged batches of three."""
    target, draft = specdec.ModelRunner(build(family), page_size=8), noisy_copy(family)
    ids, mask = ragged_prompts(3)
    expected = target.model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=14)
    rates = {}
    for name, make in DRAFTERS.items():
        generator = specdec.SpeculativeGenerator(target, make(target.model, draft))
        out = generator.generate(ids, mask, max_new_tokens=14)
        assert_greedy(target.model, out.sequences, expected)
        rates[name] = out.stats.pooled.acceptance_rate
        require_free(generator)
    assert rates["chain"] > 0 and rates["tree"] > 0, "the draft must be right sometimes for this to mean something"


class Scripted:
    """Proposes in round i of row r the next `script[i]` tokens of `texts[r]`; None: nothing, -n: n wrong ones."""

    def __init__(self, texts, script):
        self.texts, self.script, self.traits = texts, script, DrafterTraits(4, "chain")

    def validate(self, target):
        pass

    def start(self, rows, max_tokens):
        self.round = 0
        return StatelessSession(self.propose)

    def propose(self, batch, tree=None):
        count = self.script[self.round % len(self.script)]
        self.round += 1
        if count is None:
            return Draft(TokenTree.chain(0), batch.last_tokens())
        coming = [self.texts[row.number][row.length :][: abs(count)] for row in batch.members]
        drafted = torch.stack([torch.nn.functional.pad(text, (0, abs(count) - len(text)), value=3) for text in coming])
        drafted = drafted if count > 0 else (drafted + 5) % VOCAB
        return Draft(TokenTree.chain(abs(count)), torch.cat([batch.last_tokens(), drafted], 1))


def states_of(cache, sequence, length=None):
    """All states of `sequence` after its first `length` tokens (None: all)."""
    twin = cache.fork(sequence)
    cache.commit([twin], [cache.length(twin) if length is None else length], [[]])
    cell = cache.states.checkpoint(twin).cell
    found = [pool.states[:, cell].clone() for pool in cache.states.pools]
    cache.free(twin)
    return found


def watch_states(monkeypatch, checked, module=rounds):
    """After every round compare the states of each row with those of its text from scratch; note its length.

    module: that of the rounds that are watched, on the host or captured."""
    end_round = module.end_round

    def compare(call, rows, *args):
        target, cache = call.rows.target, call.rows.target.cache
        for row in rows:
            length = cache.length(row.sequence)
            if module is flight and row.ended:  # the device may have gone on past its end
                continue
            assert row.ended or length == row.length - 1 or module is flight
            length = row.length - 1 if module is flight else length
            fresh = cache.add()
            target.extend([fresh], [call.rows.tokens[row.slot, :length].clone()])
            for ours, expected in zip(states_of(cache, row.sequence, length), states_of(cache, fresh), strict=True):
                scale = 1 + expected.abs().max()
                assert (ours - expected).abs().max() <= 1e-4 * scale, f"another state after {length} tokens"
            cache.free(fresh)
            checked.append(length)
        end_round(call, rows, *args)

    monkeypatch.setattr(module, "end_round", compare)


def run_scripted(family, script, count=17):
    """Decode two prompts with a scripted drafter -> the texts, and the model's own."""
    model = build(family)
    prompts = [torch.arange(5, 5 + n) % VOCAB for n in (7, 18)]
    texts = [
        model.generate(p[None], do_sample=False, max_new_tokens=count, min_new_tokens=count, eos_token_id=None)[0]
        for p in prompts
    ]
    ids, mask = torch.ones(2, 18, dtype=torch.int64), torch.zeros(2, 18, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, -len(prompt) :], mask[row, -len(prompt) :] = prompt, 1
    runner = specdec.ModelRunner(model, page_size=4, num_pages=64)
    generator = specdec.SpeculativeGenerator(runner, Scripted(texts, script))
    out = generator.generate(ids, mask, max_new_tokens=count, eos_token_id=[])
    require_free(generator)
    return out, [text[-count:] for text in texts]


GAPS = (3, None, 2, None), (4, -3, -1, 2), (3, 3, 3, 3)  # the last one ends rounds on borders of pages


@pytest.mark.parametrize("family", MIXERS)
def test_states_follow_the_text(family, monkeypatch):
    """Rounds without a draft between rounds with one, wholly rejected ones, and ends on page borders."""
    checked = []
    watch_states(monkeypatch, checked)
    for script in GAPS:
        out, texts = run_scripted(family, script)
        assert all(row[-17:].equal(text) for row, text in zip(out.sequences, texts, strict=True))
        assert out.stats.pooled.acceptance_rate > 0
    assert any(length % 4 == 0 for length in checked) and any(length % 4 == 1 for length in checked)


@pytest.mark.parametrize("family", ["qwen3_next", "lfm2"])
def test_a_state_that_is_not_rolled_back_is_caught(family, monkeypatch):
    """A planted bug: the state goes on over rejected tokens too."""
    commit = RecurrentStates.commit

    def keeps_all(self, sequences, starts, paths):
        commit(self, sequences, starts, [[*path, len(path)] if len(path) > 1 else path for path in paths])
        for sequence in sequences:
            self.checkpoint(sequence).tokens -= len(paths[sequences.index(sequence)]) > 1

    monkeypatch.setattr(RecurrentStates, "commit", keeps_all)
    watch_states(monkeypatch, [])
    with pytest.raises(AssertionError, match="another state"):
        run_scripted(family, (3, -3))


@pytest.mark.parametrize("family", MIXERS)
def test_a_round_runs_new_tokens_alone(family, monkeypatch):
    """Prompts once, then a root and a draft for each row: nothing of the text before runs again."""
    ran, run = [], mixers.run_recurrent

    def counted(batch, layer, inputs, *rest):
        if layer == 0:
            ran.append(len(inputs[0]))
        return run(batch, layer, inputs, *rest)

    monkeypatch.setattr(mixers, "run_recurrent", counted)
    target = specdec.ModelRunner(build(family), mode="eager")
    generator = specdec.SpeculativeGenerator(target, specdec.PromptLookupDrafter(3, 1))
    ran.clear()
    ids, mask = ragged_prompts(3)
    out = generator.generate(ids, mask, max_new_tokens=9, eos_token_id=[])
    rounds_of = [len(row.emitted) for row in out.stats.rows]
    active = [sum(count > i for count in rounds_of) for i in range(max(rounds_of))]
    assert ran[0] == int(mask.sum()) + 3 * 3
    timed = 3  # tokens of the plain steps that are timed after the first round
    assert [count for count in ran[1:] if count != timed] == [4 * count for count in active[1:]]


def test_long_prompts_come_in_chunks(monkeypatch):
    """Chunks of a prompt go into the state as they come."""
    monkeypatch.setattr(specdec.ModelRunner, "PREFILL_CHUNK", 32)
    model, draft = build("qwen3_next"), specdec.ModelDrafter(noisy_copy("qwen3_next"), 3)
    ids, mask = ragged_prompts(3, longest=120)
    expected = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=10)
    assert_greedy(model, specdec.SpeculativeGenerator(model, draft).generate(ids, mask, max_new_tokens=10).sequences,
                  expected)  # fmt: skip


class OnThePath:
    """Proposes TREE, of which one path, another one in each round, goes on with `texts` up to some depth.

    A function of tensors, so that its rounds can be captured. texts: `[B, L]`."""

    def __init__(self, texts):
        self.texts, self.traits = texts, DrafterTraits(TREE.size - 1, "tree", captured=True, tree=TREE)
        leaves = [node for node in range(TREE.size) if node not in TREE.above]
        on_path = [[n in (0, *TREE.path(leaf)) for n in range(TREE.size)] for leaf in leaves]
        self.on_path, self.depths = (torch.tensor(x, device=texts.device) for x in (on_path, TREE.depths))

    def validate(self, target):
        pass

    def start(self, rows, max_tokens):
        return StatelessSession(self.propose)

    def propose(self, batch, tree=None):
        lengths = batch.text()[1]  # [A, 1]
        numbers = torch.arange(batch.size, device=self.texts.device) if batch.index is None else batch.index
        at = (lengths - 1 + self.depths).clamp(max=self.texts.shape[1] - 1)
        coming = self.texts[numbers[:, None] % len(self.texts), at]
        right = self.on_path[lengths[:, 0] % len(self.on_path)] & (self.depths <= lengths % 5)
        return Draft(TREE, torch.where(right | (self.depths == 0), coming, (coming + 5) % VOCAB))


def texts_of(model, prompts, count):
    """The model's own texts `[B, L]`, prompts and all, padded at the end."""
    texts = [
        model.generate(p[None], do_sample=False, max_new_tokens=count, min_new_tokens=count, eos_token_id=None)[0]
        for p in prompts
    ]
    longest = max(map(len, texts))
    return torch.stack([torch.nn.functional.pad(text, (0, longest - len(text))) for text in texts])


def run_captured(family, count=24):
    """Decode prompts of different lengths in captured rounds, of trees and others -> texts, and the model's own."""
    model = build(family)
    prompts = [torch.arange(5, 5 + n) % VOCAB for n in (7, 18, 11)]
    texts = texts_of(model, prompts, count)
    ids, mask = torch.ones(3, 18, dtype=torch.int64), torch.zeros(3, 18, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, -len(prompt) :], mask[row, -len(prompt) :] = prompt, 1
    runner = specdec.ModelRunner(model, page_size=4, mode="graph")
    runner.allocate(96, cells=8)  # beside rounds in flight no state may get another address
    generator = specdec.SpeculativeGenerator(runner, OnThePath(texts))
    out = generator.generate(ids, mask, max_new_tokens=count, eos_token_id=[])
    require_free(generator)
    return out, [text[len(prompt) :][:count] for text, prompt in zip(texts, prompts, strict=True)]


@pytest.mark.parametrize("family", MIXERS)
def test_captured_rounds_take_the_states_along_paths_of_trees(family, monkeypatch):
    """After every captured round the states are those of the text from scratch; rows go on when others have ended."""
    checked = []
    watch_states(monkeypatch, checked, flight)
    out, texts = run_captured(family)
    assert out.stats.host is None and len(checked) > 12
    assert all(row[-24:].equal(text) for row, text in zip(out.sequences, texts, strict=True))
    assert out.stats.pooled.acceptance_rate > 0.05


def test_a_captured_round_that_replays_another_path_is_caught(monkeypatch):
    """A planted bug: the replay begins with the first accepted node, without the root."""
    replay = RecurrentStates.replay
    wrong = lambda self, cells, places, counts: replay(self, cells, places.roll(-1, 1), counts)
    monkeypatch.setattr(RecurrentStates, "replay", wrong)
    watch_states(monkeypatch, [], flight)
    with pytest.raises(AssertionError, match="another state"):
        run_captured("qwen3_next")


def test_where_rounds_cannot_be_captured_they_run_eagerly_and_say_so():
    generator = specdec.SpeculativeGenerator(build("llama"), specdec.ModelDrafter(build("lfm2"), 2))
    ids, mask = ragged_prompts(2)
    out = generator.generate(ids, mask, max_new_tokens=6)
    assert "a draft model keeps recurrent states" in out.stats.host
    assert out.sequences.equal(
        generator.target.model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=6)
    )


def test_a_seed_repeats_a_sampled_text():
    generator = specdec.SpeculativeGenerator(build("qwen3_next"), specdec.ModelDrafter(noisy_copy("qwen3_next"), 3))
    ids, mask = ragged_prompts(3)
    draw = partial(generator.generate, ids, mask, max_new_tokens=12, do_sample=True)
    first = draw(seed=3).sequences
    assert draw(seed=3).sequences.equal(first) and not draw(seed=4).sequences.equal(first)


def test_a_layer_layout_names_its_rules():
    """What a refusal says when a release brings a kind of layer that has no rule."""
    kinds = {layer.kind for family in MIXERS for layer in specdec.ModelRunner(build(family)).adapter.layout.recurrent}
    assert kinds == {"convolution", "delta rule", "state space", "selective scan"}
    assert not any(re.search("[^a-z ]", kind) for kind in kinds)
