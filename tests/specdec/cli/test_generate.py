"""`specdec generate`: the text is the target's own, whatever drafts; JSON; chats; files."""

import io
import json

import pytest
from transformers import AutoTokenizer, LlamaForCausalLM

from medusa import MedusaHeads
from specdec.__main__ import main
from specdec.drafters.block import saving as block_saving
from specdec.drafters.eagle3.saving import save_drafter
from specdec.tiny_pair import FOLDER
from tests.learned import block_model, eagle3_model

PROMPT = "def add(a, b):"


def generate(folders, *more, prompt=("--prompt", PROMPT)):
    target = ("--target", str(folders / "target"), "--max-new-tokens", "12", "--device", "cpu")
    return main(["generate", *target, *prompt, *more])


def generate_json(folders, capsys, *more, **options):
    assert generate(folders, "--json", *more, **options) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def greedy_tokens(folders, text=PROMPT, special=True):
    target = LlamaForCausalLM.from_pretrained(folders / "target").eval()
    tokenizer = AutoTokenizer.from_pretrained(folders / "target")
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=special).input_ids
    return target.generate(ids, do_sample=False, max_new_tokens=12)[0, ids.shape[1] :].tolist()


def test_greedy_text_is_the_targets_own(folders, capsys):
    tokenizer = AutoTokenizer.from_pretrained(folders / "target")
    assert generate(folders, "--drafter", str(folders / "draft")) == 0
    written = capsys.readouterr()
    assert written.out == PROMPT + tokenizer.decode(greedy_tokens(folders)) + "\n"  # not a terminal, so no colour
    assert "tokens per round" in written.err and "acceptance rate" in written.err


def own_drafter(target, length=2):
    """What `--drafter MODULE:FUNCTION` calls below."""
    from specdec import PromptLookupDrafter

    assert target.vocab_size == 4096
    return PromptLookupDrafter(int(length))


@pytest.mark.parametrize(
    "spec",
    [None, "{draft}", "{draft}:num_tokens=3", "model:path={draft},num_tokens=2", "dynamic:path={draft},depth=2",
     "lookup", "lookup:length=4,max_ngram=2", "early-exit:layers=1", "medusa:path={heads}", "{heads}",
     "{eagle3}", "{eagle3}:num_tokens=2", "eagle3:path={eagle3},nodes=6,depth=2,width=3",
     "{block}:num_tokens=2", "block:path={block},nodes=6,depth=2,children=3",
     f"{__name__}:own_drafter", f"{__name__}:own_drafter:length=4"],
)  # fmt: skip
def test_every_way_to_name_a_drafter_gives_the_targets_text(folders, tmp_path, capsys, spec):
    target = LlamaForCausalLM.from_pretrained(folders / "target").eval()
    places = dict(draft=folders / "draft") | {name: tmp_path / name for name in ("heads", "eagle3", "block")}
    MedusaHeads.for_model(target, 2).save_pretrained(places["heads"])
    save_drafter(eagle3_model(target, target_layers=(0, 1)), places["eagle3"], "sglang")
    shared = dict(own_embeddings=False, output="target", target_layers=(0, 1))
    block_saving.save_drafter(block_model(target, reduced=False, **shared), places["block"])
    given = () if spec is None else ("--drafter", spec.format(**places))
    found = generate_json(folders, capsys, *given)
    assert found["tokens"] == greedy_tokens(folders)
    shapes = found["stats"]["pooled"]["shapes"]
    assert (set(shapes) == {"plain"}) == (spec is None), shapes


def test_heads_are_a_drafter_too(folders, tmp_path, capsys):
    target = LlamaForCausalLM.from_pretrained(folders / "target").eval()
    MedusaHeads.for_model(target, 2).save_pretrained(tmp_path)
    assert generate_json(folders, capsys, "--heads", str(tmp_path))["tokens"] == greedy_tokens(folders)


@pytest.mark.parametrize("draft", ["draft", "target"])
def test_json_holds_text_tokens_authors_stats_and_environment(folders, capsys, draft):
    found = generate_json(folders, capsys, "--drafter", str(folders / draft), "--num-tokens", "5")
    assert set(found) == {"text", "tokens", "drafted", "stats", "environment"}
    assert found["tokens"] == greedy_tokens(folders)
    tokenizer = AutoTokenizer.from_pretrained(folders / "target")
    assert found["text"] == tokenizer.decode(found["tokens"], skip_special_tokens=True)
    assert len(found["drafted"]) == len(found["tokens"]) == found["stats"]["new_tokens"] == 12
    assert found["drafted"].count(False) == found["stats"]["pooled"]["rounds"]  # one token of the target's own a round
    if draft == "target":  # a draft that is the target is always right
        assert found["drafted"] == [True, True, True, True, True, False] * 2


def test_json_goes_to_a_file(folders, tmp_path, capsys):
    assert generate(folders, "--json", str(tmp_path / "out.json")) == 0
    assert json.loads((tmp_path / "out.json").read_text())["tokens"] == greedy_tokens(folders)
    assert capsys.readouterr().out == ""


def test_a_seed_repeats_a_sample_and_another_gives_another(folders, capsys):
    options = ("--drafter", str(folders / "draft"), "--temperature", "1.5", "--top-k", "50", "--top-p", "0.95")
    first, again, other = (generate_json(folders, capsys, *options, "--seed", s)["tokens"] for s in ("3", "3", "4"))
    assert first == again != other


def test_dtype_is_followed(folders, capsys):
    assert len(generate_json(folders, capsys, "--dtype", "bfloat16")["tokens"]) == 12


@pytest.mark.parametrize(
    ("options", "text"),
    [(("--chat",), "<|user|>\nHi<|end|>\n<|assistant|>\n"),
     (("--system", "Be brief."), "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\n"),
     (("--chat", "--template-option", "quiet=true"), "<|user|>\nHi<|end|>\n<|assistant|>\n<quiet>"),
     (("--chat-template", "own.jinja"), "Q: Hi\nA:")],
)  # fmt: skip
def test_chats_go_through_the_template(folders, tmp_path, monkeypatch, capsys, options, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.jinja").write_text("Q: {{ messages[0].content }}\nA:")
    found = generate_json(folders, capsys, *options, prompt=("--prompt", "Hi"))
    assert found["tokens"] == greedy_tokens(folders, text, special=False)


def test_a_prompt_comes_from_a_file_or_standard_input(folders, tmp_path, monkeypatch, capsys):
    (tmp_path / "prompt.txt").write_text(PROMPT)
    from_file = generate_json(folders, capsys, prompt=("--prompt-file", str(tmp_path / "prompt.txt")))
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT))
    from_input = generate_json(folders, capsys, prompt=("--prompt-file", "-"))
    assert from_file["tokens"] == from_input["tokens"] == greedy_tokens(folders)


def test_a_text_of_one_round_has_no_overhead_and_prints(capsys):
    """`--max-new-tokens 1` ends in its first round, which holds the prefill and is therefore no measure of a round."""
    pair = ("--target", str(FOLDER / "target"), "--drafter", str(FOLDER / "draft"))
    assert main(["generate", *pair, "--prompt", "def f", "--max-new-tokens", "1"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("overhead") and line.split()[-1] == "-" for line in lines)
