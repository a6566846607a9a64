"""Quantised targets and drafts: greedy text is the target's own, samples have its distribution, training leaves it.

Weights in 8 or 4 bits are one function, whatever rows are beside a token, so texts are equal. Activations in 8 bits
amplify a rounding error of 1e-7 to another 8-bit number, so transformers' text may differ, as in 16 bits, at a
near-tie; in mode "compile" a CPU's numbers of a token do not depend on the rows beside it, and texts are equal."""

from dataclasses import replace
from functools import cache

import pytest
import torch
import transformers
from scipy.stats import chisquare
from torch import nn

import specdec
from attention import UnsupportedArchitecture
from attention.native.library import why_unavailable
from medusa import MedusaDrafter, MedusaHeads, TrainingSettings, train_medusa
from specdec.training.data import Rows
from tests.families import VOCAB, ragged_prompts
from tests.matrix import DRAFTERS, require_free
from tests.quantised_models import DYNAMIC, KINDS, draft_of, model_of

MODES = {"eager": ("chain", "Medusa heads"), "graph": ("chain", "dynamic tree"), "compile": ("chain", "prompt lookup")}
NEW = 14
every_kind = pytest.mark.parametrize("kind", KINDS)
shared = cache(model_of)  # a test that changes a model makes its own


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")


def require(mode: str) -> None:
    if mode == "compile" and why_unavailable():
        pytest.skip("mode compile needs a C compiler on a CPU")


@cache
def own_text(kind):
    """What transformers' `generate` gives for three ragged prompts."""
    ids, mask = ragged_prompts(3)
    return shared(kind).generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW)


@torch.no_grad()
def is_near_tie(target, own, out) -> bool:
    """Whether the first token that differs is as likely, up to what the target's logits move by for inputs that move by
    1e-7: activations in 8 bits round to another number then."""
    place = int((own != out).nonzero()[0])
    given = target.get_input_embeddings()(own[None, :place])
    logits = target(inputs_embeds=given).logits[0, -1]
    moves = [(target(inputs_embeds=given * (1 + 1e-7 * n)).logits[0, -1] - logits).abs().max() for n in range(1, 11)]
    return bool(logits.max() - logits[out[place]] <= 2 * max(moves) < 0.2 * logits.std())


def require_own(kind, text, mask) -> None:
    """Fail unless a text is transformers', for activations in 8 bits up to near-ties."""
    for expected, row, real in zip(own_text(kind), text, mask, strict=True):
        first = int((real == 0).sum())
        same = row.equal(expected)
        assert same or (kind in DYNAMIC and is_near_tie(shared(kind), expected[first:], row[first:]))


@pytest.mark.covering
@pytest.mark.parametrize("mode", MODES)
@every_kind
def test_greedy_text_is_the_targets_own(kind, mode):
    require(mode)
    (ids, mask), target = ragged_prompts(3), shared(kind)
    plain = specdec.AutoregressiveGenerator(target, mode=mode)
    assert plain.target.dtype == torch.float32
    expected = plain.generate(ids, attention_mask=mask, max_new_tokens=NEW).sequences
    require_own(kind, expected, mask)
    for name in MODES[mode]:
        generator = specdec.SpeculativeGenerator(plain.target, DRAFTERS[name](target, draft_of()))
        out = generator.generate(ids, mask, max_new_tokens=NEW)
        require_own(kind, out.sequences, mask)
        assert out.sequences.equal(expected) or (kind in DYNAMIC and mode != "compile")
        assert name != "chain" or 0 < out.stats.pooled.acceptance_rate < 1  # of the draft's tokens some are wrong
        require_free(generator)


@pytest.mark.parametrize("pair", [(None, "int4"), ("int4", None), ("int8", "int4"), ("compressed int4", "fp8")])
def test_target_and_draft_may_be_quantised_apart(pair):
    """A draft of the target's own weights in another format: most of its tokens are right, not all."""
    ids, mask = ragged_prompts(3)
    target, draft = map(shared, pair)
    for drafter in (specdec.ModelDrafter(draft, 3), specdec.DynamicTreeDrafter(draft, 9, depth=4, width=3)):
        out = specdec.SpeculativeGenerator(target, drafter).generate(ids, mask, max_new_tokens=NEW)
        assert out.sequences.equal(own_text(pair[0]))
    assert out.stats.pooled.tokens_per_round > 1.2


