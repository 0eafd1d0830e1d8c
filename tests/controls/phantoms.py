"""Labelled phantoms with hidden anatomy: what a few labels cannot teach, and unlabelled volumes can.

A phantom is divided into regions of random shape, each of one class. A class adds its own weak pattern, repeated every
8 voxels, to noise that is several times stronger. No voxel and hardly a single patch shows its class: the pattern has
to be known, and the evidence of the neighbouring patches of a region has to be combined. A network that learns from
four labelled phantoms fits their noise instead. A masked autoencoder is trained to predict the same patterns from the
visible patches of a region, in as many phantoms as there are.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.data.nifti import write_nifti

CLASSES = ("background", "first", "second", "third")
# voxels after which a pattern repeats, which divides the patch size of the encoders
PERIOD = 8
REGIONS = 5
# HU of the middle of the window [0, 1000], and of the noise's standard deviation
MIDDLE, NOISE = 500.0, 150.0

PRESET = """
name: phantoms
description: phantoms with hidden anatomy
labels: {0: background, 1: first, 2: second, 3: third}
layout: {datalist: dataset.json}
intensity: window
low: 0
high: 1000
foreground_threshold: null
roi: [ROI]
patch_size: [8, 8, 8]
"""


def patterns() -> Tensor:
    """Return one pattern per class, (classes, 8, 8, 8), of mean 0 and variance 1, smooth over two voxels."""
    rng = torch.Generator().manual_seed(7)
    coarse = torch.randn(len(CLASSES), 1, PERIOD // 2, PERIOD // 2, PERIOD // 2, generator=rng)
    fine = F.interpolate(coarse, size=(PERIOD,) * 3, mode="trilinear", align_corners=True)[:, 0]
    fine = fine - fine.mean(dim=(1, 2, 3), keepdim=True)
    return fine / fine.std(dim=(1, 2, 3), keepdim=True)


def phantom(shape: Sequence[int], seed: int, strength: float) -> tuple[Tensor, Tensor]:
    """Return HU (D, H, W) and class ids (D, H, W) uint8.

    Args:
        shape: multiples of 8.
        strength: standard deviation of a pattern as a fraction of that of the noise.
    """
    rng = torch.Generator().manual_seed(seed)
    axes = [torch.arange(size, dtype=torch.float32) for size in shape]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"))  # (3, D, H, W)
    bend = F.interpolate(torch.randn(1, 3, 4, 4, 4, generator=rng), size=tuple(shape), mode="trilinear")[0]
    centres = torch.rand(REGIONS, 3, generator=rng) * torch.tensor(shape)
    distance = torch.cdist((places + 2 * bend).flatten(1).T, centres)  # (voxels, regions)
    classes = torch.cat([torch.arange(4), torch.randint(4, (REGIONS - 4,), generator=rng)])
    label = classes[distance.argmin(dim=1)].view(*shape)
    repeated = patterns().repeat(1, *(size // PERIOD for size in shape))  # (classes, D, H, W)
    signal = repeated.gather(0, label[None])[0]
    hu = MIDDLE + NOISE * (strength * signal + torch.randn(*shape, generator=rng))
    return hu, label.to(torch.uint8)


def shuffled(hu: Tensor, seed: int) -> Tensor:
    """Return the same voxels in a random order: nothing is left to learn but their distribution."""
    order = torch.randperm(hu.numel(), generator=torch.Generator().manual_seed(seed))
    return hu.flatten()[order].view_as(hu)


def write_volume(path: Path, values: Tensor, dtype: type) -> None:
    write_nifti(path, nib.Nifti1Image(values.round().numpy().astype(dtype), np.eye(4)))


def write_unlabelled(folder: Path, shape: Sequence[int], count: int, strength: float, shuffle: bool = False) -> Path:
    """Write volumes for pretraining, with or without their voxels shuffled."""
    folder.mkdir(parents=True)
    for seed in range(count):
        hu, _ = phantom(shape, seed, strength)
        write_volume(folder / f"{seed:04}.nii.gz", shuffled(hu, seed) if shuffle else hu, np.int16)
    return folder


def write_labelled(folder: Path, shape: Sequence[int], training: int, validation: int, strength: float) -> Path:
    """Write labelled phantoms, none of them one of pretraining, and a preset for them. Return the preset's path.

    Fold 0 has the validation cases.
    """
    folder.mkdir(parents=True)
    cases = []
    for number in range(training + validation):
        hu, label = phantom(shape, 100_000 + number, strength)
        name = f"case{number:02}"
        write_volume(folder / f"{name}.nii.gz", hu, np.int16)
        write_volume(folder / f"{name}_label.nii.gz", label, np.uint8)
        files = {"image": f"{name}.nii.gz", "label": f"{name}_label.nii.gz"}
        cases.append(files | {"fold": int(number < training)})
    (folder / "dataset.json").write_text(json.dumps({"training": cases}))
    preset = folder / "phantoms.yaml"
    preset.write_text(PRESET.replace("ROI", ", ".join(map(str, shape))))
    return preset
