"""The grid of runs: complete, restartable, honest about what failed."""

import importlib
import json
import subprocess
import sys
import types

import pytest
import torch
import yaml

from common.errors import InputError
from common.files import lock_folder
from Finetune import sweep
from Finetune.evaluation.sweep_report import summary, versus
from Finetune.models_3dvit import VisionTransformer3D
from Finetune.presets import load_preset
from tests.Finetune.made import make_dataset

SETTINGS = {
    "epochs": 1,
    "batch_size": 1,
    "crops": 1,
    "workers": 0,
    "warmup_epochs": 0,
    "validate_every": 0,
    "feature_size": 4,
    "num_heads": 2,
    "roi": [32, 32, 32],
    "lr": 0.01,
}


@pytest.fixture
def grid(tmp_path, monkeypatch):
    """A grid of 2 initialisations x 2 label counts on made-up data; programs run in this process, and are counted."""
    data = make_dataset(load_preset("MSD09_Spleen"), tmp_path / "data")
    listing = json.loads((data / "dataset.json").read_text())
    for entry in listing["training"]:  # a list may name its labels as it likes
        renamed = entry["label"].replace("spleen", "reference_of_spleen")
        (data / entry["label"]).rename(data / renamed)
        entry["label"] = renamed
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
        "MSD09_Spleen",
        "--data",
        data,
        "--settings",
        tmp_path / "settings.yaml",
        "--out",
        tmp_path / "out",
    ]
    flags += ["--cache_dir", tmp_path / "cache", "--inits", f"scratch,{tmp_path / 'mae.pth'}", "--label_counts", "1,2"]
    return types.SimpleNamespace(flags=list(map(str, flags)), calls=calls, path=tmp_path)


def read(grid):
    return json.loads((grid.path / "out/compare.json").read_text())


def used_by(grid):
    """What each cell's checkpoint says it was made with."""
    files = sorted(grid.path.glob("out/cells/*/run/checkpoint-last.pth"))
    return [torch.load(file, weights_only=True)["args"] for file in files]


def test_a_grid_is_run_once_and_tabled(grid, capsys):
    flags = [*grid.flags, "--label_counts", "2"]
    sweep.main(flags)
    rows = read(grid)["rows"]
    assert [(row["init"] == "scratch", row["count"]) for row in rows] == [(True, 2), (False, 2)]
    assert all(0 <= row["dice"] <= 1 and row["missing"] == 0 for row in rows)
    assert rows[1]["minus_scratch"]["difference"] == pytest.approx(rows[1]["dice"] - rows[0]["dice"])
    assert len(grid.calls) == 2 * 3
    assert "minus scratch" in capsys.readouterr().out and (grid.path / "out/compare.png").stat().st_size > 5000
    scratch = [args for args in used_by(grid) if args["init"] == "scratch"]
    assert len(scratch) == 1 and scratch[0]["architecture"]["embed_dim"] == 24  # the checkpoint's, not the default's
    for card in grid.path.glob("out/cells/*/scores/scores.json"):
        protocol = json.loads(card.read_text())["protocol"]
        assert protocol["cases"] == ["spleen_2"] and protocol["labels_by"] == "a student"
    sweep.main(flags)
    assert len(grid.calls) == 2 * 3  # nothing again


@pytest.mark.slow
def test_an_interrupted_grid_goes_on(grid, monkeypatch):
    run = sweep.run_child

    def interrupted(command, **kwargs):
        if len(grid.calls) == 4:
            raise KeyboardInterrupt
        return run(command, **kwargs)

    monkeypatch.setattr(sweep, "run_child", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep.main(grid.flags)
    monkeypatch.setattr(sweep, "run_child", run)
    sweep.main(grid.flags)
    assert len(grid.calls) == 4 + 3 * 3  # one cell was done, the second began again and resumed its finished training
    rows = read(grid)["rows"]
    assert [(row["init"] == "scratch", row["count"]) for row in rows] == [(True, 1), (True, 2), (False, 1), (False, 2)]
    assert all(row["missing"] == 0 for row in rows)
    by_count = {len(args["training_cases"]): args["training_cases"] for args in used_by(grid)}
    assert set(by_count[1]) < set(by_count[2])


@pytest.mark.slow
def test_a_failed_cell_is_reported_and_the_rest_goes_on(grid, capsys):
    torch.save({"model": {"w": torch.zeros(2)}}, grid.path / "mae.pth")
    flags = [*grid.flags, "--label_counts", "2"]
    with pytest.raises(InputError, match="2 of 2 cells failed"):  # the scratch cell is the twin of a file that is none
        sweep.main(flags)
    assert "holds no encoder of a ViT" in read(grid)["failed"]["mae.pth, 2 labels, seed 0"]
    vit = VisionTransformer3D(img_size=32, patch_size=16, embed_dim=24, depth=4, num_heads=2)
    torch.save({"model": vit.state_dict(), "args": {"num_heads": 2}}, grid.path / "mae.pth")
    torch.save({"model": {"w": torch.zeros(2)}}, grid.path / "bad.pth")
    flags[flags.index("--inits") + 1] += f",{grid.path / 'bad.pth'}"
    with pytest.raises(InputError, match="1 of 3 cells failed"):
        sweep.main(flags)
    result = read(grid)
    assert [row["missing"] for row in result["rows"]] == [0, 0, 1]
    assert "FAILED: bad.pth" in capsys.readouterr().out


def test_a_cell_that_another_process_is_at_is_left_to_it(grid):
    config = sweep.parse(sweep.SweepSettings, [*grid.flags, "--label_counts", "2"])
    first, second = sweep.plan(config, load_preset("MSD09_Spleen"))
    first.folder.mkdir(parents=True)
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", hold, str(first.folder / ".lock")], **pipes)
    try:
        process.stdout.readline()
        assert "another process is at it" in sweep.run_cell(config, load_preset("MSD09_Spleen"), first)
        assert not grid.calls
    finally:
        process.communicate(b"\n")
    with lock_folder(first.folder) as lock:  # let go by the system, not by a file that stays
        assert lock is not None
        # a program of the cell holds it on: the one that started it may be killed
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(lock,))
    with lock_folder(first.folder) as lock:
        assert lock is None
    child.communicate(b"\n")
    with lock_folder(first.folder) as lock:
        assert lock is not None


