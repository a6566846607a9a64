"""Gemma 4's assistant: logits of every node of every round are those of transformers over its text; texts are exact."""

import pytest
import torch
import transformers as tf

import specdec
from specdec.drafters import assistant as module
from specdec.drafters.assistant import AssistantDrafter, AssistantState
from specdec.trees.tree import TokenTree
from tests.families import VOCAB, build, ragged_prompts

TEXT = [5, 9, 13, 7, 3, 11, 40, 21, 8, 60, 2, 33]
TARGETS = ["gemma4, shared", "gemma4"]  # whose sliding window is 9


def assistant_for(target, **fields):
    """A random assistant of two layers."""
    heads = dict(num_global_key_value_heads=1) if target.config.attention_k_eq_v else dict(global_head_dim=32)
    torch.manual_seed(3)
    text = tf.Gemma4TextConfig(
        vocab_size=VOCAB, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, attention_k_eq_v=target.config.attention_k_eq_v, sliding_window=9, **heads,
        hidden_size_per_layer_input=0, vocab_size_per_layer_input=0, max_position_embeddings=160,
        layer_types=["sliding_attention", "full_attention"], num_kv_shared_layers=2, eos_token_id=2, pad_token_id=1,
    )  # fmt: skip
    wanted = {
        "backbone_hidden_size": target.config.hidden_size,
        "num_centroids": VOCAB,
        "centroid_intermediate_top_k": 40,
    }
    model = tf.Gemma4AssistantForCausalLM(tf.Gemma4AssistantConfig(text_config=text, **wanted | fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
        if model.masked_embedding is not None:
            model.masked_embedding.token_ordering.copy_(torch.randperm(VOCAB))
    return model


@torch.no_grad()
def of_transformers(assistant, target, text, path):
    """Logits `[V]` of transformers' assistant after `path`, drafted tokens that follow `text`."""
    out = target(torch.tensor([text[:-1]]), output_hidden_states=True, return_shared_kv_states=True, use_cache=False)
    state, shared = out.hidden_states[-1][:, -1:], dict(out.shared_kv_states)
    place = torch.tensor([[len(text) - 1]])
    for token in [text[-1], *path]:
        embedded = target.get_input_embeddings()(torch.tensor([[token]]))
        found = assistant(inputs_embeds=torch.cat([embedded, state], -1), position_ids=place, shared_kv_states=shared)
        state = found.last_hidden_state
    return found.logits[0, 0]


def heard(monkeypatch):
    """Of every step of every round: texts of the rows, the drafted path to each node, and logits `[A, n, V]`."""
    found, held, catch_up, run = [], [], AssistantState.catch_up, AssistantState.run

    def first(state, batch):
        logits = catch_up(state, batch)
        texts = [batch.rows.tokens[row.slot, : row.length].tolist() for row in batch.members]
        held[:] = [texts, [[[]] for _ in texts]]
        found.append((texts, held[1], logits[:, None].clone()))
        return logits

    def deeper(state, batch, tokens, tree=None, above=None):
        logits = run(state, batch, tokens, tree, above)
        places = above.expand(len(tokens), -1).tolist()
        held[1] = [
            [[*held[1][row][place], int(token)] for place, token in zip(places[row], tokens[row], strict=True)]
            for row in range(len(tokens))
        ]
        found.append((held[0], held[1], logits.clone()))
        return logits

    monkeypatch.setattr(AssistantState, "catch_up", first)
    monkeypatch.setattr(AssistantState, "run", deeper)
    return found


def worst(found, assistant, target) -> float:
    """The largest difference of any logit that is not -inf from transformers'."""
    largest = 0.0
    for texts, paths, logits in found:
        for row, text in enumerate(texts):
            for node, path in enumerate(paths[row]):
                ours, theirs = logits[row, node], of_transformers(assistant, target, text, path)
                assert ours.argmax() == theirs.argmax()
                kept = ours > float("-inf")
                largest = max(largest, float((ours - theirs)[kept].abs().max()))
                assert kept.all() or float(theirs[kept].min()) > float(theirs[~kept].max())
    return largest


SHAPES = {"chain": {"num_tokens": 3}, "tree": {"tree": TokenTree.from_widths((2, 2, 1))}}


@pytest.mark.parametrize(("shape", "ordered"), [("chain", False), ("tree", True)])  # all tokens, chosen clusters
@pytest.mark.parametrize("family", TARGETS)
def test_every_step_is_that_of_transformers_and_texts_are_exact(family, shape, ordered, monkeypatch):
    """Ragged rows, shorter and longer than the window, after rounds that accepted some tokens, or none."""
    target = build(family)
    assistant, found = assistant_for(target, use_ordered_embeddings=ordered), heard(monkeypatch)
    ids, mask = torch.tensor([TEXT, [1] * 8 + TEXT[:4]]), torch.ones(2, 12, dtype=torch.int64)
    mask[1, :8] = 0
    drafter = AssistantDrafter(assistant, **SHAPES[shape])
    out = specdec.SpeculativeGenerator(target, drafter, mode="eager").generate(ids, mask, max_new_tokens=10)
    plain = specdec.AutoregressiveGenerator(target, mode="eager").generate(ids, mask, max_new_tokens=10)
    assert out.sequences.equal(plain.sequences)
    assert len(found) > 12 and {len(text) > 12 for texts, *_ in found for text in texts} == {True, False}
    assert worst(found, assistant, target) < 1e-3 * max(1.0, float(found[0][2][found[0][2].isfinite()].abs().max()))
    assert ("best 40 of 97 clusters" in drafter.describe()) == ordered


@pytest.mark.parametrize("planted", ["a shorter window", "the token before's state", "the next position"])
def test_a_planted_bug_is_caught(planted, monkeypatch):
    target = build("gemma4, shared")
    assistant, found = assistant_for(target), heard(monkeypatch)
    step = module.AssistantSteps.__call__
    if planted == "a shorter window":
        attend = module.attend
        narrow = lambda window: window and window - 1
        monkeypatch.setattr(module, "attend", lambda q, layer, batch, scale, window, *rest: attend(
            q, layer, batch, scale, narrow(window), *rest))  # fmt: skip
    else:
        roll = 1 if "state" in planted else 0
        shifted = lambda steps, embedded, states, places, *rest: step(
            steps, embedded, states.roll(roll, 0), places + 1 - roll, *rest
        )
        monkeypatch.setattr(module.AssistantSteps, "__call__", shifted)
    ids = torch.tensor([TEXT, TEXT[::-1]])
    specdec.SpeculativeGenerator(target, AssistantDrafter(assistant, 3), mode="eager").generate(ids, max_new_tokens=8)
    with pytest.raises(AssertionError):
        assert worst(found, assistant, target) < 1e-3


def test_a_row_draws_as_alone_and_a_saved_assistant_drafts_the_same(tmp_path):
    """In an engine too."""
    target = build("gemma4, shared", spread=1.0)
    assistant = assistant_for(target, use_ordered_embeddings=True)
    assistant.save_pretrained(tmp_path)
    loaded = specdec.load_drafter(tmp_path, target, num_tokens=2)
    ids, mask = ragged_prompts(3)
    options = dict(max_new_tokens=10, do_sample=True, temperature=0.9, seed=4)
    make = lambda drafter: specdec.SpeculativeGenerator(target, drafter)
    out = make(AssistantDrafter(assistant, 2)).generate(ids, mask, **options)
    again = make(loaded).generate(ids, mask, **options)
    assert out.sequences.equal(again.sequences) and out.stats.pooled.accepted == again.stats.pooled.accepted
    alone = make(loaded).generate(ids[:1, mask[0].bool()], **options).sequences
    assert alone[0, -10:].equal(out.sequences[0, -10:])
    plain = specdec.AutoregressiveGenerator(target).generate(ids, mask, max_new_tokens=10).sequences
    engine = specdec.Engine(target, loaded)
    handles = [engine.submit(row[kept.bool()], max_new_tokens=10) for row, kept in zip(ids, mask, strict=True)]
    list(engine.run())
    for handle, row in zip(handles, plain[:, ids.shape[1] :].tolist(), strict=True):
        assert handle.error is None and handle.tokens == row[: row.index(2) + 1 if 2 in row else None]


def test_the_reported_distribution_is_the_drawn_one(monkeypatch):
    target = build("gemma4, shared", spread=1.0)
    found, drafts, propose = heard(monkeypatch), [], module._propose
    monkeypatch.setattr(module, "_propose", lambda *given: drafts.append(propose(*given)) or drafts[-1])
    drafter = AssistantDrafter(assistant_for(target, use_ordered_embeddings=True), 3)
    generator = specdec.SpeculativeGenerator(target, drafter, mode="eager")
    generator.generate(torch.tensor([TEXT]), max_new_tokens=8, do_sample=True, temperature=0.7, seed=1)
    drawn = [draft for draft in drafts if draft.probs is not None]
    logits = torch.cat([logits for *_, logits in found], 1)[0]
    q = torch.cat([draft.probs[0] for draft in drawn])
    torch.testing.assert_close(q, (logits / 0.7).softmax(-1), atol=1e-5, rtol=1e-4)
    assert len(q) > 6 and (q == 0).any()


def test_what_does_not_fit_is_refused():
    target = build("gemma4, shared")
    fits = lambda drafter, model=target: drafter.validate(specdec.ModelRunner(model, mode="eager"))
    with pytest.raises(ValueError, match=r"hidden size \(backbone_hidden_size\), got 48 for the draft and 32"):
        fits(AssistantDrafter(assistant_for(target, backbone_hidden_size=48)))
    with pytest.raises(ValueError, match="dtype, got torch.float64"):
        fits(AssistantDrafter(assistant_for(target).double()))
    with pytest.raises(ValueError, match="reads a full_attention layer, which the LlamaForCausalLM lacks"):
        fits(AssistantDrafter(assistant_for(target)), build("llama"))
    with pytest.raises(ValueError, match="head dim of full_attention layers, got 32 for the draft and 512"):
        fits(AssistantDrafter(assistant_for(target)), build("gemma4"))
    with pytest.raises(ValueError, match="must be one of gemma4_assistant, .* got llama"):
        AssistantDrafter(build("llama"))
    with pytest.raises(ValueError, match="needs its folder or hub id"):
        module.make_assistant(specdec.ModelRunner(target, mode="eager"), None)
    with pytest.raises(ValueError, match="num_tokens .* got 0"):
        AssistantDrafter(assistant_for(target), 0)


@pytest.mark.parametrize(("shape", "options"), [("chain", {"temperature": 0.7}), ("tree", {"top_p": 0.9})])
def test_samples_have_the_targets_distribution(shape, options):
    """Chi-square tests of every token; a wrong rule is found by the same numbers."""
    target = build("gemma4, shared", spread=1.5)
    drafter = AssistantDrafter(assistant_for(target, use_ordered_embeddings=True), **SHAPES[shape])
    settings = dict(parts=("sampled",), samples=1000, tokens=2, batch=250, mode="eager")
    found = specdec.audit(target, drafter, [TEXT], **settings, **options)
    assert found.verdict == "passed", found
