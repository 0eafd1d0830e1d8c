"""scripts/<preset>/run.sh: one per preset, with valid settings; it trains, predicts and scores the published layout."""

import json
import os
import shlex
import subprocess
import sys

import pytest

from common.cli import parse
from Finetune.architectures import resolve
from Finetune.presets import available, load_preset
from Finetune.settings import FinetuneSettings
from tests.Finetune.made import make_dataset
from tests.helpers import ROOT

SMALL = "--embed_dim 24 --depth 4 --num_heads 2 --feature_size 4 --roi 32 --epochs 1 --crops 1 --workers 0"
# values of the variables that a recipe sets
VARIABLES = {"MSD04_Hippocampus": {"${network[@]}": "--model unetr", "$epochs": "20"}}


def recipe(name):
    return ROOT / f"scripts/{name}/run.sh"


def run(name, data, out, *flags, **env):
    environment = os.environ | {"PYTHON": sys.executable, "DATA": str(data), "OUT": str(out)} | env
    command = ["bash", str(recipe(name)), *SMALL.split(), "--cache_dir", str(out.parent / "cache"), *flags]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("name", available())
def test_every_preset_has_a_recipe_with_valid_settings(name):
    text = recipe(name).read_text().replace("\\\n", " ")
    assert subprocess.run(["bash", "-n", str(recipe(name))]).returncode == 0
    (line,) = [line for line in text.splitlines() if line.startswith((f"finetune {name} ", "launch "))]
    for variable, value in VARIABLES.get(name, {}).items():
        line = line.replace(f'"{variable}"', value)
    words = shlex.split(line)
    assert name in words and words[-3:] == ["--recipe", f"scripts/{name}/run.sh", "$@"]
    flags = words[words.index(next(w for w in words if w.startswith("--"))) : -1]
    given = [] if "--preset" in flags else ["--preset", name, "--data", "d", "--out_dir", "o"]
    config, preset = parse(FinetuneSettings, [*given, *flags]), load_preset(name)
    assert resolve(config.network, preset, None).roi == tuple(config.network.roi or preset.roi)
    assert config.batch_size % config.micro_batch_size == 0 and config.seed == 0
    assert config.validation.select == "last"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["BTCV", "CC_CCII"])
def test_a_file_of_settings_changes_neither_data_nor_folder(tmp_path, name):
    """Prediction and scores use them too."""
    (tmp_path / "old.yaml").write_text("out_dir: old\ndata: elsewhere\npreset: WORD\nvalidate_every: 7")
    done = run(name, "mine", tmp_path / "new", "--config", str(tmp_path / "old.yaml"), "--help")
    assert done.returncode == 0, done.stderr[-2000:]
    for words in (f"this call {tmp_path / 'new'}", "this call mine", f"this call {name}", "this call 7"):
        assert words in done.stdout


@pytest.mark.slow
# labels in another folder, with other values, beside the images
@pytest.mark.parametrize("name", ["BTCV", "MMWHS_CT", "COVID19_20"])
def test_recipe_trains_predicts_and_scores(tmp_path, name):
    preset = load_preset(name)
    data = make_dataset(preset, tmp_path / "data")
    # as in a job script: prediction and scores run after the launched training
    launcher = {"LAUNCHER": sys.executable} if name == "BTCV" else {}
    done = run(name, data, tmp_path / "run", **launcher)
    assert done.returncode == 0, done.stderr[-2000:]
    card = json.loads((tmp_path / "run/scores/scores.json").read_text())
    assert set(card["classes"]) == set(preset.scored()) and card["counts"]["present"] > 0
    assert card["cases"] == 1 and not [note for note in card["notes"] if "case(s)" in note]
    assert len(list((tmp_path / "run/scores/worst").iterdir())) == 1


@pytest.mark.slow
def test_a_dry_run_of_a_recipe_only_tries_the_training(tmp_path):
    data = make_dataset(load_preset("BTCV"), tmp_path / "data")
    done = run("BTCV", data, tmp_path / "run", "--dry_run")
    assert done.returncode == 0 and "dry run: dice" in done.stdout, done.stderr[-2000:]
    assert not (tmp_path / "run").exists()


def test_recipe_refuses_bad_flags_before_training(tmp_path):
    data = make_dataset(load_preset("BTCV"), tmp_path / "data")
    for out, flags, message in (
        (tmp_path / "run", ["--data=elsewhere"], "--data=elsewhere"),
        (tmp_path / "run", ["--preset", "WORD"], "--preset: this recipe is for BTCV"),
        (data / "run", [], f"OUT={data / 'run'}"),
    ):
        done = run("BTCV", data, out, *flags)
        assert done.returncode == 2 and message in done.stderr, done.stderr
    assert not (data / "run").exists() and not (tmp_path / "run").exists()
