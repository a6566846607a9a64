"""The command line that trains heads: what it uploads, and what is left when it cannot."""

import json
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from matplotlib import pyplot
from transformers import AutoTokenizer, BloomConfig, BloomForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

import medusa
from medusa.cli import calibrate
from medusa.cli import train as command
from medusa.heads import MedusaHeads
from medusa.plots import plot_loss
from specdec.loading import load_model
from specdec.report.training_plots import plot_speed
from specdec.tiny_pair import FOLDER


def train(arguments: list[str]) -> None:
    """The command, whose errors are raised."""
    command.run(command.parser().parse_args(arguments))


@pytest.fixture
def arguments(tmp_path):
    """A short run over a few texts; with --joint-steps it is Medusa-2."""
    data = tmp_path / "data.jsonl"
    data.write_text(
        "".join(json.dumps({"text": f"def function_{n}(value):\n    return value + {n}\n"}) + "\n" for n in range(6))
    )
    return [
        "--model",
        str(FOLDER / "draft"),
        "--tokenizer",
        str(FOLDER / "target"),
        "--data",
        str(data),
        "--output",
        str(tmp_path / "run"),
        "--heads",
        "2",
        "--output-layer",
        "shared",
        "--length",
        "32",
        "--steps",
        "2",
        "--batch",
        "2",
        "--dtype",
        "float32",
    ]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder that stands for the hub, where repositories without an owner are ours: a folder each, in the order in
    which they were uploaded to.
    """
    folder, uploads = tmp_path / "hub", []

    def create_repo(api, repo_id, exist_ok=False):
        assert exist_ok
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"us/{repo_id}")

    def upload_folder(api, *, repo_id, folder_path):
        uploads.append(repo_id)
        shutil.copytree(folder_path, folder / repo_id, dirs_exist_ok=True)
        return f"commit of {repo_id}"

    def push_to_hub(self, repo_id):
        uploads.append(repo_id)
        self.save_pretrained(folder / repo_id)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(PreTrainedModel, "push_to_hub", push_to_hub)
    monkeypatch.setattr(PreTrainedTokenizerBase, "push_to_hub", push_to_hub)
    return SimpleNamespace(folder=folder, uploads=uploads)


def test_medusa_2_uploads_the_adapted_model_with_its_heads(arguments, hub, tmp_path, capsys):
    train([*arguments, "--joint-steps", "1", "--push-to-hub", "heads"])
    assert hub.uploads == [
        "us/heads-model",
        "us/heads-model",
        "us/heads",
    ]  # the heads last: they never name a model that is not there
    assert "commit of us/heads" in capsys.readouterr().out
    heads, card = MedusaHeads.from_pretrained(hub.folder / "us/heads"), (hub.folder / "us/heads/README.md").read_text()
    assert heads.config.base_model == "us/heads-model" and heads.config.base_revision is None
    assert "base_model: us/heads-model\n" in card and 'specdec.load_model("us/heads-model")' in card
    adapted, ours, before = (
        load_model(folder) for folder in (hub.folder / "us/heads-model", tmp_path / "run/model", FOLDER / "draft")
    )
    same = lambda one, other: all(
        torch.equal(a, b.to(a.dtype)) for a, b in zip(one.parameters(), other.parameters(), strict=True)
    )
    assert same(adapted, ours) and not same(adapted, before)
    assert (
        AutoTokenizer.from_pretrained(hub.folder / "us/heads-model").get_vocab()
        == AutoTokenizer.from_pretrained(FOLDER / "target").get_vocab()
    )
    assert MedusaHeads.from_pretrained(tmp_path / "run").config.base_model == str(
        tmp_path / "run/model"
    )  # what is here names what is here


def test_training_goes_on_from_heads_that_are_there(arguments, tmp_path):
    """They keep their number and layers; a rate near zero leaves their weights as they were."""
    start = tmp_path / "start"
    model = load_model(FOLDER / "draft", torch.float32)
    given = MedusaHeads.for_model(model, 3, 2, "shared")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in given.parameters():
            parameter.copy_(0.1 * torch.randn_like(parameter))
    given.save_pretrained(start)
    train([*arguments, "--start", str(start), "--lr", "1e-9"])
    heads = MedusaHeads.from_pretrained(tmp_path / "run")
    assert (heads.config.num_heads, heads.config.num_layers, heads.config.base_model) == (3, 2, str(FOLDER / "draft"))
    for name, weight in heads.state_dict().items():
        torch.testing.assert_close(weight, given.state_dict()[name], rtol=0, atol=1e-7)
    MedusaHeads(medusa.MedusaConfig(2, 1, 8, 32), torch.nn.Linear(8, 32, bias=False)).save_pretrained(start)
    with pytest.raises(ValueError, match=r"are for a model of \[V, H\] \(32, 8\), this one has \(4096, 128\)"):
        train([*arguments, "--output", str(tmp_path / "other"), "--start", str(start)])


@pytest.mark.parametrize("joint", [False, True])
def test_the_end_tells_speed_picture_folder_and_the_next_command(joint, arguments, tmp_path, capsys):
    train([*arguments, *(["--joint-steps", "1"] if joint else [])])
    run, out = tmp_path / "run", capsys.readouterr().out.splitlines()
    device, arithmetic = ("cuda", "bfloat16") if torch.cuda.is_available() else ("cpu", "float32")
    assert (
        f"1 process on {device}, the model in float32, the heads in float32 with the arithmetic of {arithmetic}" in out
    )
    assert json.loads(out[-4])["tokens_per_second"] > 0
    assert out[-3:-1] == [f"picture: {run / 'training.png'}", f"heads: {run}"]
    following = shlex.split(out[-1].partition("): ")[2])
    assert following[:4] == ["specdec", "calibrate", "--kind", "medusa"]
    options = calibrate.parser().parse_args(following[4:])
    assert options.model == (str(run / "model") if joint else str(FOLDER / "draft"))
    assert (options.heads, options.data, options.tokenizer) == (
        str(run),
        Path("HELD_OUT.jsonl"),
        str(FOLDER / "target"),
    )
    assert (run / "training.png").stat().st_size > 10_000
    assert "![loss, accuracies and tokens/s over the steps](training.png)" in (run / "README.md").read_text()


def test_the_picture_shows_loss_accuracies_and_speed(arguments, tmp_path):
    train([*arguments, "--log-every", "1"])
    records = json.loads((tmp_path / "run/log.json").read_text())
    figure, axes = pyplot.subplots(1, 2)
    lines = {line.get_label(): line.get_ydata() for line in plot_loss(axes[0], records).lines}
    assert list(lines) == ["all, weighted", "head 0", "head 1"]
    assert list(lines["all, weighted"]) == [record["loss"] for record in records]
    assert list(lines["head 1"]) == [record["head_1_loss"] for record in records]
    (speed,) = plot_speed(axes[1], records).lines
    assert list(speed.get_ydata()) == [record["tokens_per_second"] for record in records]
    pyplot.close(figure)


def test_without_matplotlib_a_line_says_so_and_the_card_shows_no_picture(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    train(arguments)
    said = "matplotlib is not installed, so nothing was drawn (pip install 'specdec-lab[demo]')"
    assert said in capsys.readouterr().out.splitlines()
    assert not list((tmp_path / "run").glob("*.png")) and "![" not in (tmp_path / "run/README.md").read_text()


@pytest.mark.parametrize("more", [[], ["--self-distil"], ["--joint-steps", "1"]], ids=" ".join)
def test_a_model_that_decoding_refuses_is_not_trained(more, arguments, tmp_path, monkeypatch):
    """Bloom adds a position bias to its own attention. Nothing is written, by the model or of heads."""
    config = BloomConfig(vocab_size=4096, hidden_size=32, n_layer=2, n_head=4)
    BloomForCausalLM(config).save_pretrained(tmp_path / "bloom")
    monkeypatch.setattr(command, "train_medusa", lambda *_: pytest.fail("trained"))
    with pytest.raises(SystemExit, match="^error: nothing is trained.*BloomForCausalLM") as refusal:
        train([*arguments, "--model", str(tmp_path / "bloom"), *more])
    assert "\n" not in str(refusal.value)
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file()]


def test_medusa_1_uploads_the_heads_alone(arguments, hub, tmp_path):
    train([*arguments, "--push-to-hub", "someone/heads"])
    assert hub.uploads == ["someone/heads"]
    picture = (hub.folder / "someone/heads/training.png").read_bytes()
    assert picture == (tmp_path / "run/training.png").read_bytes()  # the card shows it there too
    assert MedusaHeads.from_pretrained(hub.folder / "someone/heads").config.base_model == str(FOLDER / "draft")


def test_an_upload_that_fails_loses_nothing_and_the_same_command_repeats_it(arguments, hub, tmp_path, monkeypatch):
    arguments += ["--joint-steps", "1", "--push-to-hub", "heads"]

    def refused(*_, **__):
        raise ConnectionError("no hub")

    with monkeypatch.context() as broken, pytest.raises(ConnectionError, match="no hub"):
        broken.setattr(huggingface_hub.HfApi, "create_repo", refused)
        train(arguments)
    run = tmp_path / "run"
    kept = [
        run / name for name in ("config.json", "medusa_lm_head.safetensors", "README.md", "accuracies.json", "log.json")
    ]
    before = {
        path: path.read_bytes() for path in [*kept, run / "model/model.safetensors", run / "model/tokenizer.json"]
    }
    assert not hub.uploads and "guesses the token" in (run / "README.md").read_text()

    steps = []
    true_backward = medusa.training._backward
    monkeypatch.setattr(medusa.training, "_backward", lambda *given: steps.append(1) or true_backward(*given))
    train(arguments)
    assert not steps and hub.uploads == ["us/heads-model", "us/heads-model", "us/heads"]
    assert {path: path.read_bytes() for path in before} == before
