"""The demo in its short form, as a user starts it, on synthetic scans, so that no test needs a network."""

import csv
import json
import os
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from common.data.volume_io import read_image
from tests.helpers import ROOT, run_module


def demo(folder, *args):
    places = {"DATA": folder / "data", "CACHE": folder / "cache", "OUT": folder / "out"}
    environment = os.environ | {"PYTHON": sys.executable} | {k: str(v) for k, v in places.items()}
    done = subprocess.run(["bash", "scripts/demo.sh", *args], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("method, encoder", [("glmae", "77 of 77"), ("mim", "235 of 235")])
def test_the_short_demo_goes_from_scans_to_scores(tmp_path, method, encoder):
    run_module("scripts.make_sample_data", "--out", tmp_path / "data", "--synthetic")
    printed = demo(tmp_path, "--smoke", "--method", method)
    out = tmp_path / "out"
    assert f"{encoder} encoder tensors" in printed
    # A user must not take the synthetic scans for real ones.
    assert "SYNTHETIC" in printed.upper()

    label_map = nib.load(out / "predictions/abdomen_b.nii.gz")
    scan = read_image(tmp_path / "data/imagesTs/abdomen_b")
    assert label_map.shape == tuple(scan.meta["spatial_shape"])
    np.testing.assert_allclose(label_map.affine, scan.meta["original_affine"], atol=1e-4)
    assert set(np.unique(label_map.dataobj)) <= set(range(8))
    protocol = json.loads((out / "predictions/predictions.json").read_text())
    kept = protocol["largest_component"]
    assert kept and all(ndimage.label(np.asarray(label_map.dataobj) == number)[1] <= 1 for number in kept)
    assert protocol["largest_foreground"]

    with open(out / "scores/scores.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 7 and {row["case"] for row in rows} == {"abdomen_b"}
    # The phantoms have four of the seven structures.
    card = json.loads((out / "scores/scores.json").read_text())
    assert card["counts"]["present"] == 4 and card["counts"]["absent"] + card["counts"]["false_positives"] == 3
    # Both fine-tunings are scored, and only one starts from the pretrained encoder.
    table = (out / "dice.txt").read_text()
    assert table.split()[:3] == ["Dice", "pretrained", "scratch"] and table in printed and len(table.splitlines()) == 9
    inits = [torch.load(path, weights_only=True)["args"]["init"] for path in sorted(out.rglob("finetune/*-last.pth"))]
    assert len(inits) == 2 and inits.count("scratch") == 1
    pictures = list(out.rglob("*.png"))
    assert {"pretrain", "predictions", "scores", "scratch"} <= {p.relative_to(out).parts[0] for p in pictures}
    assert all(np.asarray(Image.open(p)).std() > 0 for p in pictures)
    content = torch.load(out / "pretrain/checkpoint-last.pth", weights_only=True)
    assert {"student", "teacher", "dino_loss"} <= set(content) if method == "glmae" else "model" in content

    if method == "glmae":
        # A second run reuses the cache.
        assert "0 built" in demo(tmp_path, "--smoke")


def test_an_unknown_argument_is_named():
    environment = os.environ | {"PYTHON": sys.executable}
    for args in (["--smok"], ["--method", "foo"]):
        done = subprocess.run(
            ["bash", "scripts/demo.sh", *args], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 2 and args[-1] in done.stderr and "glmae" in done.stderr
