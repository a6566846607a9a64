"""Domino's and JetSpec's files in the layouts of SpecForge and NeMo, and what no kind of block drafter may have."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import specdec
from specdec.drafters.block.dense import block_places, slot_logits
from specdec.drafters.block.growth import Growth
from specdec.drafters.block.loading import load_block
from specdec.drafters.block.module import BlockModel
from specdec.drafters.block.saving import save_drafter
from tests.specdec.drafters.block.conftest import refuses
from tests.specdec.drafters.block.test_golden import FOLDERS, expected_of
from tests.specdec.drafters.block.test_saving import same

DOMINO = ["domino", "domino_shifted"]


def test_the_format_of_domino_is_told(runner):
    told = specdec.load_drafter(FOLDERS["domino"], runner).describe()
    assert "format: flat Qwen3 config, DominoDraftModel" in told
    assert "each of 3 mask tokens predicts the token at its own place (shift_label False)" in told
    assert "a GRU of 10 over the tokens of a block, rank 6, on all but the first 1 predicted tokens" in told
    told = specdec.load_drafter(FOLDERS["domino_shifted"], runner).describe()
    assert "each of 4 places predicts the token after it (shift_label True)" in told


@pytest.mark.parametrize("name", DOMINO)
@torch.no_grad()
def test_logits_are_those_of_a_gru_of_torch(lender, name):
    """An independent computation in float64, out of the file's own numbers."""
    expected = expected_of(name)
    model, _ = load_block(lender(expected), FOLDERS[name])
    config, model = model.config, model.double()
    model.borrow(*(nn.Embedding.from_pretrained(expected[key].double()) for key in ("embeddings", "output")))
    anchors = expected["anchors"]
    before = expected["tokens"][anchors[:, None] + torch.arange(config.num_slots)]
    places = block_places(model, expected["features"].double(), expected["tokens"], anchors)
    gru = nn.GRU(config.hidden_size, config.memory_size, bias=False, batch_first=True).double()
    gru.load_state_dict(model.domino_head.prefix_gru.state_dict())
    states, hidden = gru(expected["embeddings"].double()[before])[0], places[:, config.block_size - config.num_slots :]
    rank, _, out = model.domino_head.embed_proj
    added = nn.functional.silu(torch.cat([hidden, states], -1) @ rank.weight.T) @ out.weight.T
    added[:, : config.plain_slots] = 0
    torch.testing.assert_close(slot_logits(model, places, before), hidden @ expected["output"].double().T + added)


@pytest.mark.parametrize("options", [{}, dict(nodes=6), dict(nodes=6, children=2)], ids=str)
@pytest.mark.parametrize("name", DOMINO)
def test_a_loaded_domino_drafter_keeps_the_targets_greedy_text(runner, name, options):
    drafter = specdec.load_drafter(FOLDERS[name], runner.model, **options)
    tokens = torch.tensor([[5, 17, 30, 2, 9]])
    plain = specdec.AutoregressiveGenerator(runner.model, mode="eager").generate(tokens, max_new_tokens=12)
    out = specdec.SpeculativeGenerator(runner.model, drafter, mode="eager").generate(tokens, max_new_tokens=12)
    assert torch.equal(out.sequences, plain.sequences)


@pytest.mark.parametrize("name", DOMINO)
def test_domino_is_written_as_it_was_read(runner, name, tmp_path):
    model, _ = load_block(runner, FOLDERS[name])
    save_drafter(model, tmp_path, layout="z-lab", num_target_layers=8)
    again, _ = load_block(runner, tmp_path)
    assert same(model, again)
    with pytest.raises(ValueError, match="speculators layout has no domino head"):
        save_drafter(model, tmp_path)


def test_earlier_names_and_other_architectures_of_domino(runner, files):
    """Early files have their head below `logit_head`; NeMo has no architecture for it, but its field."""
    model, _ = load_block(runner, FOLDERS["domino"])
    some = files("domino")
    head = ("prefix_gru.", "embed_proj.")
    some.weights = {f"logit_head.{k}" if k.startswith(head) else k: v for k, v in some.weights.items()}
    some.config.update(architectures=["Qwen3DFlashDraftModel"], is_causal=False)
    some.config["dflash_config"]["block_size"] = 4
    assert same(model, load_block(runner, some.write())[0])


