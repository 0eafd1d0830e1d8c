"""Checkpoints with random weights, scans in spaces of every kind, and Finetune.predict on them."""

import nibabel as nib
import numpy as np
import torch

from common import checkpoint
from common.config import to_dict
from Finetune.architectures import Architecture, build_model
from Finetune.predict import main
from tests.Finetune.made import volume

ROTATION = np.linalg.qr(np.array([[1.0, 0.12, 0.05], [-0.1, 1.0, 0.2], [0.02, -0.15, 1.0]]))[0]
AFFINES = {
    "flipped": np.diag([-3.0, -3.0, 3.0, 1.0]),
    "anisotropic": np.diag([1.5, -1.5, 6.0, 1.0]),
    "permuted": np.array([[0, 0, 3.5, 5], [-3.2, 0, 0, -9], [0, 2.8, 0, 40], [0, 0, 0, 1.0]]),
    "oblique": np.block(
        [[ROTATION * [2.8, -3.1, 4.0], np.array([[7], [8], [-9]])], [np.zeros((1, 3)), np.ones((1, 1))]]
    ),
}


def save_checkpoint(path, preset, seed=0, config=None, validation=("plain",), **kwargs):
    torch.manual_seed(seed)
    sizes = dict(model="unetr", embed_dim=24, depth=4, num_heads=2, feature_size=4, roi=(32,) * 3, patch_size=(16,) * 3)
    architecture = Architecture(in_chans=preset.channels, out_channels=preset.out_channels, **(sizes | kwargs))
    args = {
        "preset": to_dict(preset),
        "architecture": to_dict(architecture),
        "config": {"fold": 0, "seed": seed} | (config or {}),
        "init": "scratch",
        "selected": "last",
        "training_cases": ["a"],
        "validation_cases": list(validation),
        "step": 1,
    }
    checkpoint.save(path, {"state_dict": build_model(architecture).state_dict(), "args": args})
    return path


def write_ct(path, preset, affine, shape=(30, 28, 26)):
    image, label = volume(preset, 0, shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(image, affine), path)
    return image, label


def run(file, images, out, *extra):
    main(["--checkpoint", *map(str, np.atleast_1d(file)), "--images", str(images), "--out", str(out), *map(str, extra)])
