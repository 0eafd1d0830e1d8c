"""The examples of docs/extending.md run as they are written."""

import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.helpers import ROOT, ct, write_nifti

TEXT = (ROOT / "docs/extending.md").read_text()
SMALL = "--workers 0 --embed_dim 24 --depth 2 --num_heads 2 --patch_size 8 --samples_per_epoch 2 --batch_size 2"
PRETRAIN = f"{SMALL} --epochs 1 --model tiny --local_size 16 --local_views 2 --warmup_epochs 0"
FINETUNE = f"{SMALL} --epochs 1 --warmup_epochs 0 --crops 1 --validate_every 0"


def section(title):
    """Return the files and the commands of a section."""
    body = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", TEXT, re.M | re.S)[1]
    blocks = re.findall(r"```(python|yaml)\n# (\S+)\n(.*?)```", body, re.S)
    shown = "\n".join(re.findall(r"```bash\n(.*?)\n```", body, re.S))
    return {name: code for _, name, code in blocks}, re.findall(r"^python (.*)$", shown, re.M)


def run(tmp_path, title, replacements, *more):
    """Write the files of a section, and run its commands with our paths. Return what they print.

    Args:
        more: flags for each command.
    """
    files, commands = section(title)
    for name, code in files.items():
        (tmp_path / name).write_text(code)
    assert all(any(old in command for command in commands) for old in replacements)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    printed = ""
    for command, flags in zip(commands, more, strict=True):
        for old, new in replacements.items():
            command = command.replace(old, str(new))
        words = [sys.executable, *shlex.split(f"{command} {flags}")]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        printed += done.stdout
    return printed


def lungs(folder):
    """Three scans with two labelled halves."""
    label = np.zeros((40, 36, 32), np.uint8)
    label[5:15, 10:25, 8:24], label[25:35, 10:25, 8:24] = 1, 2
    for number in range(3):
        write_nifti(folder / f"ct/scan{number}.nii.gz", ct(seed=number))
        write_nifti(folder / f"lungs/scan{number}.nii.gz", label)
    return folder


def test_every_example_is_at_most_a_page():
    blocks = re.findall(r"```(?:python|yaml)\n(.*?)```", TEXT, re.S)
    assert len(blocks) == 4 and all(len(block.splitlines()) <= 60 for block in blocks)


@pytest.mark.slow
def test_a_method_trains_and_its_encoder_is_fine_tuned(tmp_path):
    lungs(tmp_path / "lungs")
    places = {"/data/my_ct": tmp_path / "lungs/ct", "--epochs 100": "", "runs/denoise": tmp_path / "denoise"}
    run(tmp_path, "A pretraining method", places, f"--cache_dir cache {PRETRAIN}")
    checkpoint = tmp_path / "denoise/checkpoint-last.pth"
    assert {"model", "head"} <= set(torch.load(checkpoint, weights_only=True))
    places = {"/data/lungs": tmp_path / "lungs", "scratch": checkpoint, "runs/lungs": tmp_path / "finetuned"}
    flags = f"--cache_dir cache --model linear --roi 32 {FINETUNE}"
    printed = run(tmp_path, "A data set for fine-tuning", places, flags, "", "")
    assert f"encoder from {checkpoint}" in printed and "left lung" in printed
    assert len(list((tmp_path / "finetuned/predictions").glob("*.nii.gz"))) == 1
    assert (tmp_path / "finetuned/scores/scores.txt").is_file()


@pytest.mark.slow
def test_a_head_trains(tmp_path):
    data = lungs(tmp_path / "lungs")
    places = {"/data/Task09_Spleen": data, "runs/glmae/checkpoint-last.pth": "scratch", "runs/conv": "conv"}
    (tmp_path / "my_lungs.yaml").write_text(section("A data set for fine-tuning")[0]["my_lungs.yaml"])
    places |= {"MSD09_Spleen": "my_lungs.yaml", "/data/other": data / "ct"}
    run(tmp_path, "A segmentation head", places, f"--cache_dir cache --roi 32 {FINETUNE}", "")
    assert len(list((tmp_path / "predictions").glob("*.nii.gz"))) == 3
    content = torch.load(tmp_path / "conv/checkpoint-last.pth", weights_only=True)
    assert "conv.weight" in content["state_dict"] and content["args"]["architecture"]["model"] == "conv"


@pytest.mark.slow
def test_a_metric_appears_in_the_score_card(tmp_path):
    label = np.zeros((20, 20, 20), np.uint8)
    label[5:15, 5:15, 5:15] = 1
    prediction = label.copy()
    prediction[5:10] = 0
    write_nifti(tmp_path / "labels/case.nii.gz", label)
    write_nifti(tmp_path / "predictions/case.nii.gz", prediction)
    printed = run(tmp_path, "A metric", {}, "")
    header, row = (tmp_path / "scores/scores.csv").read_text().splitlines()[:2]
    assert float(dict(zip(header.split(","), row.split(",")))["vs"]) == pytest.approx(1 / 1.5)
    assert "VS" in printed
