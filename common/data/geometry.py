"""Checks of spacings and affines (4, 4: voxel -> mm): could a scanner have made this volume?"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.errors import InputError

# mm; our choice: micro-CT lies below, no scanner above
SPACING_LIMITS = (0.05, 50.0)
# between two axes; our choice
MAX_COSINE = 0.01
# 1024^3, which bounds the memory for reading a volume; our choice
MAX_VOXELS = 2**30


def check_size(shape: Sequence[int], path: str | Path) -> None:
    """Raise InputError if a volume has more than `MAX_VOXELS` voxels."""
    if math.prod(float(n) for n in shape) > MAX_VOXELS:
        found = " x ".join(f"{float(n):.0f}" for n in shape)
        raise InputError(f"{path}: found {found} voxels, expected at most {MAX_VOXELS} in all")


def check_spacing(spacing: np.ndarray, path: str | Path) -> None:
    """Raise InputError unless the spacings (3) are finite and within `SPACING_LIMITS`."""
    low, high = SPACING_LIMITS
    if not all(low <= mm <= high for mm in spacing.tolist()):
        found = [float(f"{mm:.4g}") for mm in spacing.tolist()]
        raise InputError(f"{path}: found the spacing {found} mm, expected {low:g}..{high:g} mm")


def check_affine(affine: np.ndarray, path: str | Path) -> None:
    """Raise InputError unless an affine (4, 4) is finite, with a valid spacing and axes at right angles."""
    if affine.shape != (4, 4) or not np.isfinite(affine).all():
        raise InputError(f"{path}: found an affine that is not finite, expected a 4x4 matrix of numbers")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    check_spacing(spacing, path)
    directions = affine[:3, :3] / spacing
    if abs(np.linalg.det(directions)) < 1e-3:
        raise InputError(f"{path}: found a singular affine, expected three different directions")
    cosine = np.abs(directions.T @ directions - np.eye(3)).max()
    if cosine > MAX_COSINE:
        found = f"a sheared affine (cosine {cosine:.3f} between two axes), expected right angles"
        raise InputError(f"{path}: found {found} (at most {MAX_COSINE}); resample the file first")


def corner_distance(first: np.ndarray, second: np.ndarray, shape: tuple[int, ...]) -> float:
    """Return the largest distance in mm between the corners of a volume (D, H, W) under two affines (4, 4)."""
    corners = np.array([[x, y, z, 1] for x in (0, shape[0]) for y in (0, shape[1]) for z in (0, shape[2])], float)
    return float(np.linalg.norm(corners @ (np.asarray(first) - np.asarray(second)).T, axis=1).max())
