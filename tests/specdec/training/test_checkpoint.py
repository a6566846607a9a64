"""What a folder remembers of the run that made it."""

import json
import re

import pytest

from specdec.training.checkpoint import refuse_other_settings

SETTINGS = {"seed": 0, "settings": {"batch": 4, "draft": {"hidden_size": 32, "layers": 1}}, "files": ["a", "b"]}


def test_a_folder_made_with_other_settings_is_refused_by_what_differs(tmp_path):
    path = tmp_path / "settings.json"
    refuse_other_settings(path, SETTINGS)
    refuse_other_settings(path, SETTINGS)
    assert json.loads(path.read_text()) == SETTINGS
    other = {
        "seed": 7,
        "settings": {"batch": 4, "draft": {"hidden_size": 32, "layers": 2}},
        "files": ["a", "b"],
        "new": "x",
    }
    found = {"seed": (0, 7), "settings.draft.layers": (1, 2), "new": (None, "x")}
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path} was made with other settings (there, here): {found};")):
        refuse_other_settings(path, other)
    assert json.loads(path.read_text()) == SETTINGS


def test_an_option_that_came_later_and_is_not_used_refuses_nothing(tmp_path):
    refuse_other_settings(tmp_path / "settings.json", SETTINGS)
    refuse_other_settings(tmp_path / "settings.json", SETTINGS | {"new": None})