def test_layers_that_a_file_does_not_name_are_spread_evenly(runner, files):
    some = files("domino")
    del some.config["dflash_config"]["target_layer_ids"]
    some.weights["fc.weight"] = some.weights["fc.weight"][:, :32]
    model, _ = load_block(runner, some.write())
    assert model.config.target_layers == (2, 6), "layers 1 and n - 3 of 8, of which a state is one further"


BAD_DOMINO = [
    (dict(emb_dim=None), "lacks the field emb_dim"),
    (dict(emb_dim=0), "rank of at least 1, got 'domino' of rank 0"),
    (dict(emb_dim=7), r"domino_head.embed_proj.0.weight is \[6, 26\], not \[7, 26\]"),
    (dict(gru_hidden_dim=0), "memory_size of at least 1 .* got 0 and 1 with markov 'domino'"),
    (dict(gru_hidden_dim=9), r"prefix_gru.weight_hh_l0 is \[30, 10\], not \[27, 9\]"),
    (dict(pure_draft_prefix_len=4), "in 0 to the block's 3 slots, got 4"),
    (dict(pure_draft_prefix_len=-1), "got 10 and -1 with markov 'domino'"),
    (dict(shift_label=1), "shift_label must be of type bool, got 1"),
    (dict(projector_type="causal_v5"), "projector_type of DominoDraftModel must be one of domino, got 'causal_v5'"),
    (dict(input_embedding_scale=2.0), "unknown fields.*input_embedding_scale=2.0"),
]


@pytest.mark.parametrize(("fields", "match"), BAD_DOMINO, ids=[str(fields) for fields, _ in BAD_DOMINO])
def test_what_does_not_fit_a_domino_head_is_named(runner, files, fields, match):
    some = files("domino")
    some.config["dflash_config"] |= fields
    refuses(runner, some, match)


def test_weights_of_a_domino_head_are_named(runner, files):
    some = files("domino")
    gru = some.weights.pop("prefix_gru.weight_ih_l0")
    refuses(runner, some, "1 weights are missing: domino_head.prefix_gru.weight_ih_l0")
    some.weights |= {"prefix_gru.weight_ih_l0": gru, "prefix_gru.bias_ih_l0": torch.zeros(30)}
    refuses(runner, some, "1 weights are left over.*prefix_gru.bias_ih_l0")
    del some.weights["prefix_gru.bias_ih_l0"]
    some.config |= dict(layer_types=["sliding_attention"] * 2, sliding_window=3, use_sliding_window=True)
    refuses(runner, some, r"windows \(3, 3\) of a DominoDraftModel .* counted from each place")


JETSPEC = [
    dict(dflash_config=dict(causal_head=True)),
    dict(dflash_config=dict(causal=True), is_causal=False, architectures=["Qwen3DFlashDraftModel"]),
    dict(dflash_config=dict(causal=True)),
]


def jetspec(files, fields):
    some = files("dflash_whole").flat()
    return some, fields | dict(dflash_config=some.config["dflash_config"] | fields["dflash_config"])


@pytest.mark.parametrize("fields", JETSPEC, ids=["JetSpec", "NeMo", "vLLM"])
@torch.no_grad()
def test_a_causal_head_makes_a_block_causal(lender, files, fields):
    """The first slots of a causal block are those of a shorter one, which two-way blocks' are not."""
    expected, (some, fields) = expected_of("dflash_whole"), jetspec(files, fields)
    some.config |= fields
    model, reading = load_block(lender(expected), some.write())
    assert model.config.causal == (True,) and "sees only those up to itself (caus" in model.about
    run = lambda model: block_places(model, expected["features"].float(), expected["tokens"], expected["anchors"])
    for causal in (True, False):
        whole, short = (BlockModel(replace(model.config, causal=(causal,), block_size=size)) for size in (4, 3))
        for each in (whole, short):
            each.load_state_dict(model.state_dict())
            each.borrow(nn.Embedding.from_pretrained(expected["embeddings"].float()), None)
        same_places = torch.allclose(run(whole)[:, :3], run(short), atol=1e-5)
        assert same_places == causal


