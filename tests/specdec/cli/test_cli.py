import json
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from specdec.__main__ import main
from specdec.drafters import PromptLookupDrafter
from specdec.tiny_pair import FOLDER

torch.set_num_threads(1)  # tiny tensors: waiting threads would cost ten times more on shared cores

PROMPT = "def add(a, b):"
METHODS = {"transformers generate", "transformers assisted", "specdec autoregressive", "specdec speculative", "lookup"}
KINDS = {"code", "prose", "data", "editing", "all"}
FIELDS = {
    "name",
    "kind",
    "temperature",
    "tokens_per_second",
    "tokens_per_round",
    "acceptance_rate",
    "overhead",
    "speedup",
    "identical",
}


@contextmanager
def quiet_transformers():
    """No progress bars; the verbosity that the demo sets is put back."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@pytest.fixture(autouse=True)
def quiet():
    with quiet_transformers():
        yield


def build(layers, seed):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Target and draft as a user would have them: two folders, the tokenizer beside the weights."""
    base = tmp_path_factory.mktemp("pair")
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "target")
    for name, layers, seed in (("target", 2, 0), ("draft", 1, 1)):
        build(layers, seed).save_pretrained(base / name)
        tokenizer.save_pretrained(base / name)
    return base


def generate(folders, *more, draft="draft"):
    return main(
        [
            "generate",
            "--target",
            str(folders / "target"),
            "--draft",
            str(folders / draft),
            "--prompt",
            PROMPT,
            "--max-new-tokens",
            "12",
            "--device",
            "cpu",
            *more,
        ]
    )


def generate_json(folders, capsys, *more, draft="draft"):
    assert generate(folders, "--json", *more, draft=draft) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def greedy_tokens(folders):
    target = LlamaForCausalLM.from_pretrained(folders / "target").eval()
    ids = AutoTokenizer.from_pretrained(folders / "target")(PROMPT, return_tensors="pt").input_ids
    return target.generate(ids, do_sample=False, max_new_tokens=12)[0, ids.shape[1] :].tolist()


def test_greedy_text_is_the_targets_own(folders, capsys):
    tokenizer = AutoTokenizer.from_pretrained(folders / "target")
    assert generate(folders) == 0
    written = capsys.readouterr()
    assert written.out == PROMPT + tokenizer.decode(greedy_tokens(folders)) + "\n"  # not a terminal, so no colour
    assert "tokens per round" in written.err


@pytest.mark.parametrize("draft", ["draft", "target"])
def test_json_holds_text_tokens_authors_stats_and_environment(folders, capsys, draft):
    found = generate_json(folders, capsys, "--num-tokens", "5", draft=draft)
    assert set(found) == {"text", "tokens", "drafted", "stats", "environment"}
    assert found["tokens"] == greedy_tokens(folders)
    assert found["text"] == AutoTokenizer.from_pretrained(folders / "target").decode(
        found["tokens"], skip_special_tokens=True
    )
    assert len(found["drafted"]) == len(found["tokens"]) == found["stats"]["new_tokens"] == 12
    assert found["drafted"].count(False) == found["stats"]["pooled"]["rounds"]  # one token of the target's own a round
    if draft == "target":  # a draft that is the target is always right
        assert found["drafted"] == [True, True, True, True, True, False] * 2


def test_a_seed_repeats_a_sample_and_another_gives_another(folders, capsys):
    options = ("--temperature", "1.5", "--top-k", "50", "--top-p", "0.95", "--seed")
    first, again, other = (generate_json(folders, capsys, *options, seed)["tokens"] for seed in ("3", "3", "4"))
    assert first == again != other