@every_kind
def test_an_engine_gives_each_request_the_targets_own_text(kind):
    ids, mask = ragged_prompts(3)
    engine = specdec.Engine(shared(kind), specdec.ModelDrafter(draft_of(), 3), tree=None, memory=1 << 22)
    prompts = [row[real == 1].tolist() for row, real in zip(ids, mask, strict=True)]
    handles = [engine.submit(prompt, max_new_tokens=NEW) for prompt in prompts]
    assert len(list(engine.run())) == len(handles)
    end = ids.shape[1]
    for row, handle, expected in zip(ids, handles, own_text(kind), strict=True):
        found = torch.full_like(expected, 1)  # pad tokens behind the end
        found[:end], found[end : end + len(handle.tokens)] = row, torch.tensor(handle.tokens)
        first = int((row == 1).cumprod(0).sum())
        assert found.equal(expected) or (kind in DYNAMIC and is_near_tie(shared(kind), expected[first:], found[first:]))


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_the_output_layer_may_be_quantised_too(kind):
    """Medusa heads start as a copy of its numbers, or use it."""
    target, (ids, mask) = model_of(kind, output_layer=True), ragged_prompts(3)
    assert type(target.lm_head.weight.data) is not torch.Tensor
    expected = target.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW)
    for output in ("own", "shared"):
        drafter = MedusaDrafter(MedusaHeads.for_model(target, 2, output=output))
        out = specdec.SpeculativeGenerator(target, drafter).generate(ids, mask, max_new_tokens=NEW)
        assert out.sequences.equal(expected)