def test_a_tree_of_jetspec_has_the_likeliest_of_all_paths_of_few_tokens(runner, files):
    """The best W tokens of each depth by log-probability, the best sums of which are the nodes."""
    some, fields = jetspec(files, JETSPEC[0])
    some.config |= fields
    drafter = specdec.load_drafter(some.write(), runner, nodes=8, children=2)
    assert drafter._growth == Growth(8, 3, None, 2, None)
    tokens = torch.tensor([[5, 17, 30, 2, 9]])
    plain = specdec.AutoregressiveGenerator(runner.model, mode="eager").generate(tokens, max_new_tokens=12)
    out = specdec.SpeculativeGenerator(runner.model, drafter, mode="eager").generate(tokens, max_new_tokens=12)
    assert torch.equal(out.sequences, plain.sequences)


def test_fields_that_contradict_each_other_are_named(runner, files):
    some = files("dflash_whole").flat(is_causal=False)
    some.config["dflash_config"]["causal_head"] = True
    refuses(runner, some, "is_causal is False and causal_head is True, which contradict each other")


def test_what_is_not_known_of_a_layout_is_refused_by_name(runner, files):
    names = ["Qwen3DFlash2DraftModel"]
    refuses(runner, files("dflash2").flat(architectures=names), "architectures must be one of .*Qwen3DFlash2DraftModel")
    some = files("dflash_whole")
    some.config["speculators_model_type"] = "jetspec"
    with pytest.raises(ValueError, match="speculators_model_type is 'jetspec', which no kind of drafter here reads"):
        specdec.load_drafter(some.write(), runner)


KINDS = {
    "speculators, DFlash": ("dflash_whole", False), "speculators, DSpark": ("dspark", False),
    "speculators, DFlash2": ("dflash2", False), "z-lab, DFlash": ("dflash_whole", True),
    "z-lab, DFlash2": ("dflash2", True), "DeepSpec, DSpark": ("dspark", True), "SpecForge, Domino": ("domino", False),
}  # fmt: skip


def put(config, names, value):
    """Set the fields of these names, wherever they are; `value(x, last)` of the old x, where `last` is the last layer.

    Returns how many there are."""
    found = 0
    for section in (config, config.get("dflash_config", {}), config.get("transformer_layer_config", {})):
        for name in names & section.keys():
            section[name] = value(section[name], 8 if name == "aux_hidden_state_layer_ids" else 7)
            found += 1
    return found


LAYERS = {"aux_hidden_state_layer_ids", "target_layer_ids"}
BAD = {
    "mask token": ({"mask_token_id"}, lambda x, _: 48, "mask_token must be .* below target_vocab_size 48, got 48"),
    "negative mask token": ({"mask_token_id"}, lambda x, _: -1, "mask_token must be .*, got -1"),
    "block of one": ({"block_size"}, lambda x, _: 1, "block_size must be at least 2.* got 1"),
    "no such layer": (LAYERS, lambda ids, last: [*ids[:2], last + 1],
                      r"\[., ., [89]\] means the states \[2, 4, 9\] of 0 to 8 .* has 8 layers"),
    "final layer": (LAYERS, lambda ids, last: [*ids[:2], last], "after the last of 8 layers"),
    "fewer layers": (LAYERS, lambda ids, _: ids[:2], "fc.weight reads width 48, and 2 states .* have 32"),
    "another width": ({"hidden_size"}, lambda x, _: 32, "hidden_size is 32.* width 16|32 and hidden_size 16|"
                      "target_hidden_size is 16 and hidden_size 32"),
    "another vocabulary": ({"vocab_size"}, lambda x, _: 40, "48.*40|40.*48|t2d must have 40 entries"),
    "heads of another width": ({"head_dim"}, lambda x, _: 4, r"k_proj.weight is \[8, 16\], not \[4, 16\]"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_names_what_does_not_fit(kind, bad, runner, files):
    (name, is_flat), (fields, value, match) = KINDS[kind], BAD[bad]
    some = files(name).flat() if is_flat else files(name)
    assert put(some.config, fields, value) > 0
    refuses(runner, some, match)
