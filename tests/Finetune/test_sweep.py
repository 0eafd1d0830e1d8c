"""Sweeps: complete, resumable, tuned on development cases, and failed runs are reported."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import types

import pytest
import torch
import yaml

from common.cli import parse
from common.errors import InputError
from common.files import lock_folder
from common.signals import Requeue
from Finetune import sweep
from Finetune.models_3dvit import VisionTransformer3D
from Finetune.presets import load_preset
from Finetune.sweeps import plan as planning
from Finetune.sweeps.runs import execute
from tests.common.report.made import page_of
from tests.Finetune.made import make_dataset, make_scans
from tests.helpers import run_module

SETTINGS = dict(batch_size=1, crops=1, workers=0, feature_size=4, num_heads=2, lr=0.01, overlap=0, roi=[32, 32, 32])
PRESET = load_preset("MSD09_Spleen")


class InProcess:
    """Stands for `Programs`: runs each program in this process, and records it."""

    calls: list[tuple[str, list[str]]] = []

    def __init__(self, modules):
        self.ended = []

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def start(self, key, module, flags, log, lock, threads, environment):
        self.calls.append((module, list(flags)))
        try:
            importlib.import_module(module).main(list(flags))
            self.ended.append((key, 0))
        except InputError as error:
            os.write(log, f"error: {error}\n".encode())
            self.ended.append((key, 2))

    def wait(self):
        return self.ended.pop(0)

    def send_signal(self, number):
        pass


def save_vit(path, seed=0, **sizes):
    torch.manual_seed(seed)
    vit = VisionTransformer3D(**dict(img_size=32, patch_size=16, embed_dim=24, depth=4, num_heads=2) | sizes)
    torch.save({"model": vit.state_dict(), "args": {"num_heads": 2, "decoder_num_heads": 2}}, path)
    return path


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Flags of a sweep over 2 initialisations x 2 numbers of labels, with two held-out cases, whose programs run in
    this process and are recorded."""
    data = make_dataset(PRESET, tmp_path / "data")
    listing = json.loads((data / "dataset.json").read_text())
    # labels in a list may have any name
    for case in listing["training"]:
        renamed = case["label"].replace("spleen", "reference_of_spleen")
        (data / case["label"]).rename(data / renamed)
        case["label"] = renamed
    # a second held-out case: the image and label of the first
    names = {"image": "./imagesTr/spleen_12.nii.gz", "label": "./labelsTr/other.nii.gz"}
    for kind, name in names.items():
        shutil.copy(data / listing["training"][1][kind], data / name)
    listing["training"].append(names)
    (data / "dataset.json").write_text(json.dumps(listing | {"labels_by": "a student"}))
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(SETTINGS))
    save_vit(tmp_path / "mae.pth")
    monkeypatch.setattr(InProcess, "calls", [])
    monkeypatch.setattr(sweep, "Programs", InProcess)
    flags = ["--preset", PRESET.name, "--data", data, "--settings", tmp_path / "settings.yaml"]
    flags += ["--out", tmp_path / "out", "--cache_dir", tmp_path / "cache", "--updates", 1]
    flags += ["--inits", f"scratch,mae={tmp_path / 'mae.pth'}", "--label_counts", "1,2"]
    return types.SimpleNamespace(flags=list(map(str, flags)), calls=InProcess.calls, path=tmp_path)


def read(small):
    return json.loads((small.path / "out/sweep.json").read_text())


def planned(small, *extra):
    return planning.make_plan(parse(planning.SweepSettings, [*small.flags, *map(str, extra)]))


def runs_of(plan):
    return [run for group in plan.groups for run in group.runs.values()]


def value(flags, name):
    return flags[flags.index(f"--{name}") + 1]


def used_by(small):
    """Return the settings in the checkpoint of each run."""
    files = sorted(small.path.glob("out/runs/*/training/checkpoint-last.pth"))
    return [torch.load(file, weights_only=True)["args"] for file in files]


# ---------------------------------------------------------------- whole sweeps


