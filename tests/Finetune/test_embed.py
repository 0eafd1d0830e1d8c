"""Features of whole volumes: which patch they are of, and what happens to volumes that cannot be used."""

import json
import os

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from common.cli import run_program
from common.data import volume_io
from common.errors import InputError
from Finetune.contract import recorded_preprocessing
from Finetune.embed import main, patch_affine, volume_features
from Finetune.evaluation.features import token_reader
from Finetune.models_3dvit import VisionTransformer3D
from Finetune.models_convvit3d import ConvViT3D
from tests.helpers import ct, write_nifti

CPU = torch.device("cpu")
ARGS = {"num_heads": 2, "intensity": "window", "low": -1000.0, "high": 1000.0, "foreground_threshold": 0.05}


def vit(**kwargs):
    torch.manual_seed(0)
    sizes = dict(img_size=(16, 16, 8), patch_size=8, embed_dim=24, depth=2, num_heads=2)
    return VisionTransformer3D(**(sizes | kwargs)).eval()


@pytest.fixture
def checkpoint(tmp_path):
    model = vit()
    torch.save({"model": model.state_dict(), "args": ARGS | {"grid_size": list(model.grid_size)}}, tmp_path / "c.pth")
    return tmp_path / "c.pth"


@pytest.fixture
def scans(tmp_path):
    for number in range(2):
        write_nifti(tmp_path / f"scans/scan{number}.nii.gz", ct((30, 28, 26), seed=number))
    return tmp_path / "scans"


def embed(checkpoint, scans, out, *more):
    main([*map(str, ["--checkpoint", checkpoint, "--images", scans, "--out", out, *more])])


@pytest.mark.parametrize("build", [vit, lambda: vit(class_token=False), lambda: hybrid()])
def test_features_are_those_of_the_window_that_holds_the_patch(build):
    model = build()
    roi = model.img_size
    volume = torch.rand(1, 2 * roi[0] + 3, roi[1], 2 * roi[2] - 1)
    read, prefix = token_reader(model, CPU), model.num_prefix_tokens
    cls, patches = volume_features(volume, read, model.patch_size, roi, prefix, batch=3)
    sizes = [-(-size // p) for size, p in zip(volume.shape[1:], model.patch_size)]
    assert list(patches.shape) == [*sizes, model.embed_dim]
    summaries = []
    for i in range(3):
        for k in range(2):
            crop = torch.zeros(1, 1, *roi)
            part = volume[:, i * roi[0] : (i + 1) * roi[0], :, k * roi[2] : (k + 1) * roi[2]]
            crop[0, :, : part.shape[1], :, : part.shape[3]] = part
            tokens = read(crop)[0]
            grid = tokens[prefix:].view(*model.grid_size, -1)
            first = [n * g for n, g in zip((i, 0, k), model.grid_size)]
            found = patches[tuple(slice(a, a + g) for a, g in zip(first, model.grid_size))]
            torch.testing.assert_close(found, grid[tuple(slice(n) for n in found.shape[:3])], atol=1e-6, rtol=1e-5)
            summaries.append(tokens[0] if prefix else tokens.mean(dim=0))
    torch.testing.assert_close(cls, torch.stack(summaries).mean(dim=0), atol=1e-6, rtol=1e-5)


def hybrid():
    torch.manual_seed(0)
    return ConvViT3D(img_size=(16, 32, 16), embed_dims=(6, 6, 12, 12), depths=(1, 1, 1, 1), num_heads=2).eval()


def test_the_affine_leads_to_the_centres_of_patches():
    affine = np.array([[2.0, 0, 0, 10], [0, 3, 0, 20], [0, 0, 4, 30], [0, 0, 0, 1]])
    found = patch_affine(affine, (8, 8, 2))
    # the middle of the voxels 8..15, 0..7 and 4..5
    expected = affine @ [11.5, 3.5, 4.5, 1]
    assert np.allclose(found @ [1, 0, 2, 1], expected)


def test_volumes_are_preprocessed_as_the_checkpoint_records(tmp_path, checkpoint, scans):
    embed(checkpoint, scans, tmp_path / "out")
    preprocessing = recorded_preprocessing(ARGS, checkpoint)
    image, _ = preprocessing.apply(volume_io.read_image(scans / "scan0.nii.gz"))
    cls, patches = volume_features(image.as_tensor(), token_reader(vit(), CPU), (8, 8, 8), (16, 16, 8))
    found = np.load(tmp_path / "out/scan0.npz")
    assert np.array_equal(found["cls"], cls.numpy()) and np.array_equal(found["patches"], patches.numpy())
    assert np.array_equal(found["affine"], patch_affine(np.asarray(image.affine), (8, 8, 8)))


def test_both_formats_hold_the_same(tmp_path, checkpoint, scans):
    embed(checkpoint, scans, tmp_path / "a")
    embed(checkpoint, scans, tmp_path / "b", "--format", "safetensors", "--batch", 1)
    a, b = np.load(tmp_path / "a/scan1.npz"), load_file(tmp_path / "b/scan1.safetensors")
    assert set(a) == set(b)
    for name in a:
        np.testing.assert_allclose(a[name], b[name], atol=1e-5)


def test_finished_volumes_are_skipped(tmp_path, checkpoint, scans, capsys):
    embed(checkpoint, scans, tmp_path / "out")
    first, second = (tmp_path / f"out/scan{number}.npz" for number in range(2))
    before = os.stat(first).st_mtime_ns
    second.unlink()
    embed(checkpoint, scans, tmp_path / "out")
    assert os.stat(first).st_mtime_ns == before and second.exists()
    assert "2 of 2 volumes" in capsys.readouterr().out.splitlines()[-1]


def test_features_of_other_settings_are_not_mixed(tmp_path, checkpoint, scans):
    embed(checkpoint, scans, tmp_path / "out")
    with pytest.raises(InputError, match="has features of another roi, expected another folder"):
        embed(checkpoint, scans, tmp_path / "out", "--roi", 16)
    with pytest.raises(InputError, match="--roi 20 20 20: must be divisible by the patch size 8 8 8"):
        embed(checkpoint, scans, tmp_path / "new", "--roi", 20)


def test_an_unusable_volume_is_one_line_and_exit_code_2(tmp_path, checkpoint, scans, capsys):
    (scans / "broken.nii.gz").write_bytes(b"no image")
    assert run_program(lambda: embed(checkpoint, scans, tmp_path / "out")) == 2
    printed = capsys.readouterr()
    assert len([line for line in printed.out.splitlines() if "error:" in line and "broken.nii.gz" in line]) == 1
    assert "2 of 3 volumes in" in printed.out
    assert printed.err.splitlines()[-1] == "error: 1 of 3 volumes have no features: broken"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"scan0.npz", "scan1.npz", "embed.json"}


def test_unknown_preprocessing_needs_a_preset(tmp_path, scans):
    torch.save({"model": vit().state_dict(), "args": {"num_heads": 2, "grid_size": [2, 2, 1]}}, tmp_path / "c.pth")
    with pytest.raises(InputError, match="does not record .* expected --preset"):
        embed(tmp_path / "c.pth", scans, tmp_path / "out")
    with pytest.raises(InputError, match=r"found an encoder of 1 channel\(s\), expected 4"):
        embed(tmp_path / "c.pth", scans, tmp_path / "out", "--preset", "MSD01_BrainTumour")
    embed(tmp_path / "c.pth", scans, tmp_path / "out", "--preset", "BTCV")
    assert json.loads((tmp_path / "out/embed.json").read_text())["preprocessing"]["high"] == 250.0