def test_a_slurm_array_has_one_task_per_cell(grid):
    sweep.main([*grid.flags, "--slurm"])
    script = grid.path / "out/array.sbatch"
    assert "--array=0-3" in script.read_text() and "--slurm'" not in script.read_text()
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0


@pytest.mark.slow
def test_a_task_of_the_array_runs_its_cell_alone(grid):
    sweep.main([*grid.flags, "--only", "1"])
    assert len(grid.calls) == 3 and not (grid.path / "out/compare.json").exists()


def test_settings_change_the_cell_and_bad_ones_are_refused(grid):
    parse = sweep.parse
    before = sweep.plan(parse(sweep.SweepSettings, grid.flags), load_preset("MSD09_Spleen"))
    (grid.path / "settings.yaml").write_text(yaml.safe_dump(SETTINGS | {"epochs": 2}))
    after = sweep.plan(parse(sweep.SweepSettings, grid.flags), load_preset("MSD09_Spleen"))
    assert not {cell.folder for cell in before} & {cell.folder for cell in after}
    again = [*grid.flags, "--label_counts", "2,all,2", "--seeds", "0,0"]  # 2 is all of them
    assert len(sweep.plan(parse(sweep.SweepSettings, again), load_preset("MSD09_Spleen"))) == 2
    before, listing = after, grid.path / "data/dataset.json"
    content = json.loads(listing.read_text())
    another = {"image": "imagesTr/x.nii.gz", "label": content["training"][0]["label"]}
    listing.write_text(json.dumps(content | {"training": [*content["training"], another]}))
    after = sweep.plan(parse(sweep.SweepSettings, grid.flags), load_preset("MSD09_Spleen"))
    assert not {cell.folder for cell in before} & {cell.folder for cell in after}  # other cases, another cell
    listing.write_text(json.dumps(content))
    listing.write_text(json.dumps(content | {"training": [content["training"][0], *content["training"]]}))
    with pytest.raises(InputError, match="nii.gz twice"):
        sweep.main(grid.flags)
    listing.write_text(json.dumps(content))
    for extra, words in (
        (["--inits", "nowhere.pth"], "inits: found 'nowhere.pth'"),
        (["--label_counts", "3"], "--label_count 3.*2"),
        (["--label_counts", "few"], "label_counts: found 'few'"),
        (["--seeds", ""], "seeds: found ''"),
        (["--only", "4"], "only: found 4"),
        (["--inits", f"{grid.path / 'mae.pth'},{grid.path / 'mae.pth'}"], "inits: found two that would be called"),
    ):
        with pytest.raises(InputError, match=words):
            sweep.main([*grid.flags, *extra])
    with pytest.raises(InputError, match="preset CC_CCII: is for classification"):
        sweep.main([*grid.flags, "--preset", "CC_CCII"])
    for text, words in (
        ("epoch: 3", "settings.yaml: unknown setting 'epoch'; did you mean 'epochs'"),
        ("epochs: many", "settings.yaml: epochs: found 'many'"),
        ("- epochs", "settings.yaml: found list, expected a mapping"),
    ):
        (grid.path / "settings.yaml").write_text(text)
        with pytest.raises(InputError, match=words):
            sweep.main(grid.flags)
    (grid.path / "settings.yaml").write_text("seed: 3")
    with pytest.raises(InputError, match="found 'seed', which the grid sets itself"):
        sweep.main(grid.flags)


def test_differences_are_paired_by_case_and_seed():
    hard = {f"c{i}": 0.3 + 0.03 * i for i in range(20)}
    scratch = summary("scratch", 4, 2, {0: hard, 1: {c: v + 0.1 for c, v in hard.items()}})
    better = summary("x", 4, 3, {0: {c: v + 0.02 for c, v in hard.items()}, 1: {c: v + 0.12 for c, v in hard.items()}})
    delta = versus(better, scratch)
    assert delta["difference"] == pytest.approx(0.02) and delta["ci95"] == pytest.approx([0.02, 0.02])
    assert better["missing"] == 1 and scratch["missing"] == 0
    assert scratch["ci95"][1] - scratch["ci95"][0] > 0.1


@pytest.mark.slow
def test_a_list_of_absolute_paths(grid):
    data = grid.path / "data"
    content = json.loads((data / "dataset.json").read_text())
    entries = [entry | {name: str(data / entry[name]) for name in ("image", "label")} for entry in content["training"]]
    (grid.path / "lists").mkdir()
    (grid.path / "lists/list.json").write_text(json.dumps(content | {"training": entries}))
    flags = [*grid.flags, "--data", str(grid.path / "lists/list.json"), "--inits", "scratch", "--label_counts", "1"]
    sweep.main(flags)
    assert [module for module, _ in grid.calls] == ["Finetune.main_finetune", "Finetune.predict", "Finetune.evaluate"]
    assert (next((grid.path / "out/cells").iterdir()) / "scores/scores.json").is_file()
