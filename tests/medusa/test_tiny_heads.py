"""The shipped heads: right for the shipped target, small, and as good as their record says."""

import json

import torch

import specdec
from medusa import MedusaDrafter, MedusaGenerator
from medusa.tiny_heads import FOLDER, load_tiny_heads, tiny_drafter
from specdec.tiny_pair import FOLDER as PAIR
from specdec.trees.tree import TokenTree


def test_greedy_text_is_the_targets_and_comes_in_fewer_rounds():
    pair = specdec.load_tiny_pair()
    batch = pair.tokenizer([prompts[0] for prompts in pair.prompts.values()], return_tensors="pt", padding=True)
    expected = pair.target.generate(
        **{name: batch[name] for name in ("input_ids", "attention_mask")}, do_sample=False, max_new_tokens=40
    )
    short = tiny_drafter(specdec.ModelRunner(pair.target))  # what a CPU can verify in little more than a step
    for drafter in (short, MedusaDrafter(*load_tiny_heads())):
        out = specdec.SpeculativeGenerator(pair.target, drafter).generate(
            batch.input_ids, batch.attention_mask, max_new_tokens=40
        )
        assert out.sequences.equal(expected)
    assert short.tree.is_chain and short.tree.size == 2
    record = json.loads((FOLDER / "record.json").read_text())["tokens_per_round"]["calibrated"]["all"]
    assert abs(out.stats.pooled.tokens_per_round - record) < 0.5


def test_the_tree_takes_fewer_rounds_than_a_regular_one():
    """On a sixth of what the record is measured on."""
    pair, (heads, tree) = specdec.load_tiny_pair(), load_tiny_heads()
    found = json.loads((FOLDER / "tree.json").read_text())
    assert len(found["accuracies"]) == heads.config.num_heads == 5 and tree.size == 26 == len(found["reached"])
    batch = pair.tokenizer(
        [text for prompts in pair.prompts.values() for text in prompts[:3]], return_tensors="pt", padding=True
    )
    runner, tokens = specdec.ModelRunner(pair.target), {}
    for name, shape in {"calibrated": tree, "regular": TokenTree.from_widths((5, 2, 1))}.items():
        out = MedusaGenerator(runner, heads, shape).generate(batch.input_ids, batch.attention_mask, max_new_tokens=48)
        tokens[name] = out.stats.pooled.tokens_per_round
    assert tokens["calibrated"] > 1.04 * tokens["regular"]
    assert MedusaGenerator(specdec.load_tiny_pair().target, heads, tree).target is not None


def test_heads_in_bf16_and_all_shipped_weights_stay_within_their_limit():
    assert load_tiny_heads(torch.bfloat16)[0].heads[0][0].linear.weight.dtype == torch.bfloat16
    assert sum(path.stat().st_size for folder in (FOLDER, PAIR) for path in folder.rglob("*.safetensors")) < 24e6