def test_sweep_runs_once_and_writes_its_table(small, capsys):
    flags = [*small.flags, "--label_counts", "2"]
    sweep.main(flags)
    rows = read(small)["rows"]
    assert [(row["init"], row["count"], row["pretraining_seeds"]) for row in rows] == [("scratch", 2, 0), ("mae", 2, 1)]
    assert all(0 <= row["score"] <= 1 and row["missing"] == 0 for row in rows)
    assert rows[1]["minus_scratch"]["difference"] == pytest.approx(rows[1]["score"] - rows[0]["score"])
    assert set(rows[0]["scores"]["0"]) == {"spleen_2", "spleen_12"}
    assert len(small.calls) == 2 * 3
    printed = capsys.readouterr().out
    assert "minus scratch" in printed and re.search("1 of 2 runs are done, about .* left", printed)
    assert (small.path / "out/sweep.png").stat().st_size > 5000
    scratch = [args for args in used_by(small) if args["init"] == "scratch"]
    page = page_of(small.path / "out")
    assert "2 of 2" in page and "Every run of the sweep is done" in page and "minus scratch" in page
    # the width of the checkpoint, not the default
    assert len(scratch) == 1 and scratch[0]["architecture"]["embed_dim"] == 24
    for card in small.path.glob("out/runs/*/scores/scores.json"):
        protocol = json.loads(card.read_text())["protocol"]
        assert sorted(protocol["cases"]) == ["spleen_12", "spleen_2"] and protocol["labels_by"] == "a student"
    sweep.main(flags)
    # nothing is done twice
    assert len(small.calls) == 2 * 3 and "2 of 2 runs are done already" in capsys.readouterr().out


def test_a_tuned_sweep_chooses_on_development_and_reports_test(small, capsys):
    flags = [*small.flags, "--label_counts", "2", "--seeds", "0,1", "--tune", "lr=0.3,0.001"]
    flags += ["--inits", f"mae={small.path / 'mae.pth'}"]
    sweep.main(flags)
    training = [words for module, words in small.calls if module == "Finetune.main_finetune"]
    # two candidates with the first seed, then the chosen one with the second
    assert [(value(words, "lr"), value(words, "seed")) for words in training[:2]] == [("0.3", "0"), ("0.001", "0")]
    result, (row,) = read(small), read(small)["rows"]
    development = [candidate["development"] for candidate in row["candidates"]]
    best = development.index(max(development))
    assert len(training) == 3 and value(training[2], "seed") == "1"
    assert row["chosen"] == row["candidates"][best]["settings"] == {"lr": float(value(training[2], "lr"))}
    (held_out,), (test,) = result["development_cases"], result["test_cases"]
    assert {held_out, test} == {"spleen_2", "spleen_12"}
    first = row["scores"]["0"]
    assert development[best] == first[held_out] and row["seeds"]["0"] == first[test] and len(row["scores"]) == 2
    assert "chosen" in capsys.readouterr().out
    sweep.main(flags)
    assert len(small.calls) == 3 * 3


