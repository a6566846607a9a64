"""P-EAGLE in rounds: all slots in one pass, as over a fresh text, whatever was drafted before."""

import pytest
import torch

import specdec
from specdec.drafters.eagle3.dense import DenseAttention
from specdec.drafters.eagle3.drafter import Eagle3Drafter
from specdec.drafters.parallel_state import ParallelState
from tests.families import build
from tests.learned import fitted, own_texts


@torch.no_grad()
def fresh_logits(network, target, text, slots):
    """`[slots, V]`: what follows `text [L]`, by dense attention over all of it and its parallel slots."""
    states = target(input_ids=text[None], output_hidden_states=True).hidden_states
    features = torch.cat([states[layer][0] for layer in network.config.target_layers], -1)[:-1]
    tokens, masks = network.mask_steps(slots - 1)
    anchors = torch.cat([torch.arange(len(features)), torch.full((slots - 1,), len(features) - 1)])
    depths = torch.cat([torch.zeros(len(features), dtype=torch.int64), torch.arange(1, slots)])
    attend = DenseAttention(network.config)
    attend.place(anchors, depths)
    embedded, hidden = network.embed(torch.cat([text[1:], tokens])), network.fuse(torch.cat([features, masks]))
    output, _ = network(embedded, hidden, anchors + depths, attend)
    return network.target_logits(output[-slots:])


@pytest.mark.parametrize("layers", [1, 2])
def test_every_round_drafts_as_a_fresh_drafter_in_one_pass(monkeypatch, layers):
    target = build("llama")
    network = fitted(target, mask_token=1, num_layers=layers)
    drafter, seen, passes, levels = Eagle3Drafter(network, 4), [], [], []
    catch_up, run, step = ParallelState.catch_up, ParallelState.run, type(drafter.runner.source).step

    def spy(state, batch):
        first = catch_up(state, batch)
        levels.append(1)
        for row, logits in zip(batch.members, state._logits, strict=True):
            seen.append((batch.rows.tokens[row.slot, : row.length].clone(), logits.clone()))
        return first

    def spy_on_run(state, *given):
        logits, level = run(state, *given), levels[-1]
        assert torch.equal(logits[:, 0], state._logits[:, level]), "each level has the logits of its own slot"
        levels[-1] += 1
        return logits

    def count(source, tokens, *rest):
        passes.append(len(tokens))
        return step(source, tokens, *rest)

    monkeypatch.setattr(ParallelState, "catch_up", spy)
    monkeypatch.setattr(ParallelState, "run", spy_on_run)
    monkeypatch.setattr(type(drafter.runner.source), "step", count)
    generator = specdec.SpeculativeGenerator(target, drafter, mode="eager")
    own = own_texts(target)  # which the output layer was fitted to
    tokens, mask = own[:2, :9].clone(), torch.ones(2, 9, dtype=torch.int64)
    tokens[0], mask[0, :3] = tokens[0].roll(3), 0
    out = generator.generate(tokens, mask, max_new_tokens=24)
    assert len(seen) > 8 and out.stats.pooled.tokens_per_round > 1, "some drafts are accepted"
    for text, logits in seen:
        torch.testing.assert_close(logits, fresh_logits(network, target, text, 4), atol=1e-4, rtol=1e-4)
    assert max(levels) == 4
    assert len(passes) <= len(seen) + 1, "one pass a round, and one for the prompts"


def test_a_drafter_of_one_token_a_step_has_no_parallel_slots():
    with pytest.raises(ValueError, match="mask_token None"):
        fitted(build("llama")).mask_steps(2)
