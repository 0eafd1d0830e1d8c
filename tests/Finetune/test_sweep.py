"""Sweeps: complete, resumable, and failed runs are reported."""

import importlib
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import yaml

from common.errors import InputError
from common.files import lock_folder
from Finetune import sweep
from Finetune.models_3dvit import VisionTransformer3D
from Finetune.presets import load_preset
from tests.Finetune.made import make_dataset
from tests.helpers import run_module

SETTINGS = dict(
    epochs=1, batch_size=1, crops=1, workers=0, warmup_epochs=0, validate_every=0, feature_size=4, num_heads=2, lr=0.01
) | {"roi": [32, 32, 32]}
PRESET = load_preset("MSD09_Spleen")


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Flags of a sweep over 2 initialisations x 2 numbers of labels, whose programs run in this process and are
    recorded."""
    data = make_dataset(PRESET, tmp_path / "data")
    listing = json.loads((data / "dataset.json").read_text())
    # labels in a list may have any name
    for case in listing["training"]:
        renamed = case["label"].replace("spleen", "reference_of_spleen")
        (data / case["label"]).rename(data / renamed)
        case["label"] = renamed
    (data / "dataset.json").write_text(json.dumps(listing | {"labels_by": "a student"}))
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(SETTINGS))
    torch.manual_seed(0)
    vit = VisionTransformer3D(img_size=32, patch_size=16, embed_dim=24, depth=4, num_heads=2)
    torch.save({"model": vit.state_dict(), "args": {"num_heads": 2}}, tmp_path / "mae.pth")
    calls = []

    def run(command, **kwargs):
        module, argv = command[2], command[3:]
        calls.append((module, argv))
        try:
            importlib.import_module(module).main(argv)
        except InputError as error:
            print(f"error: {error}", file=kwargs["stdout"])
            return 2
        return 0

    monkeypatch.setattr(sweep, "run_child", run)
    flags = [
        "--preset",
        PRESET.name,
        "--data",
        data,
        "--settings",
        tmp_path / "settings.yaml",
        "--out",
        tmp_path / "out",
    ]
    flags += ["--cache_dir", tmp_path / "cache", "--inits", f"scratch,{tmp_path / 'mae.pth'}", "--label_counts", "1,2"]
    return types.SimpleNamespace(flags=list(map(str, flags)), calls=calls, path=tmp_path)


def read(small):
    return json.loads((small.path / "out/sweep.json").read_text())


def used_by(small):
    """Return the settings in the checkpoint of each run."""
    files = sorted(small.path.glob("out/runs/*/training/checkpoint-last.pth"))
    return [torch.load(file, weights_only=True)["args"] for file in files]


def test_sweep_runs_once_and_writes_its_table(small, capsys):
    flags = [*small.flags, "--label_counts", "2"]
    sweep.main(flags)
    rows = read(small)["rows"]
    assert [(row["init"] == "scratch", row["count"]) for row in rows] == [(True, 2), (False, 2)]
    assert all(0 <= row["dice"] <= 1 and row["missing"] == 0 for row in rows)
    assert rows[1]["minus_scratch"]["difference"] == pytest.approx(rows[1]["dice"] - rows[0]["dice"])
    assert len(small.calls) == 2 * 3
    assert "minus scratch" in capsys.readouterr().out and (small.path / "out/sweep.png").stat().st_size > 5000
    scratch = [args for args in used_by(small) if args["init"] == "scratch"]
    # the width of the checkpoint, not the default
    assert len(scratch) == 1 and scratch[0]["architecture"]["embed_dim"] == 24
    for card in small.path.glob("out/runs/*/scores/scores.json"):
        protocol = json.loads(card.read_text())["protocol"]
        assert protocol["cases"] == ["spleen_2"] and protocol["labels_by"] == "a student"
    sweep.main(flags)
    # nothing is done twice
    assert len(small.calls) == 2 * 3


@pytest.mark.slow
def test_interrupted_sweep_resumes(small, monkeypatch):
    run = sweep.run_child

    def interrupted(command, **kwargs):
        if len(small.calls) == 4:
            raise KeyboardInterrupt
        return run(command, **kwargs)

    monkeypatch.setattr(sweep, "run_child", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep.main(small.flags)
    monkeypatch.setattr(sweep, "run_child", run)
    sweep.main(small.flags)
    # one run was done; the second resumed after its training
    assert len(small.calls) == 4 + 3 * 3
    rows = read(small)["rows"]
    assert [(row["init"] == "scratch", row["count"]) for row in rows] == [(True, 1), (True, 2), (False, 1), (False, 2)]
    assert all(row["missing"] == 0 for row in rows)
    by_count = {len(args["training_cases"]): args["training_cases"] for args in used_by(small)}
    assert set(by_count[1]) < set(by_count[2])


@pytest.mark.slow
def test_failed_run_is_reported_and_the_others_continue(small, capsys):
    torch.save({"model": {"w": torch.zeros(2)}}, small.path / "mae.pth")
    flags = [*small.flags, "--label_counts", "2"]
    # the run from scratch is the twin of a file that is no checkpoint
    with pytest.raises(InputError, match="2 of 2 runs failed"):
        sweep.main(flags)
    assert re.search("mae.pth.* ViT", read(small)["failed"][f"{small.path.name}-mae, 2 labels, seed 0"])
    vit = VisionTransformer3D(img_size=32, patch_size=16, embed_dim=24, depth=4, num_heads=2)
    torch.save({"model": vit.state_dict(), "args": {"num_heads": 2}}, small.path / "mae.pth")
    torch.save({"model": {"w": torch.zeros(2)}}, small.path / "bad.pth")
    flags[flags.index("--inits") + 1] += f",{small.path / 'bad.pth'}"
    with pytest.raises(InputError, match="1 of 3 runs failed"):
        sweep.main(flags)
    result = read(small)
    assert [row["missing"] for row in result["rows"]] == [0, 0, 1]
    assert f"FAILED: {small.path.name}-bad, " in capsys.readouterr().out


def test_run_of_another_process_is_left_alone(small):
    config = sweep.parse(sweep.SweepSettings, [*small.flags, "--label_counts", "2"])
    first, second = sweep.plan(config, PRESET)
    first.folder.mkdir(parents=True)
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", hold, str(first.folder / ".lock")], **pipes)
    try:
        process.stdout.readline()
        assert "another process" in sweep.execute(config, PRESET, first)
        assert not small.calls
    finally:
        process.communicate(b"\n")
    # released by the system when the process ends
    with lock_folder(first.folder) as lock:
        assert lock is not None
        # a program of the run keeps the lock when the sweep is killed
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(lock,))
    with lock_folder(first.folder) as lock:
        assert lock is None
    child.communicate(b"\n")
    with lock_folder(first.folder) as lock:
        assert lock is not None


def test_checkpoints_of_one_name_have_titles_of_their_own():
    """Failures are listed by title."""
    inits = ("runs/mae/checkpoint-last.pth", "runs/glmae/checkpoint-last.pth")
    one, other = (sweep.SweepRun(init, 2, 0, (), Path("out"), ()) for init in inits)
    assert one.title != other.title and "glmae" in other.title


def test_slurm_array_has_one_task_per_run(small):
    sweep.main([*small.flags, "--slurm"])
    script = small.path / "out/array.sbatch"
    assert "--array=0-3" in script.read_text() and "--slurm'" not in script.read_text()
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0


@pytest.mark.slow
def test_task_of_the_array_does_one_run(small):
    sweep.main([*small.flags, "--only", "1"])
    assert len(small.calls) == 3 and not (small.path / "out/sweep.json").exists()


def folders(small, *extra):
    return {run.folder for run in sweep.plan(sweep.parse(sweep.SweepSettings, [*small.flags, *extra]), PRESET)}


def test_other_settings_or_cases_are_other_runs(small):
    before = folders(small)
    assert len(before) == 4
    # two of two training cases are all of them
    assert len(folders(small, "--label_counts", "2,all,2", "--seeds", "0,0")) == 2
    listing = small.path / "data/dataset.json"
    content = json.loads(listing.read_text())
    another = {"image": "imagesTr/x.nii.gz", "label": content["training"][0]["label"]}
    listing.write_text(json.dumps(content | {"training": [*content["training"], another]}))
    with_another = folders(small)
    assert not before & with_another
    (small.path / "settings.yaml").write_text(yaml.safe_dump(SETTINGS | {"epochs": 2}))
    assert not with_another & folders(small)


def test_bad_settings_are_refused_before_the_first_run(small):
    mae, settings = small.path / "mae.pth", small.path / "settings.yaml"
    for extra, message in (
        (["--inits", "nowhere.pth"], "--inits.*'nowhere.pth'"),
        (["--label_counts", "3"], "label_count.* 3.* 2"),
        (["--label_counts", "few"], "--label_counts.*'few'"),
        (["--seeds", ""], "--seeds.*''"),
        (["--only", "4"], "--only 4"),
        (["--inits", f"{mae},{mae}"], "--inits.* two"),
        (["--preset", "CC_CCII"], "CC_CCII.* classification"),
    ):
        with pytest.raises(InputError, match=message):
            sweep.main([*small.flags, *extra])
    for text, message in (
        ("epoch: 3", "'epoch'.*'epochs'"),
        ("epochs: many", "epochs.*'many'"),
        ("- epochs", "list.* mapping"),
        ("seed: 3", "'seed', which the sweep sets"),
    ):
        settings.write_text(text)
        with pytest.raises(InputError, match=f"settings.yaml: .*{message}"):
            sweep.main(small.flags)
    listing = small.path / "data/dataset.json"
    content = json.loads(listing.read_text())
    content["training"].append(content["training"][0])
    listing.write_text(json.dumps(content))
    settings.write_text("{}")
    with pytest.raises(InputError, match="twice"):
        sweep.main(small.flags)
    assert not small.calls


def test_former_name_of_the_program_still_works():
    done = run_module("Finetune.compare", "--help")
    assert "--label_counts" in done.stdout and done.stderr.strip().count("\n") == 0 and "Finetune.sweep" in done.stderr


@pytest.mark.slow
def test_lists_of_absolute_paths(small):
    data = small.path / "data"
    content = json.loads((data / "dataset.json").read_text())
    cases = [case | {name: str(data / case[name]) for name in ("image", "label")} for case in content["training"]]
    (small.path / "lists").mkdir()
    (small.path / "lists/list.json").write_text(json.dumps(content | {"training": cases}))
    flags = [*small.flags, "--data", str(small.path / "lists/list.json"), "--inits", "scratch", "--label_counts", "1"]
    sweep.main(flags)
    assert [module for module, _ in small.calls] == ["Finetune.main_finetune", "Finetune.predict", "Finetune.evaluate"]
    assert (next((small.path / "out/runs").iterdir()) / "scores/scores.json").is_file()