@pytest.mark.slow
def test_interrupted_sweep_resumes(small, monkeypatch):
    start = InProcess.start

    def interrupted(self, *args):
        if len(small.calls) == 4:
            raise KeyboardInterrupt
        start(self, *args)

    monkeypatch.setattr(InProcess, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep.main(small.flags)
    monkeypatch.setattr(InProcess, "start", start)
    sweep.main(small.flags)
    # one run was done; the second resumed after its training
    assert len(small.calls) == 4 + 3 * 3
    rows = read(small)["rows"]
    assert [(row["init"], row["count"]) for row in rows] == [("scratch", 1), ("scratch", 2), ("mae", 1), ("mae", 2)]
    assert all(row["missing"] == 0 for row in rows)
    by_count = {len(args["training_cases"]): args["training_cases"] for args in used_by(small)}
    assert set(by_count[1]) < set(by_count[2])


def test_failed_runs_are_reported_and_a_stop_ends_the_sweep(small, monkeypatch, capsys):
    codes = iter([2, 0, 0, 0])

    def start(self, key, module, flags, log, lock, threads, environment):
        os.write(log, b"error: no memory\n")
        self.ended.append((key, next(codes)))

    monkeypatch.setattr(InProcess, "start", start)
    monkeypatch.setattr(sweep, "collect", lambda config, plan, failures: str(failures))
    # the second run ends without scores, which is no failure of a program
    with pytest.raises(InputError, match="1 of 2 runs failed"):
        sweep.main([*small.flags, "--label_counts", "2"])
    assert "unetr scratch, 2 labels, seed 0': 'Finetune.main_finetune ended with code 2: error: no memory" in (
        capsys.readouterr().out
    )
    codes = iter([75])
    with pytest.raises(Requeue):
        sweep.main(small.flags)


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


def test_a_sweep_of_classification_scores_the_classes(small):
    data = make_scans(load_preset("CC_CCII"), small.path / "scans", patients=5)
    flags = [*small.flags, "--preset", "CC_CCII", "--data", str(data), "--label_counts", "4"]
    sweep.main(flags)
    assert [module for module, _ in small.calls] == ["Finetune.main_finetune"] * 2
    result = read(small)
    assert result["score"] == "accuracy" and [row["model"] for row in result["rows"]] == ["classifier"] * 2
    scores = result["rows"][0]["scores"]["0"]
    assert set(scores.values()) <= {0.0, 1.0} and len(scores) == len(result["test_cases"])
    sweep.main(flags)
    assert len(small.calls) == 2


@pytest.mark.slow
def test_two_runs_at_once_in_processes(small, monkeypatch):
    monkeypatch.undo()
    flags = [*small.flags, "--label_counts", "2", "--jobs", "2"]
    done = run_module("Finetune.sweep", *flags)
    assert done.stdout.index("unetr mae, 2 labels, seed 0 ->") < done.stdout.index("done in")
    assert all(row["missing"] == 0 for row in read(small)["rows"])


# ---------------------------------------------------------------- the plan


def test_runs_have_equal_updates_whatever_the_number_of_labels(small):
    for run in runs_of(planned(small, "--updates", 60, "--warmup", 0.25)):
        # batches of one volume: 20 epochs of three updates, five of them warm-up
        assert value(run.flags, "epochs") == "20" and value(run.flags, "samples_per_epoch") == "3"
        assert float(value(run.flags, "warmup_epochs")) == 5 and value(run.flags, "validate_every") == "0"
    grid = runs_of(planned(small, "--updates", 60, "--tune", "batch_size=1,2"))
    assert {value(run.flags, "samples_per_epoch") for run in grid} == {"3", "6"}


def test_seeds_take_pretraining_files_in_turn(small):
    a, b = save_vit(small.path / "a.pth", 1), save_vit(small.path / "b.pth", 2)
    (group,) = planned(small, "--inits", f"mae={a}:{b}", "--label_counts", "2", "--seeds", "5,6,7").groups
    assert group.pretraining_seeds == 2
    assert [value(group.runs[0, seed].flags, "init") for seed in (5, 6, 7)] == list(map(str, (a, b, a)))
    (group,) = planned(small, "--inits", f"mae={a}", "--label_counts", "2", "--seeds", "5,6").groups
    assert {value(run.flags, "init") for run in group.runs.values()} == {str(a)}


def test_only_what_varies_changes_with_the_seed(small):
    def seeds(*extra):
        group = planned(small, "--seeds", "3,4", *extra).groups[0]
        return [value(group.runs[0, 4].flags, name) for name in ("label_seed", "seed", "order_seed")]

    assert seeds() == ["4", "4", "4"]
    assert seeds("--vary", "weights") == ["3", "4", "3"] and seeds("--vary", "labels,order") == ["4", "3", "4"]


def test_a_key_chooses_the_weights_of_a_checkpoint(small):
    content = torch.load(small.path / "mae.pth", weights_only=True)
    torch.save(content | {"teacher": content["model"]}, small.path / "both.pth")
    group = planned(small, "--inits", f"t={small.path / 'both.pth'}@teacher", "--label_counts", "2").groups[0]
    assert value(group.runs[0, 0].flags, "checkpoint_key") == "teacher"
    with pytest.raises(InputError, match="student"):
        planned(small, "--inits", f"t={small.path / 'both.pth'}@student")


def test_heads_run_from_what_fits_them(small, capsys):
    roi = yaml.safe_dump(SETTINGS | {"roi": [64, 32, 32]})
    (small.path / "settings.yaml").write_text(roi)
    decoder = dict(encoder_only=False, decoder_embed_dim=24, decoder_depth=1, decoder_num_heads=2)
    save_vit(small.path / "mae.pth", **decoder)
    flags = ["--label_counts", "2", "--models", "unetr,primus,mae_decoder,dynunet"]
    plan = planned(small, *flags)
    pairs = [(group.model, group.init) for group in plan.groups]
    assert pairs == [(m, i) for m in ("unetr", "primus", "mae_decoder") for i in ("scratch", "mae")] + [
        ("dynunet", "scratch")
    ]
    assert "left out: dynunet from mae" in capsys.readouterr().out
    scratch = {group.model: group.runs[0, 0].flags for group in plan.groups if group.init == "scratch"}
    assert "--scratch_twin" in scratch["mae_decoder"] and "--init" not in scratch["dynunet"]
    for extra, message in (
        (["--models", "mim"], "--inits mae: .*hybrid"),
        (["--models", "dynunet,unetr", "--inits", f"mae={small.path / 'mae.pth'}"], "--models dynunet: .*no encoder"),
        (["--models", "unet"], "unet: unknown network"),
    ):
        with pytest.raises(InputError, match=message):
            planned(small, *extra)
    other = save_vit(small.path / "other.pth", patch_size=8)
    with pytest.raises(InputError, match="--inits mae: .*different architectures"):
        planned(small, "--inits", f"mae={small.path / 'mae.pth'}:{other}")


def test_other_settings_or_cases_are_other_runs(small):
    def folders(*extra):
        return {run.folder for run in runs_of(planned(small, *extra))}

    before = folders()
    assert len(before) == 4 and not before & folders("--updates", 2)
    # two of two training cases are all of them
    assert len(folders("--label_counts", "2,all,2", "--seeds", "0,0")) == 2
    # a value of the grid is the same run as that value in the settings
    assert before < folders("--tune", "lr=0.01,0.02", "--seeds", "0,1")
    listing = small.path / "data/dataset.json"
    content = json.loads(listing.read_text())
    another = {"image": "imagesTr/x.nii.gz", "label": content["training"][0]["label"]}
    listing.write_text(json.dumps(content | {"training": [*content["training"], another]}))
    with_another = folders()
    assert not before & with_another
    (small.path / "settings.yaml").write_text(yaml.safe_dump(SETTINGS | {"weight_decay": 2}))
    assert not with_another & folders()


def test_bad_settings_are_refused_before_the_first_run(small):
    mae, settings = small.path / "mae.pth", small.path / "settings.yaml"
    for extra, message in (
        (["--inits", "nowhere.pth"], "--inits.*'nowhere.pth'"),
        (["--inits", "a b=x.pth"], "--inits.*'a b'"),
        (["--inits", f"{settings}"], "--inits: .*not a checkpoint"),
        (["--label_counts", "3"], "label_count.* 3.* 2"),
        (["--label_counts", "few"], "--label_counts.*'few'"),
        (["--seeds", ""], "--seeds.*''"),
        (["--vary", "cases"], "--vary.*'cases'"),
        (["--only", "4"], "--only 4"),
        (["--updates", "30"], "--updates 30: must be a multiple of 20"),
        (["--inits", f"{mae},{mae}"], "--inits.* two"),
        (["--models", "classifier"], "classifier.* segmentation"),
        (["--tune", "lr"], "--tune lr: expected NAME"),
        (["--tune", "lr=fast"], "--tune: lr.*'fast'"),
        (["--tune", "seed=1,2"], "'seed', which the sweep sets"),
        (["--tune", "blr=1,2"], "blr: has no effect"),
        (["--tune", "lr=1,2", "--development", "0"], "--tune: .*development"),
        (["--models", "dynunet", "--inits", "scratch", "--tune", "layer_decay=0.5"], "dynunet has no encoder"),
    ):
        with pytest.raises(InputError, match=message):
            sweep.main([*small.flags, *extra])
    for text, message in (
        ("epoch: 3", "'epoch'.*'epochs'"),
        ("crops: many", "crops.*'many'"),
        ("- epochs", "list.* mapping"),
        ("epochs: 3", "'epochs', which the sweep sets"),
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


# ---------------------------------------------------------------- locks, arrays, names


def test_run_of_another_process_is_left_alone(small):
    config = parse(planning.SweepSettings, [*small.flags, "--label_counts", "2"])
    plan = planning.make_plan(config)
    run = runs_of(plan)[0]
    run.folder.mkdir(parents=True)
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", hold, str(run.folder / ".lock")], **pipes)
    try:
        process.stdout.readline()
        with pytest.raises(StopIteration) as end:
            next(execute(config, plan, run))
        assert "another process" in end.value.value
    finally:
        process.communicate(b"\n")
    # released by the system when the process ends
    with lock_folder(run.folder) as lock:
        assert lock is not None


def test_slurm_array_has_one_task_per_group(small):
    sweep.main([*small.flags, "--slurm", "--seeds", "0,1,2", "--tune", "lr=0.1,0.2"])
    script = small.path / "out/array.sbatch"
    assert "--array=0-3" in script.read_text() and "--slurm'" not in script.read_text()
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0


@pytest.mark.slow
def test_task_of_the_array_does_one_group(small):
    sweep.main([*small.flags, "--only", "1", "--seeds", "0,1"])
    assert len(small.calls) == 2 * 3 and not (small.path / "out/sweep.json").exists()
    assert {value(words, "label_count") for _, words in small.calls if "--label_count" in words} == {"2"}


@pytest.mark.slow
def test_former_name_of_the_program_still_works():
    done = run_module("Finetune.compare", "--help")
    assert "--label_counts" in done.stdout and done.stderr.strip().count("\n") == 0 and "Finetune.sweep" in done.stderr
