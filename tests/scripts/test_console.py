"""The console commands start the same programs as `python -m`."""

import sys
import tomllib

import pytest

from scripts.console import COMMANDS, main
from tests.helpers import ROOT


def test_pyproject_names_every_command():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert declared == dict.fromkeys(COMMANDS, "scripts.console:main")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_prints_its_settings(command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"/usr/bin/{command}", "--help"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: {command} ")


def test_bad_input_is_one_line_and_an_exit_code(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["glmae-pretrain", "--epoch", "3"])
    assert main() == 2
    assert capsys.readouterr().err == "error: --epoch: unknown setting; did you mean --epochs?\n"
