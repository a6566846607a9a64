"""What people try by mistake, from Python and from the shell: each ends in one clear sentence that names the value."""

import json

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForSequenceClassification

import specdec
from medusa import MedusaDrafter, MedusaHeads
from specdec.__main__ import main
from specdec.tiny_pair import FOLDER, load_tiny_pair

PAIR = load_tiny_pair()
IDS = PAIR.tokenizer("def mean(values):", return_tensors="pt").input_ids
GENERATOR = specdec.SpeculativeGenerator(PAIR.target, specdec.ModelDrafter(PAIR.draft, 3))
GENERATOR.generate(IDS, max_new_tokens=1)  # makes the cache
TRAINED = "eagle3, peagle, mtp, dflash, dspark, medusa"
TARGET, DRAFT = ("--target", str(FOLDER / "target")), ("--drafter", str(FOLDER / "draft"))


CALLS = {  # what is tried: (the call, what the sentence holds)
    "a text as prompt": (lambda: GENERATOR.generate("def f"), "input_ids must be an int64 or int32 tensor"),
    "a tokenizer's output": (
        lambda: GENERATOR.generate(PAIR.tokenizer("a", return_tensors="pt")),
        "generate(**inputs)",
    ),
    "a tokenizer's output as lists": (lambda: GENERATOR.generate(**PAIR.tokenizer("a")), "got list"),
    "a prompt without batch": (lambda: GENERATOR.generate(IDS[0]), "input_ids[None] is a batch of one"),
    "max_tokens": (lambda: GENERATOR.generate(IDS, max_tokens=5), "is it max_"),
    "max_length": (lambda: GENERATOR.generate(IDS, max_length=2), "max_length=2 leaves no room"),
    "stop words": (lambda: GENERATOR.generate(IDS, stop=["\n"]), "stop_strings, with tokenizer"),
    "stop strings without a tokenizer": (
        lambda: GENERATOR.generate(IDS, stop_strings=["\n"]),
        "stop_strings=['\\n'] needs generate(tokenizer=…)",
    ),
    "beams": (lambda: GENERATOR.generate(IDS, num_beams=4), "num_beams=4 is not supported here; only 1"),
    "guidance": (lambda: GENERATOR.generate(IDS, guidance_scale=1.5), "guidance_scale=1.5 is not supported"),
    "contrastive search": (lambda: GENERATOR.generate(IDS, penalty_alpha=0.6), "penalty_alpha=0.6 is not supported"),
    "attentions": (lambda: GENERATOR.generate(IDS, output_attentions=True), "output_attentions=True is not supported"),
    "hidden states": (
        lambda: GENERATOR.generate(IDS, output_hidden_states=True),
        "output_hidden_states=True is not supported",
    ),
    "greedy copies": (lambda: GENERATOR.generate(IDS, num_return_sequences=2), "needs do_sample=True"),
    "an assistant": (lambda: GENERATOR.generate(IDS, assistant_model=PAIR.draft), "ModelDrafter(assistant_model)"),
    "transformers' lookup": (
        lambda: GENERATOR.generate(IDS, prompt_lookup_num_tokens=3),
        "prompt_lookup_num_tokens=3 is not supported",
    ),
    "a streamer's class": (lambda: GENERATOR.generate(IDS, streamer="text"), "streamer must have the methods put"),
    "temperature 0": (
        lambda: GENERATOR.generate(IDS, do_sample=True, temperature=0.0),
        "use do_sample=False for greedy decoding",
    ),
    "top_p in percent": (lambda: GENERATOR.generate(IDS, do_sample=True, top_p=90), "top_p must lie in (0, 1], got 90"),
    "half a top_k": (lambda: GENERATOR.generate(IDS, do_sample=True, top_k="50"), "top_k must be a number"),
    "a mask of floats in half": (
        lambda: GENERATOR.generate(IDS, torch.ones(1, 1)),
        "attention_mask has shape [1, 1], input_ids",
    ),
    "a config's name": (lambda: GENERATOR.generate(IDS, generation_config="greedy"), "must be a GenerationConfig"),
    "a config of beams": (
        lambda: GENERATOR.generate(IDS, generation_config=GenerationConfig(num_beams=2)),
        "num_beams=2 is not supported",
    ),
    "embeddings": (lambda: GENERATOR.generate(IDS, inputs_embeds=torch.ones(1, 4, 8)), "inputs_embeds cannot be used"),
    "labels": (lambda: GENERATOR.generate(IDS, labels=IDS), "labels cannot be used"),
    "a seed as text": (lambda: GENERATOR.generate(IDS, do_sample=True, seed="0"), "seed must be an integer"),
    "no drafter but a model": (
        lambda: specdec.SpeculativeGenerator(PAIR.target, PAIR.draft),
        "specdec.ModelDrafter(model)",
    ),
    "a drafter's class": (
        lambda: specdec.SpeculativeGenerator(PAIR.target, specdec.PromptLookupDrafter),
        "drafter must be a Drafter",
    ),
    "a target's path": (
        lambda: specdec.SpeculativeGenerator(str(FOLDER / "target"), None),
        "specdec.load_model reads one",
    ),
    "a rule's name": (
        lambda: specdec.SpeculativeGenerator(PAIR.target, None, rule="greedy"),
        "rule must be an acceptance rule",
    ),
    "a tree's name": (
        lambda: specdec.SpeculativeGenerator(PAIR.target, GENERATOR.drafter, tree="best"),
        'tree is a TokenTree, "auto" or None',
    ),
    "a mode that is none": (
        lambda: specdec.SpeculativeGenerator(PAIR.target, None, mode="fast"),
        "mode must be one of auto",
    ),
    "a dtype of the cache that is none": (
        lambda: specdec.SpeculativeGenerator(PAIR.target, None, kv_dtype="int4"),
        "int4",
    ),
    "a draft length of zero": (lambda: specdec.ModelDrafter(PAIR.draft, 0), "at least 1, got 0"),
    "the sampling rule with greedy decoding": (
        lambda: specdec.SpeculativeGenerator(PAIR.target, GENERATOR.drafter, rule=specdec.rejection).generate(IDS),
        "rejection does not go with do_sample=False",
    ),
    "heads of another model": (
        lambda: specdec.SpeculativeGenerator(PAIR.draft, MedusaDrafter(MedusaHeads.for_model(PAIR.target, 2))),
        "the heads",
    ),
    "a dtype that is none": (lambda: specdec.load_model(FOLDER / "target", "float99"), "'float99'"),
    "a folder without a model": (lambda: specdec.load_model(FOLDER), "has no config.json"),
}
COMMANDS = {
    "no command": ([], "a command is needed"),
    "a misspelt command": (["benchmark"], "there is no command 'benchmark'"),
    "no target": (["generate", *TARGET[:1], "absent/", "--prompt", "x"], "model directory absent does not exist"),
    "an empty prompt": (["generate", *TARGET, "--prompt", ""], "empty prompt"),
    "a prompt file that is not there": (["generate", *TARGET, "--prompt-file", "absent.txt"], "absent.txt"),
    "a chat without a template": (["generate", *TARGET, "--prompt", "x", "--chat"], "no chat template"),
    "a template's option without a chat": (
        ["generate", *TARGET, "--prompt", "x", "--template-option", "a=1"],
        "--template-option goes with --chat",
    ),
    "a kind that is none": (
        ["generate", *TARGET, "--prompt", "x", "--drafter", "eagle9:path=x/"],
        "there is no kind eagle9",
    ),
    "an option that is none": (
        ["generate", *TARGET, "--prompt", "x", "--drafter", "lookup:n=4"],
        "lookup has no option n; there are length",
    ),
    "an option's words": (
        ["generate", *TARGET, "--prompt", "x", "--drafter", "lookup:length=four"],
        "length must be of type int, got 'four'",
    ),
    "layers that are not given": (
        ["generate", *TARGET, "--prompt", "x", "--drafter", "early-exit"],
        "missing 1 required positional argument: 'layers'",
    ),
    "a lookup with a model": (
        ["generate", *TARGET, "--prompt", "x", "--drafter", "lookup:path=x"],
        "path=x means nothing to a drafter without a model",
    ),
    "a function that is none": (
        ["generate", *TARGET, "--prompt", "x", "--drafter", "specdec:no_such_function"],
        "no_such_function",
    ),
    "a function that makes no drafter": (
        ["generate", *TARGET, "--prompt", "x", "--drafter", "builtins:repr"],
        "drafter must be a Drafter",
    ),
    "a negative temperature": (["generate", *TARGET, "--prompt", "x", "--temperature", "-1"], "got -1"),
    "an infinite temperature": (["generate", *TARGET, "--prompt", "x", "--temperature", "inf"], "got inf"),
    "no tokens": (["generate", *TARGET, "--prompt", "x", "--max-new-tokens", "0"], "at least 1, got 0"),
    "a draft of no tokens": (["generate", *TARGET, *DRAFT, "--prompt", "x", "--num-tokens", "0"], "got 0"),
    "more tokens than positions": (
        ["generate", *TARGET, "--prompt", "x", "--max-new-tokens", "99999"],
        "99999 exceed the model's",
    ),
    "top-p above one": (["generate", *TARGET, "--prompt", "x", "--temperature", "1", "--top-p", "1.5"], "got 1.5"),
    "a dtype of the command": (["generate", *TARGET, "--prompt", "x", "--dtype", "int7"], "got int7"),
    "a device that is none": (["generate", *TARGET, "--prompt", "x", "--device", "tpu9"], "device 'tpu9' cannot"),
    "an unknown mode": (
        ["generate", *TARGET, "--prompt", "x", "--device", "cpu", "--mode", "fast"],
        "mode must be one",
    ),
    "a bench without a drafter": (["bench", *TARGET], "at least one --drafter"),
    "a bench of no file": (["bench", *TARGET, *DRAFT, "--prompts", "absent.jsonl"], "absent.jsonl"),
    "a plot nowhere": (["bench", *TARGET, *DRAFT, "--plot", "absent/plot.png"], "the folder of absent/plot.png"),
    "a result that is none": (["bench", "--from", str(FOLDER / "record.json")], "must be of schema"),
    "a trainer that is none": (["train", "--kind", "eagle9"], f"--kind must be one of {TRAINED}, got eagle9"),
    "no trainer": (["train", "--model", "absent/"], f"--kind must be one of {TRAINED}, got None"),
    "data that are not there": (
        [
            "train",
            "--kind",
            "medusa",
            "--model",
            str(FOLDER / "target"),
            "--data",
            "absent.jsonl",
            "--output",
            "absent",
        ],
        "absent.jsonl",
    ),
    "a dtype of a training that is none": (
        [
            "train",
            "--kind",
            "eagle3",
            "--model",
            "absent/",
            "--data",
            "absent.jsonl",
            "--output",
            "absent",
            "--dtype",
            "int7",
        ],
        "--dtype must be one of auto, float32, bfloat16, float16, got int7",
    ),
    "heads that are not there": (
        ["calibrate", "--model", str(FOLDER / "target"), "--heads", "absent/", "--data", "absent.jsonl"],
        "absent",
    ),
    "chats that are not there": (["convert", "absent.json", "out.jsonl"], "absent.json"),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_by_mistake_is_one_sentence(name):
    call, said = CALLS[name]
    with pytest.raises((ValueError, TypeError, OSError)) as error:
        call()
    assert said in str(error.value)
    assert GENERATOR.target.cache.free_pages == GENERATOR.target.cache.num_pages


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_by_mistake_is_one_line_and_status_2(name, capsys, tmp_path, monkeypatch):
    arguments, said = COMMANDS[name]
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    written = capsys.readouterr()
    last = written.err.splitlines()[-1]
    assert last.startswith("error: ") and said in last
    assert written.out == "" and "Traceback" not in written.err
    assert not list(tmp_path.iterdir()), "nothing is written"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["generate", *TARGET], "--prompt"), (["bench", "--repeats", "many"], "invalid int value: 'many'"),
     (["convert"], "source, result"), (["train", "--kind", "medusa", "--model", "x"], "--data, --output"),
     (["demo", "--prompt", "1", "--colour"], "unrecognized arguments: --colour")],
)  # fmt: skip
def test_a_command_line_that_does_not_parse_is_one_line_and_status_2(arguments, said, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and line.startswith("error: ") and said in line and line.endswith("--help")


@pytest.mark.parametrize("command", ["demo", "generate", "bench", "audit", "train", "calibrate", "convert", "info"])
def test_help_shows_every_option_with_its_default(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and shown.startswith(f"usage: specdec {command}")
    assert command in ("convert", "info") or "default" in shown


def test_a_drafter_that_is_neither_a_folder_nor_a_kind_is_named_at_once(capsys):
    assert main(["generate", *TARGET, "--prompt", "x", "--drafter", "eagle"]) == 2
    assert "no folder and no kind eagle; kinds: model, dynamic, block, eagle3, lookup" in capsys.readouterr().err


def test_a_folder_without_a_tokenizer_is_named(capsys):
    assert main(["generate", "--target", str(FOLDER / "draft"), "--prompt", "x"]) == 2
    assert "draft has no tokenizer that can be read; --tokenizer names" in capsys.readouterr().err.splitlines()[-1]
    tokenizer = ("--tokenizer", str(FOLDER / "target"))
    given = ("--target", str(FOLDER / "draft"), *tokenizer, "--prompt", "x", "--max-new-tokens", "4")
    assert main(["generate", *given, "--device", "cpu"]) == 0


def test_a_file_of_prompts_names_the_line_that_is_wrong(tmp_path, capsys):
    long = json.dumps({"text": 1, "more": "x" * 9999})
    for text, said in (('{"prompt": "a"}\n{oops', "p.jsonl:2 is no JSON"), (long, "got an object with text, more")):
        (tmp_path / "p.jsonl").write_text(text)
        assert main(["bench", *TARGET, *DRAFT, "--prompts", str(tmp_path / "p.jsonl")]) == 2
        assert said in capsys.readouterr().err.splitlines()[-1]


def test_a_classifier_is_no_target():
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    with pytest.raises((ValueError, TypeError), match="LlamaForSequenceClassification"):
        specdec.SpeculativeGenerator(LlamaForSequenceClassification(LlamaConfig(**sizes)).eval(), None)