class EightBitEmbedding(nn.Embedding):
    """A table in int8 with a scale for each token."""

    def __init__(self, table: torch.Tensor):
        super().__init__(*table.shape, _weight=torch.zeros_like(table))
        self.scale = nn.Parameter(table.abs().amax(1, keepdim=True) / 127, requires_grad=False)
        self.weight = nn.Parameter((table / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, tokens):
        return self.weight[tokens].float() * self.scale[tokens]


def test_the_cache_has_the_dtype_of_activations_whatever_the_first_weight_has():
    model, ids = draft_of(), torch.tensor([[3, 4, 5]])
    model.model.embed_tokens = EightBitEmbedding(model.model.embed_tokens.weight.detach())
    generator = specdec.AutoregressiveGenerator(model)
    assert next(model.parameters()).dtype == torch.int8 and generator.target.dtype == torch.float32
    expected = model.generate(ids, max_new_tokens=NEW, do_sample=False)
    assert generator.generate(ids, max_new_tokens=NEW).sequences.equal(expected)


@every_kind
def test_explain_tells_of_near_ties_where_activations_have_8_bits(kind):
    for mode in ("eager", "graph"):
        text = specdec.AutoregressiveGenerator(shared(kind), mode=mode).explain()
        assert ("activations in 8 bits" in text and "nearly tie" in text) == (kind in DYNAMIC)


TOP, PROMPT = 3, [5, 17, 40, 8]


@torch.no_grad()
def enumerated(scores, length: int) -> dict[tuple[int, ...], float]:
    """The probability of every continuation of PROMPT with the TOP most likely tokens of `scores(texts) [N, V]`."""
    found = {(): 1.0}
    for _ in range(length):
        texts = list(found)
        best = scores(torch.tensor([[*PROMPT, *text] for text in texts])).double().topk(TOP)
        grown = zip(texts, best.values.softmax(-1).tolist(), best.indices.tolist(), strict=True)
        found = {
            (*text, token): found[text] * p
            for text, probabilities, tokens in grown
            for p, token in zip(probabilities, tokens, strict=True)
        }
    return found


def over_pages(runner, texts: torch.Tensor) -> torch.Tensor:
    """Logits behind `texts [N, L]`, each computed by itself, token by token, as plain decoding does."""
    rows = []
    for text in texts:
        runner.reserve([len(text)])
        sequence = runner.cache.add()
        rows += [[runner.forward([sequence], token[None], [1]).logits for token in text][-1]]
        runner.cache.free(sequence)
    return torch.cat(rows)


@pytest.mark.covering(cases=3)
@every_kind
def test_samples_have_the_targets_distribution(kind):
    """Chi-square of three tokens against their enumeration; over pages if activations have 8 bits (see above)."""
    mode = "compile" if kind in DYNAMIC else "graph"
    require(mode)
    target, length, rows, calls = shared(kind), 3, 600, 2
    runner = specdec.ModelRunner(target, mode=mode)
    scores = lambda texts: over_pages(runner, texts) if kind in DYNAMIC else target(texts).logits[:, -1]
    expected = enumerated(scores, length)
    generator = specdec.SpeculativeGenerator(runner, specdec.ModelDrafter(draft_of(), 2))
    given = torch.tensor([PROMPT]).expand(rows, -1)
    sampling = dict(max_new_tokens=length, do_sample=True, top_k=TOP, temperature=1.0)
    texts = torch.cat([generator.generate(given, seed=seed, **sampling).sequences for seed in range(calls)])
    seen = [tuple(text) for text in texts[:, len(PROMPT) :].tolist()]
    assert set(seen) <= set(expected)
    large = [text for text, p in expected.items() if p * len(seen) >= 5]
    counts = [seen.count(text) for text in large]
    wanted = [expected[text] * len(seen) for text in large]
    if len(seen) - sum(wanted) >= 5:
        counts, wanted = [*counts, len(seen) - sum(counts)], [*wanted, len(seen) - sum(wanted)]
    assert len(large) > 8 and chisquare(counts, [w * sum(counts) / sum(wanted) for w in wanted]).pvalue > 1e-3


@every_kind
def test_medusa_heads_learn_on_a_frozen_quantised_backbone(kind, tmp_path):
    model = model_of(kind)
    heads = MedusaHeads.for_model(model, 2)  # in its forward modules of some formats unpack or rearrange their numbers
    before = [part.clone() for part in parts_of(model)]
    tokens = ((torch.arange(16) * 5 + torch.arange(12)[:, None]) % VOCAB).int()
    settings = replace(TrainingSettings(8, batch=4, rows_at_once=4, log_every=1, save_every=8), lr=1e-2)
    records = train_medusa(
        model, heads, Rows(tokens, tokens, torch.zeros_like(tokens)), tmp_path, settings, progress=False
    )
    assert records[-1]["loss"] < 0.8 * records[0]["loss"]
    after = parts_of(model)
    assert len(before) == len(after) and all(a.equal(b) for a, b in zip(before, after, strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())


def parts_of(model: nn.Module) -> list[torch.Tensor]:
    """All plain tensors that a model's weights consist of."""
    flat = []
    for tensor in (*model.parameters(), *model.buffers()):
        names = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else None
        flat += [tensor] if names is None else [getattr(tensor, name) for name in names]
    return [tensor.detach().view(torch.uint8) if tensor.itemsize == 1 else tensor.detach() for tensor in flat]


class Shaky(transformers.LlamaForCausalLM):
    """Moves its logits by `shake` of the largest one, with the number of its tokens: a stand-in for roundings."""

    shake = 0.05

    def forward(self, input_ids=None, **kwargs):
        out = super().forward(input_ids, **kwargs)
        out.logits = out.logits + self.shake * out.logits.abs().max() * (input_ids.shape[1] > 3)
        return out


def test_roundings_of_8_bit_activations_are_not_taken_for_state(monkeypatch):
    """A sum that is rounded otherwise may be another 8-bit number: more than float32 rounds, less than state shows."""
    models = {kind: model_of(kind) for kind in (None, "int8", "int8 dynamic")}
    for model in models.values():
        model.__class__ = Shaky
    for kind in (None, "int8"):
        with pytest.raises(UnsupportedArchitecture, match="other logits over a paged cache"):
            specdec.ModelRunner(models[kind], mode="eager")
    specdec.ModelRunner(models["int8 dynamic"], mode="eager")
    monkeypatch.setattr(Shaky, "shake", 0.3)
    with pytest.raises(UnsupportedArchitecture, match="other logits over a paged cache"):
        specdec.ModelRunner(models["int8 dynamic"], mode="eager")