def test_dtype_is_followed(folders, capsys):
    assert len(generate_json(folders, capsys, "--dtype", "bfloat16")["tokens"]) == 12


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--target", "/nowhere/target"], "/nowhere/target"),
        (["--draft", "/nowhere/draft"], "/nowhere/draft"),
        (["--temperature", "-0.5"], "-0.5"),
        (["--num-tokens", "0"], "got 0"),
        (["--max-new-tokens", "0"], "got 0"),
        (["--max-new-tokens", "500"], "500"),
        (["--temperature", "1", "--top-p", "1.5"], "1.5"),
        (["--temperature", "1", "--top-k", "-1"], "-1"),
        (["--dtype", "int7"], "int7"),
        (["--prompt", ""], "empty prompt"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(folders, capsys, options, named):
    assert generate(folders, *options) == 2
    written = capsys.readouterr()
    (line,) = written.err.splitlines()
    assert line.startswith("error: ") and named in line and written.out == ""


@pytest.mark.parametrize("arguments", [[], ["dance"], ["generate", "--target", "x"], ["demo", "--prompts", "many"]])
def test_a_command_line_that_does_not_parse_exits_2(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and "usage: python -m specdec" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option",
    ["--prompts=0", "--prompts=9", "--max-new-tokens=1", "--max-new-tokens=513", "--num-tokens=0", "--num-tokens=17"],
)
def test_the_demo_names_an_option_out_of_range(capsys, option):
    assert main(["demo", option]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    name, value = option.split("=")
    assert line.startswith("error: ") and name in line and line.endswith(f"got {value}")


def lookup_drafter(pair):
    """One more method for the demo below."""
    assert pair.target is not None
    return PromptLookupDrafter()


@pytest.mark.parametrize(
    "place", ["x", "x=nowhere.to_be_found:f", "x=specdec:no_such_function", "specdec speculative=specdec:load_model"]
)
def test_the_demo_names_a_drafter_that_is_none(capsys, place):
    assert main(["demo", "--drafter", place]) == 2
    assert place in capsys.readouterr().err


def test_help_in_a_fresh_process(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "specdec", "--help"], cwd=Path(__file__).parents[3], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stderr == ""
    assert "demo" in done.stdout and "generate" in done.stdout


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """What the demo printed, line by line, and the plot it wrote."""
    plot = tmp_path_factory.mktemp("demo") / "plot.png"
    with quiet_transformers(), pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda *values, **_: printed.append(" ".join(map(str, values))))
        more = ["--drafter", f"lookup={__name__}:lookup_drafter"]
        assert (
            main(["demo", "--prompts", "1", "--max-new-tokens", "8", "--num-tokens", "3", "--plot", str(plot), *more])
            == 0
        )
    return "\n".join(printed).split("\n"), plot


def rows_of(demo):
    return json.loads(demo[0][-1])["methods"]


def test_the_demo_ends_with_a_line_of_json_for_every_method_kind_and_temperature(demo):
    found = json.loads(demo[0][-1])
    assert set(found) == {"methods", "pooled_speedup_over", "costs", "environment"} and all(
        cost > 0 for cost in found["costs"].values()
    )
    keys = [(row["name"], row["kind"], row["temperature"]) for row in found["methods"]]
    assert len(keys) == 5 * 5 * 2 and set(keys) == {(m, k, t) for m in METHODS for k in KINDS for t in (0, 1)}
    assert all(set(row) >= FIELDS for row in found["methods"])


def test_the_demo_finds_every_greedy_output_identical_and_claims_nothing_about_samples(demo):
    assert [row["identical"] for row in rows_of(demo)] == [
        True if row["temperature"] == 0 else None for row in rows_of(demo)
    ]


def test_the_demos_baseline_is_our_own_autoregressive_decoding(demo):
    baseline = [row for row in rows_of(demo) if row["name"] == "specdec autoregressive"]
    assert (
        {row["speedup"] for row in baseline}
        == {row["overhead"] for row in baseline}
        == {row["tokens_per_round"] for row in baseline}
        == {1}
    )
    assert {row["acceptance_rate"] for row in baseline} == {None}


def test_the_demos_numbers_are_possible(demo):
    for row in rows_of(demo):
        assert row["tokens_per_second"] > 0 and row["speedup"] > 0
        if row["name"].startswith("transformers"):
            assert row["tokens_per_round"] is row["acceptance_rate"] is row["overhead"] is None
        elif row["name"] == "specdec speculative":
            assert 1 <= row["tokens_per_round"] <= 4 and 0 <= row["acceptance_rate"] <= 1 and row["overhead"] > 0


def test_the_demo_prints_its_text_and_table_and_draws_its_plot(demo):
    lines, plot = demo
    text = "\n".join(lines)
    assert "\x1b" not in text and text.count("tokens written by the draft") == 2 and f"plot: {plot}" in lines
    header = next(i for i, line in enumerate(lines) if line.startswith("method "))
    table = lines[header : header + 2 + 5 * 5 * 2]
    assert table[0].endswith("identical to target greedy") and set(table[1]) <= set("- ")
    assert [line.split("  ")[0] for line in table[2:]] == [row["name"] for row in rows_of(demo)]
    assert [line.split()[-1] for line in table[2:]] == ["yes"] * 25 + ["-"] * 25
    assert plot.read_bytes().startswith(b"\x89PNG") and plot.stat().st_size > 10_000


def test_a_text_of_one_round_has_no_overhead_and_prints(capsys):
    """`--max-new-tokens 1` ends in its first round, which holds the prefill and is therefore no measure of a round."""
    arguments = [
        "generate",
        "--target",
        str(FOLDER / "target"),
        "--draft",
        str(FOLDER / "draft"),
        "--prompt",
        "def f",
        "--max-new-tokens",
        "1",
    ]
    assert main(arguments) == 0
    assert "1.00 tokens per round" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value"),
    [("--temperature", "nan"), ("--temperature", "inf"), ("--device", "nonsense"), ("--max-new-tokens", "0")],
)
def test_bad_options_are_named_before_a_model_is_loaded(option, value, capsys):
    assert main(["generate", "--target", "absent", "--draft", "absent", "--prompt", "x", option, value]) == 2
    assert value in capsys.readouterr().err
