"""What a block drafter's file must have, what its format decides, and errors that name what does not fit."""

import pytest
import torch

import specdec
from specdec.drafters.block.loading import load_block
from tests.specdec.drafters.block.conftest import refuses
from tests.specdec.drafters.block.test_golden import GOLDEN, NAMES, expected_of


def test_the_format_is_told(runner):
    told = specdec.load_drafter(GOLDEN / "dspark_fill_in", runner).describe()
    assert "format: speculators, dspark, qwen3 layers" in told
    assert "target_layers (2, 4, 5): aux_hidden_state_layer_ids is [2, 4, 5], as in output_hidden_states" in told
    assert "each of 3 mask tokens predicts the token at its own place (sample_from_anchor False)" in told
    assert "Markov head: gated of rank 6; confidence head reads: hidden" in told
    assert "windows (None, 3) before the anchor; such layers are causal in a block: True" in told


@pytest.mark.parametrize("name", NAMES)
def test_a_loaded_drafter_drafts_for_greedy_text_of_the_target(runner, name):
    drafter = specdec.load_drafter(GOLDEN / name, runner.model)
    assert type(drafter).__name__ == "BlockDrafter" and drafter.traits.max_tokens == 3, "as many as the file proposes"
    tokens = torch.tensor([[5, 17, 30, 2, 9]])
    plain = specdec.AutoregressiveGenerator(runner.model, mode="eager").generate(tokens, max_new_tokens=16)
    out = specdec.SpeculativeGenerator(runner.model, drafter, mode="eager").generate(tokens, max_new_tokens=16)
    assert torch.equal(out.sequences, plain.sequences)


def test_options_choose_the_draft(runner):
    load = lambda **options: specdec.load_drafter(GOLDEN / "dspark", runner, **options).traits
    assert load(num_tokens=4).max_tokens == 4 and load(nodes=9).own_depth == 4 and load(nodes=9).max_tokens == 9
    assert load(nodes=9, depth=2, children=3).own_depth == 2 and load(nodes=9).shapes == "grown"
    assert load(confidence=0.4).shapes == "chain"
    with pytest.raises(ValueError, match="block of 4 predicts 4 tokens, got trees of depth 5"):
        load(nodes=9, depth=5)
    with pytest.raises(ValueError, match=r"of a tree of some nodes, got \(3, 8, None, None\) without"):
        load(depth=3, width=8)
    with pytest.raises(ValueError, match="block of 4 predicts 4 tokens, got a draft of depth 5"):
        load(num_tokens=5)


def test_the_targets_embeddings_and_output_layer_are_read_not_copied(runner):
    model, _ = load_block(runner, GOLDEN / "dflash_whole")
    tokens, states = torch.tensor([3, 40]), torch.randn(2, 16)
    assert torch.equal(model.embed(tokens), runner.model.get_input_embeddings()(tokens))
    torch.testing.assert_close(model.logits(states), runner.model.get_output_embeddings()(states))
    assert not any("embed_tokens" in name or "lm_head" in name for name, _ in model.named_parameters())


def test_a_speculators_files_own_copies_of_the_targets_tables_are_not_used(runner, files):
    some = files("dflash_whole")
    some.weights |= {"embed_tokens.weight": torch.zeros(48, 16), "lm_head.weight": torch.zeros(48, 16)}
    model, _ = load_block(runner, some.write())
    assert "embed_tokens.weight of the file is not used" in model.about and model.embed(torch.tensor([3])).any()


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        (dict(selector_top_k=49), "1 to 48 candidates, got markov 'selector' with 49"),
        (dict(conv_group_size=5), "conv_group must divide hidden_size 16, got 5"),
        (dict(conv_kernel_size=5), "conv_taps must lie in 0 to block_size 4, got 5"),
        (dict(selector_rank=7), r"predecessor_codebook is \[48, 6\], not \[48, 7\]"),
    ],
)
def test_what_does_not_fit_a_selector_is_named(runner, files, fields, match):
    some = files("dflash2")
    some.config |= fields
    refuses(runner, some, match)


