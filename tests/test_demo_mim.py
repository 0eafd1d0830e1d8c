"""The demo with MiM, in its short form, on synthetic scans (so that no test needs a network)."""

import os
import subprocess
import sys

import nibabel as nib
import pytest
import torch

from tests.helpers import ROOT, run_module


@pytest.mark.slow
def test_mim_goes_from_scans_to_scores(tmp_path):
    run_module("common.sample_data", "--out", tmp_path / "data", "--synthetic")
    places = {"DATA": tmp_path / "data", "CACHE": tmp_path / "cache", "OUT": tmp_path / "out"}
    environment = os.environ | {"PYTHON": sys.executable} | {k: str(v) for k, v in places.items()}
    command = ["bash", "scripts/demo.sh", "--smoke", "--method", "mim"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert "235 of 235 encoder tensors" in done.stdout
    out = tmp_path / "out"
    pretrained = torch.load(out / "pretrain/checkpoint-last.pth", weights_only=True)["model"]
    tuned = torch.load(out / "finetune/checkpoint-last.pth", weights_only=True)["state_dict"]
    assert (len(pretrained), len(tuned)) == (283, 319)  # a decoder of 2 blocks, and the two heads of `cosine`
    assert nib.load(out / "predictions/abdomen_b.nii.gz").ndim == 3
    assert (out / "scores/scores.csv").exists() and (out / "pretrain/reconstruction-0.png").exists()
