"""Definitions of acceptance by hand, where they differ, and over real rounds."""

import pytest
import torch

import specdec
from specdec.report.definitions import definitions, table_of_definitions
from specdec.report.stats import RoundStats
from tests.families import build, noisy_copy, ragged_prompts
from tests.matrix import TREE

# Chains of 4. The first request: a plain round, then 3 of 4 accepted, then 4 of 4 of which the second ends the text.
LONG = RoundStats(
    proposed=(0, 4, 2), accepted=(0, 3, 2), emitted=(1, 4, 2), seconds=(), depths=(0, 4, 2),
    ranks=((), ((1, 0), (1, 0), (1, 0), (1, None)), ((1, 0), (1, 0), (1, 0), (1, 0))),
    uncut=((0, 0, 0), (4, 4, 3), (4, 4, 4)),
)  # fmt: skip
# The second one: one round, in which nothing is accepted.
SHORT = RoundStats(
    proposed=(4,), accepted=(0,), emitted=(1,), seconds=(), depths=(4,), ranks=(((1, None),),), uncut=((4, 4, 0),)
)
# A tree of 6 nodes and 3 levels: two children of the root, of which the second is accepted, and one of its children.
TREES = RoundStats(
    proposed=(6,), accepted=(2,), emitted=(3,), seconds=(), depths=(3,), ranks=(((2, 1), (2, 0), (1, None)),),
    uncut=((6, 3, 2),),
)  # fmt: skip


def values(*rows):
    return {(one.project, one.name): one.value for one in definitions(rows)}


def test_eight_ways_to_count_tokens_a_round():
    found = values(LONG, SHORT)
    ours = {name.removeprefix("tokens a round, "): v for (_, name), v in found.items() if "tokens a round" in name}
    assert ours == {
        "bonus included, cut at an end": 8 / 4, "bonus included, cut at an end, by request": (7 / 3 + 1) / 2,
        "no bonus, cut at an end": 5 / 4, "no bonus, cut at an end, by request": (5 / 3 + 0) / 2,
        "bonus included, past an end too": 11 / 4, "bonus included, past an end too, by request": (10 / 3 + 1) / 2,
        "no bonus, past an end too": 7 / 4, "no bonus, past an end too, by request": (7 / 3 + 0) / 2,
    }  # fmt: skip


def test_projects_by_hand():
    found = values(LONG, SHORT)
    assert found["vLLM", "mean acceptance length"] == 1 + 7 / 3, "three drafts; the plain round is none"
    assert found["vLLM", "draft acceptance rate"] == 7 / 12
    assert found["vLLM", "acceptance by position"] == (2 / 3, 2 / 3, 2 / 3, 1 / 3)
    assert found["SGLang", "accept len of the log"] == (4 + 2 + 1) / 3
    assert found["SGLang", "spec_accept_length"] == (7 / 2 + 1) / 2, "the plain round's token counts, as a prefill's"
    assert found["SpecForge", "accept length of a benchmark"] == (7 / 2 + 1) / 2
    assert found["SGLang", "spec_num_correct_drafts"] == 5
    assert found["SGLang", "spec_correct_drafts_histogram"] == (1, 0, 1, 1)
    assert found["DeepSpec", "acceptance length"] == 8 / 4
    assert found["TensorRT-LLM", "acceptance by position"] == (2 / 3, 2 / 3, 1 / 3, 0)
    assert found["transformers", "n_matches, a mean"] == 5 / 3


def test_rates_of_trees_differ_by_what_they_divide_by():
    found = values(TREES)
    assert found["specdec", "acceptance by nodes"] == 2 / 6
    assert found["specdec", "acceptance by depth"] == found["specdec", "acceptance by path"] == 2 / 3
    assert found["specdec", "draft length"] == 3 and found["specdec", "ended before the draft"] == 1
    chains = values(LONG, SHORT)
    assert chains["specdec", "acceptance by nodes"] == chains["specdec", "acceptance by depth"] == 5 / 10
    assert chains["specdec", "acceptance by path"] == 5 / 7, "tried: four, two before the end, one"
    assert chains["specdec", "draft length"] == 4 and chains["specdec", "ended before the draft"] == 2 / 3


def test_a_ranking_flips_between_pooled_and_by_request():
    """Two methods: the first is better on a long text, the second on a short one."""
    long, short = RoundStats((4,) * 8, (3,) * 8, (4,) * 8, ()), RoundStats((4,), (0,), (1,), ())
    other_long, other_short = RoundStats((4,) * 8, (2,) * 8, (3,) * 8, ()), RoundStats((4,), (2,), (3,), ())
    first, second = values(long, short), values(other_long, other_short)
    pooled, mean = (("specdec", f"tokens a round, bonus included, cut at an end{x}") for x in ("", ", by request"))
    assert first[pooled] > second[pooled] and first[mean] < second[mean]


def test_nothing_drafted_divides_by_nothing():
    found = definitions([RoundStats((0, 0), (0, 0), (1, 1), ())])
    assert {one.value for one in found if one.project == "vLLM"} == {None}
    assert "-" in table_of_definitions(found) and definitions([])[0].value is None


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_rounds_keep_what_was_accepted_past_an_end(mode):
    """Of a target that drafts for itself all nodes of one path are accepted, wherever the text ends."""
    model, (ids, mask) = build("llama"), ragged_prompts(2)
    model.generation_config.eos_token_id = None
    text = specdec.AutoregressiveGenerator(model).generate(ids, mask, max_new_tokens=12).sequences[:, 21:]
    ends = next([int(token)] for place, token in enumerate(text[0]) if place > 5 and token not in text[0, :place])
    place = text[0].tolist().index(ends[0])
    drafter = specdec.ModelDrafter(model, 4)
    row = (
        specdec.SpeculativeGenerator(model, drafter, mode=mode)
        .generate(ids, mask, max_new_tokens=12, eos_token_id=ends)
        .stats.rows[0]
    )
    assert sum(row.emitted) == place + 1 and set(row.uncut) == {(4, 4, 4)}
    assert row.accepted[-1] == min(4, (place + 1) - 5 * (row.rounds - 1)) and row.accepted[-1] < 4
    generator = specdec.SpeculativeGenerator(model, specdec.ModelDrafter(noisy_copy("llama"), tree=TREE), mode=mode)
    out = generator.generate(ids, mask, max_new_tokens=12)
    for row in out.stats.rows:
        whole = [nodes for nodes, *_ in row.uncut]
        assert whole == [7] * row.rounds and all(a <= w for a, w in zip(row.proposed, whole, strict=True))
        assert all(kept <= accepted for kept, (*_, accepted) in zip(row.accepted, row.uncut, strict=True))
    assert torch.equal(out.sequences[:, 21:], text)