SPOILT = [
    (lambda f: f.weights.pop("fc.weight"), "1 weights are missing: fc.weight"),
    (lambda f: f.weights.pop("markov_head.markov_w1.weight"), "missing: markov_head.markov_w1.weight"),
    (lambda f: f.weights.pop("lm_head.weight"), "missing: lm_head.weight"),
    (lambda f: f.weights.pop("d2t"), "d2t is missing: which 20 of 48 tokens"),
    (lambda f: f.weights.update(extra=torch.ones(2)), "1 weights are left over.*: extra"),
    (lambda f: f.config.update(markov_rank=5), r"markov_head.markov_w1.weight is \[48, 6\], not \[48, 5\]"),
    (lambda f: f.config.update(enable_confidence_head=False), "left over.*confidence_head.proj.bias"),
    (lambda f: f.config.update(markov_rank=0), "confidence head that reads the markov head needs one"),
    (lambda f: f.config.update(markov_head_type="deep"), "markov must be one of .* got 'deep'"),
    (lambda f: f.config.update(mask_token_id=48), "mask_token must be .* below target_vocab_size 48, got 48"),
    (lambda f: f.config.update(mask_token_id=None), "lacks the field mask_token_id"),
    (lambda f: f.config.update(block_size=1), "block_size must be at least 2.* got 1"),
    (lambda f: f.config.update(aux_hidden_state_layer_ids=None), "lacks the field aux_hidden_state_layer_ids"),
    (lambda f: f.config.update(aux_hidden_state_layer_ids=[2, 4, 9]), r"\[2, 4, 9\] of 0 to 8 .* has 8 layers"),
    (lambda f: f.config.update(aux_hidden_state_layer_ids=[2, 4, 8]), "state after the last of 8 layers.*final norm"),
    (lambda f: f.config.update(aux_hidden_state_layer_ids=[2, 4]), "fc.weight reads width 48, and 2 states .* have 32"),
    (lambda f: f.config.update(target_hidden_size=32), "target_hidden_size is 32 and hidden_size 16"),
    (lambda f: f.config["transformer_layer_config"].update(hidden_size=32), "hidden_size is 32, and the embeddings of .* has width 16"),  # noqa: E501
    (lambda f: f.config["transformer_layer_config"].update(vocab_size=64), r"t2d must have 64 entries \(vocab_size\)"),
    (lambda f: f.config.update(new_trick=3), "unknown fields.*new_trick=3"),
    (lambda f: f.config.update(quantization_config=dict(quant_method="fp8")), "fp8"),
    (lambda f: f.config["speculators_config"].update(algorithm="dflash"), "'dspark' and algorithm .* 'dflash'"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "match"), SPOILT, ids=[match[:30] for _, match in SPOILT])
def test_what_does_not_fit_is_named(runner, files, spoil, match):
    some = files()
    spoil(some)
    refuses(runner, some, match)


@pytest.mark.parametrize("name", ["dflash_whole", "dspark", "dflash2"])
def test_flat_files_are_the_same_drafters(lender, files, name):
    """Ids of layers are one less, and z-lab keeps fields in `dflash_config`."""
    expected, some = expected_of(name), files(name)
    runner = lender(expected)
    model, _ = load_block(runner, some.write())
    # the library's default for windows of DFlash2 is another than z-lab's
    other, _ = load_block(runner, some.flat(**dict(is_causal=False) if name == "dflash2" else {}).write())
    assert model.config == other.config and "outputs of layers" in other.about
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert type(specdec.load_drafter(some.folder, runner)).__name__ == "BlockDrafter"


def test_a_flat_file_may_have_tables_of_its_own(runner, files):
    some = files("dflash_whole").flat()
    some.weights |= {"embed_tokens.weight": torch.randn(48, 16), "lm_head.weight": torch.randn(48, 16)}
    model, _ = load_block(runner, some.write())
    assert torch.equal(model.embed(torch.tensor([3]))[0], some.weights["embed_tokens.weight"][3])
    assert "embeddings: its own; output layer: its own" in model.about


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        (dict(architectures=["LlamaForCausalLM"]), "architectures must be one of DFlashDraftModel, .*LlamaForCausalLM"),
        (dict(model_type="gemma4"), "model_type must be 'qwen3', got 'gemma4'"),
        (dict(num_target_layers=9), "num_target_layers is 9, and .* has 8 layers"),
        (dict(block_size=5), "block_size is 5 in config.json and 4 in dflash_config"),
        (dict(target_layer_ids=[1, 3]), r"target_layer_ids is \[1, 3\] in config.json and \[1, 3, 4\]"),
        (dict(dflash_config=dict(mask_token_id=7, target_layer_ids=[1, 3, 7], block_size=4)), "after the last of 8"),
        (dict(dflash_config=dict(mask_token_id=7, target_layer_ids=[1, 3, 4])), "lacks the field block_size"),
        (dict(is_casual=True), "unknown fields.*is_casual=True"),
    ],
)
def test_what_does_not_fit_in_a_flat_file_is_named(runner, files, fields, match):
    refuses(runner, files("dflash_whole").flat(**fields), match)


def test_which_layers_of_a_flat_file_are_causal(runner, files):
    load = lambda **fields: load_block(runner, files("dflash").flat(**fields).write())[0].config
    both = dict(sliding_window=3, use_sliding_window=True)
    assert (load(**both).causal, load(**both).windows) == ((False, True), (None, 3))
    assert load(is_causal=False).causal is None and load(is_causal=True).causal == (True, True)
    assert load(use_sliding_window=False).windows is None


def test_scales_of_embeddings_and_logits(runner, files):
    some = files("dflash_whole").flat(input_embedding_scale=2.0, output_multiplier=0.5, final_logit_softcapping=3.0)
    model, _ = load_block(runner, some.write())
    tokens, states = torch.tensor([3, 40]), torch.randn(2, 16)
    assert torch.equal(model.embed(tokens), 2 * runner.model.get_input_embeddings()(tokens))
    plain = runner.model.get_output_embeddings()(states)
    torch.testing.assert_close(model.logits(states), 3 * torch.tanh(plain * 0.5 / 3))
