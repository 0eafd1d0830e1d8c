"""The console commands start the same programs as `python -m`."""

import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv

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


@pytest.mark.slow
def test_an_installation_in_place_has_the_commands(tmp_path):
    copy, environment = tmp_path / "copy", tmp_path / "venv"
    for package in ("common", "Pretrain", "Finetune", "scripts", "benchmarks"):
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "requirements.txt", "README.md", "generate_cache_files.py"):
        shutil.copy(ROOT / name, copy)
    venv.create(environment, with_pip=False)
    # the libraries of this environment, which also have setuptools: nothing is downloaded
    (libraries,) = environment.glob("lib/python3*/site-packages")
    (libraries / "libraries.pth").write_text(sysconfig.get_paths()["purelib"])
    python = [sys.executable, "-m", "pip", "--python", str(environment / "bin/python")]
    install = [*python, "install", "--quiet", "--no-deps", "--no-build-isolation", "-e", "."]
    done = subprocess.run(install, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {path.name for path in environment.glob("bin/glmae-*")} == set(COMMANDS)
    # from another folder: the package is found in the copy
    shown = subprocess.run([environment / "bin/glmae-cache", "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert shown.returncode == 0 and shown.stdout.startswith("usage: glmae-cache "), shown.stderr[-2000:]
