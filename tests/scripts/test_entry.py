"""Entry points: bad input is one line, and this project's own requirements are shown only when asked for."""

import pytest

from scripts import bench_table
from scripts.common.entry import run_script

SAVED = "scripts/results/attention_h200.json"


def test_bad_input_is_one_line_and_status_2(capsys):
    def main():
        raise ValueError("--nodes must be\nat least 2, got 1")

    with pytest.raises(SystemExit) as stop:
        run_script(main)
    assert stop.value.code == 2 and capsys.readouterr().err == "error: --nodes must be at least 2, got 1\n"


def test_other_errors_keep_their_traceback_and_success_is_status_0():
    with pytest.raises(SystemExit) as stop:
        run_script(lambda: None)
    assert stop.value.code == 0
    with pytest.raises(ZeroDivisionError):
        run_script(lambda: 1 / 0)


def test_requirements_are_shown_only_with_bars(capsys):
    bench_table.main([SAVED])
    plain = capsys.readouterr().out
    bench_table.main([SAVED, "--bars"])
    assert "met" not in plain.split() and " µs" in plain and " met" in capsys.readouterr().out
