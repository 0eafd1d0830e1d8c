"""scripts/<preset>/run.sh: one for each preset, with settings that fit it; train, predict and score on published
layouts."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from common.cli import parse
from Finetune.architectures import resolve
from Finetune.main_finetune import FinetuneSettings
from Finetune.presets import available, load_preset
from tests.Finetune.made import make_dataset

ROOT = Path(__file__).parents[2]
SMALL = "--embed_dim 24 --depth 4 --num_heads 2 --feature_size 4 --roi 32 --epochs 1 --crops 1 --workers 0"
CHANGING = {"MSD04_Hippocampus": {"${network[@]}": "--model unetr", "$epochs": "20"}}  # what its `case` chooses


def recipe(name):
    return ROOT / f"scripts/{name}/run.sh"


def run(name, data, out, *flags, **env):
    environment = os.environ | {"PYTHON": sys.executable, "DATA": str(data), "OUT": str(out)} | env
    command = ["bash", str(recipe(name)), *SMALL.split(), "--cache_dir", str(out.parent / "cache"), *flags]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("name", available())
def test_every_preset_has_a_recipe_whose_settings_fit_it(name):
    text = recipe(name).read_text().replace("\\\n", " ")
    assert subprocess.run(["bash", "-n", str(recipe(name))]).returncode == 0
    (line,) = [line for line in text.splitlines() if line.startswith((f"finetune {name} ", "launch "))]
    for variable, value in CHANGING.get(name, {}).items():
        line = line.replace(f'"{variable}"', value)
    words = shlex.split(line)
    assert name in words and words[-1] == "$@"
    flags = words[words.index(next(w for w in words if w.startswith("--"))) : -1]
    given = [] if "--preset" in flags else ["--preset", name, "--data", "d", "--out_dir", "o"]
    config, preset = parse(FinetuneSettings, [*given, *flags]), load_preset(name)
    assert resolve(config, preset, None).roi == tuple(config.roi or preset.roi)
    assert config.batch_size % config.micro_batch_size == 0 and config.select == "last" and config.seed == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["BTCV", "MMWHS_CT", "COVID19_20"])  # labels elsewhere, with other values, beside
def test_a_recipe_trains_predicts_and_scores_the_published_layout(tmp_path, name):
    preset = load_preset(name)
    data = make_dataset(preset, tmp_path / "data")
    launcher = {"LAUNCHER": sys.executable} if name == "BTCV" else {}  # as in a job script: what follows is run too
    done = run(name, data, tmp_path / "run", **launcher)
    assert done.returncode == 0, done.stderr[-2000:]
    card = json.loads((tmp_path / "run/scores/scores.json").read_text())
    assert set(card["classes"]) == set(preset.scored()) and card["counts"]["present"] > 0
    assert card["cases"] == 1 and not [note for note in card["notes"] if "case(s)" in note]
    assert len(list((tmp_path / "run/scores/worst").iterdir())) == 1


def test_a_recipe_refuses_what_would_spoil_its_scores_before_it_trains(tmp_path):
    data = make_dataset(load_preset("BTCV"), tmp_path / "data")
    for out, flags, words in (
        (tmp_path / "run", ["--data=elsewhere"], "--data=elsewhere: give them as DATA= and OUT="),
        (tmp_path / "run", ["--preset", "WORD"], "--preset: this recipe is for BTCV"),
        (data / "run", [], "its label maps would be taken for images"),
    ):
        done = run("BTCV", data, out, *flags)
        assert done.returncode == 2 and words in done.stderr, done.stderr
    assert not list((data / "run").iterdir()) and not (tmp_path / "run").exists()
