"""Is a grid in space one that a scanner makes? Checks of spacings and affines (4, 4: voxel -> mm)."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.errors import InputError

SPACING_LIMITS = (0.05, 50.0)  # mm; our choice: micro-CT lies below, no scanner above
MAX_COSINE = 0.01  # between two axes; our choice
MAX_VOXELS = 2**30  # 1024^3; bounds the memory that reading one volume takes. Our choice


def check_size(shape: Sequence[int], path: str | Path) -> int:
    """The number of voxels; InputError when they are too many to be one scan."""
    voxels = math.prod(int(n) for n in shape)
    if voxels > MAX_VOXELS:
        raise InputError(f"{path}: found the shape {tuple(shape)}, {voxels:.3g} voxels; at most {MAX_VOXELS} are read")
    return voxels


def check_spacing(spacing: np.ndarray, path: str | Path) -> None:
    """InputError when one of the three is zero, negative, not finite or absurd."""
    low, high = SPACING_LIMITS
    if not all(low <= mm <= high for mm in spacing.tolist()):
        found = [float(f"{mm:.4g}") for mm in spacing.tolist()]
        raise InputError(f"{path}: found the spacing {found} mm, allowed: {low:g}..{high:g}")


def check_affine(affine: np.ndarray, path: str | Path) -> None:
    """InputError when the grid is not finite, singular, sheared, or of absurd spacing."""
    if affine.shape != (4, 4) or not np.isfinite(affine).all():
        raise InputError(f"{path}: found an affine that is not finite, needs a 4x4 matrix of numbers")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    check_spacing(spacing, path)
    directions = affine[:3, :3] / spacing
    if abs(np.linalg.det(directions)) < 1e-3:
        raise InputError(f"{path}: found a singular affine (axes that point the same way), needs three directions")
    cosine = np.abs(directions.T @ directions - np.eye(3)).max()
    if cosine > MAX_COSINE:
        raise InputError(
            f"{path}: found a sheared affine (cosine {cosine:.3f} between axes, {MAX_COSINE} is allowed), "
            "needs right angles: resample the file first"
        )


def grid_distance(first: np.ndarray, second: np.ndarray, shape: tuple[int, ...]) -> float:
    """By how many mm two grids of one shape (D, H, W) lie apart, at the worst corner."""
    corners = np.array([[x, y, z, 1] for x in (0, shape[0]) for y in (0, shape[1]) for z in (0, shape[2])], float)
    return float(np.linalg.norm(corners @ (np.asarray(first) - np.asarray(second)).T, axis=1).max())
