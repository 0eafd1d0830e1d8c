"""Small files for the tests of the data path."""

from pathlib import Path

import nibabel as nib
import numpy as np

from scripts.synthetic_ct import affine_of, phantom

SHAPE, SPACING = (40, 36, 34), (6.0, 7.0, 8.0)


def nifti(path: Path, array: np.ndarray | None = None, affine: np.ndarray | None = None, seed: int = 0) -> Path:
    """A NIfTI file; without an array a small CT-like volume."""
    array = phantom(SHAPE, seed=seed)[0] if array is None else array
    affine = affine_of(SHAPE, SPACING) if affine is None else affine
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def labelled(folder: Path, name: str = "a", seed: int = 0) -> tuple[Path, Path]:
    """An image and its label."""
    hu, label = phantom(SHAPE, seed=seed)
    return nifti(folder / f"{name}.nii.gz", hu), nifti(folder / f"{name}_label.nii.gz", label)
