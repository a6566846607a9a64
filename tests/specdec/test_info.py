import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import transformers

from medusa import MedusaHeads
from specdec.cli.info import COMMAND
from specdec.drafters.eagle3.saving import save_drafter
from specdec.info import commit, conflicts, environment
from tests.families import build
from tests.learned import eagle3_model

ROOT = Path(__file__).parents[2]


def run_info(folder, *paths):
    """`python -m specdec info` in `folder`, with `paths` before the repository on the module path."""
    search = os.pathsep.join(map(str, [*paths, ROOT]))
    return subprocess.run(
        [sys.executable, "-m", "specdec", "info"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": search},
        capture_output=True,
        text=True,
    )


def test_environment_names_versions_and_device():
    found = environment()
    assert set(found) == {"specdec", "python", "torch", "transformers", "numpy", "triton", "device", "threads"}
    assert found["torch"] == torch.__version__ and found["transformers"] == transformers.__version__
    assert found["python"] == ".".join(map(str, sys.version_info[:3])) and found["threads"] == torch.get_num_threads()
    assert json.loads(json.dumps(found)) == found


def test_the_commit_is_that_of_the_checkout_and_says_whether_files_differ(tmp_path, monkeypatch):
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert (commit() or "").rstrip("+") == head
    monkeypatch.setattr("specdec.info.__file__", str(ROOT / "absent.py"))  # as in an environment inside a checkout
    assert commit() is None
    monkeypatch.setattr("specdec.info.__file__", str(tmp_path / "info.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert commit() is None


def test_here_nothing_is_in_the_way(capsys):
    assert conflicts() == []
    assert COMMAND([]) == 0
    assert json.loads(capsys.readouterr().out) == environment() | {"conflicts": []}


def test_a_foreign_package_of_one_of_our_names_is_named_and_exits_1(tmp_path):
    foreign = tmp_path / "elsewhere" / "medusa"
    foreign.mkdir(parents=True)
    (foreign / "__init__.py").write_text("")
    done = run_info(tmp_path, foreign.parent)
    assert done.returncode == 1, done.stderr
    (sentence,) = json.loads(done.stdout)["conflicts"]
    assert "`import medusa`" in sentence and str(foreign) in sentence and str(ROOT) in sentence


def test_a_foreign_attention_package_is_named_at_import(tmp_path):
    """It would be imported in place of ours; the error says where it lies instead of failing somewhere inside."""
    (tmp_path / "attention").mkdir()
    (tmp_path / "attention" / "__init__.py").write_text("")
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", "import specdec"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode != 0 and str(tmp_path / "attention") in done.stderr and "specdec-lab" in done.stderr


def test_a_models_folder_is_explained_or_refused(tmp_path, capsys):
    build("llama").save_pretrained(tmp_path / "llama")
    assert COMMAND(["--model", str(tmp_path / "llama")]) == 0
    said = capsys.readouterr().out
    assert "rotation" in said and "LlamaRMSNorm" in said and "up to the model's 160 positions" in said
    build("bloom").save_pretrained(tmp_path / "bloom")
    assert COMMAND(["--model", str(tmp_path / "bloom")]) == 1
    assert "BloomForCausalLM" in capsys.readouterr().err


def test_a_drafter_is_described_or_refused(tmp_path, capsys):
    model = build("llama")
    model.save_pretrained(tmp_path / "llama")
    target = ("--model", str(tmp_path / "llama"), "--drafter")
    save_drafter(eagle3_model(model), tmp_path / "drafter", num_tokens=4)
    assert COMMAND([*target, str(tmp_path / "drafter")]) == 0
    said = capsys.readouterr().out
    assert "format: speculators, eagle3, llama layers" in said and "drafts up to 4 tokens a round" in said
    MedusaHeads.for_model(model, 3).save_pretrained(tmp_path / "heads")
    assert COMMAND([*target, str(tmp_path / "heads")]) == 0
    assert "3 Medusa heads of 1 blocks" in capsys.readouterr().out
    save_drafter(eagle3_model(model, target_hidden_size=64), tmp_path / "other")
    assert COMMAND([*target, str(tmp_path / "other")]) == 1
    assert "target_hidden_size) is 64 for it and 32 for" in capsys.readouterr().err
    assert COMMAND(["--drafter", "lookup"]) == 2
