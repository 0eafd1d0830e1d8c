"""The commands of the study of MSD04_Hippocampus, which takes days: started with a Python that only notes them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from common.cli import parse
from common.config import to_dict
from Finetune.probe_plan import ProbeSettings
from Finetune.sweeps.plan import SweepSettings
from Pretrain.build import settings_class
from tests.helpers import ROOT

SCRIPT = "scripts/MSD04_Hippocampus/evidence.sh"
# `-` is scripts/env.sh, which looks at the installed packages
NOTING = """#!/usr/bin/env bash
[ "$1" != - ] || exec {python} "$@"
printf '%s\\n' "$*" >>{notes}
for word in "$@"; do
  [ "${{last:-}}" != --out_dir ] || touch "$word/checkpoint-last.pth"
  [ "${{last:-}}" != --out ] || {{ [[ "$2" != Finetune.* ]] || {{ mkdir -p "$word"; touch "$word/probe.txt"; }}; }}
  last="$word"
done
"""


def commands(folder, *args):
    """Return {module: its calls as words}."""
    python, notes = folder / "python", folder / "notes"
    python.write_text(NOTING.format(python=sys.executable, notes=notes))
    python.chmod(0o755)
    places = {"PYTHON": python, "DATA": "data", "OUT": folder / "out", "CACHE": folder / "cache"}
    environment = os.environ | {k: str(v) for k, v in places.items()} | {"JOBS": "2", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", SCRIPT, *args], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {}
    for line in notes.read_text().splitlines():
        words = line.split()
        if words[0] == "-m":
            found.setdefault(words[1], []).append(words[2:])
    return found


@pytest.mark.parametrize("args", [("--quick",), ("--quick", "--ablations"), ("--quick", "--length"), ()])
def test_programs_accept_the_commands(tmp_path, args):
    found = commands(tmp_path, *args)
    pretrainings = [parse(settings_class(), words) for words in found["Pretrain.main_pretrain"]]
    assert len({settings.out_dir for settings in pretrainings}) == len(pretrainings)
    sweeps = [parse(SweepSettings, words) for words in found["Finetune.sweep"]]
    probes = [parse(ProbeSettings, words) for words in found["Finetune.probe"]]
    # what is evaluated was pretrained, and the other way round
    evaluated = {
        file.split("@")[0]
        for settings in (*sweeps, *probes)
        for item in settings.inits.split(",")
        if "=" in item
        for file in item.split("=")[1].split(":")
    }
    assert evaluated == {f"{settings.out_dir}/checkpoint-last.pth" for settings in pretrainings}


@pytest.mark.parametrize("args, short", [(("--quick", "--ablations"), "-short"), ((), "")])
def test_ablations_differ_from_their_method_alone(tmp_path, args, short):
    found = [to_dict(parse(settings_class(), words)) for words in commands(tmp_path, *args)["Pretrain.main_pretrain"]]
    by_name = {Path(settings.pop("out_dir")).name: settings for settings in found}
    pattern = re.compile(rf"(mae|glmae|mim){short}-(?!x4|1-of|seed)(.+)-seed0")
    ablations = [match for match in map(pattern.fullmatch, by_name) if match]
    assert len(ablations) == 16
    for match in ablations:
        settings, base = by_name[match.group()], by_name[f"{match.group(1)}{short}-seed0"]
        changed = {key for key in base if settings[key] != base[key]}
        assert changed and not changed & {"epochs", "samples_per_epoch", "batch_size", "seed"}, match.group()


def test_an_unknown_argument_is_refused_at_once(tmp_path):
    environment = os.environ | {"PYTHON": str(tmp_path / "missing"), "VENV": str(tmp_path / "venv")}
    done = subprocess.run(["bash", SCRIPT, "--fast"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "--fast" in done.stderr and not (tmp_path / "venv").exists()
