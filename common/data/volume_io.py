"""Read a volume, say what is wrong with it, preprocess it. Axis order (D, H, W): the array axes in RAS orientation.

MONAI's readers and transforms do the work (read, orient, resample, window, crop); the checks are ours.
"""

import warnings
from pathlib import Path

import numpy as np
import torch
from monai.data import MetaTensor, PydicomReader
from monai.transforms import (
    LoadImage,
    Orientation,
)

from common.data import dicom, geometry, nifti
from common.errors import InputError, one_line

warnings.filterwarnings("ignore", message=".*nvImageCodec.*")  # an optional decoder of pydicom's for GPUs


def read_image(path: str | Path, channels: int = 1) -> MetaTensor:
    """The volume as (channels, D, H, W) float32 in RAS orientation, intensities as in the file.

    `path`: a NIfTI file (several channels: 4D, channels last), a folder with one DICOM series, or another file that
    MONAI can read. `meta["original_affine"]` and `meta["spatial_shape"]` are the file's own grid.
    InputError says what is wrong: missing, damaged, another shape, no sane grid, NaN, all one value.
    """
    path = Path(path)
    image = load(path, channels)
    voxels = image.as_tensor()
    broken = voxels.numel() - int(torch.isfinite(voxels).sum())
    if broken:
        raise InputError(f"{path}: found {broken} of {voxels.numel()} voxels NaN or infinite, all must be finite")
    for channel in voxels:
        if channel.min() == channel.max():
            raise InputError(f"{path}: found all voxels of one value, {float(channel.min()):g}: nothing is on it")
    return image


def read_label(path: str | Path, image: MetaTensor) -> MetaTensor:
    """The label map as (1, D, H, W) uint8 on the grid of `image` (C, D, H, W) from `read_image`.

    InputError when it lies on another grid (shape or affine), or holds anything but the whole numbers 0..255.
    """
    path = Path(path)
    label = load(path, channels=1)
    shape = tuple(image.shape[1:])
    if label.shape[1:] != shape:
        raise InputError(f"{path}: found a label of shape {tuple(label.shape[1:])}, its image has {shape}")
    apart = geometry.grid_distance(label.affine.numpy(), image.affine.numpy(), shape)
    allowed = 0.1 * float(image.pixdim.min())
    if apart > allowed:
        raise InputError(f"{path}: found a label {apart:.3g} mm off the grid of its image, {allowed:.2g} mm is allowed")
    values = label.as_tensor()
    odd = values != values.round()  # NaN is odd as well
    if bool(odd.any()):
        raise InputError(f"{path}: found the label value {float(values[odd][0]):g}, only whole numbers are allowed")
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 255:
        raise InputError(f"{path}: found label values {low}..{high}, allowed: 0..255")
    label = MetaTensor(values.to(torch.uint8), affine=image.affine)
    label.meta["filename_or_obj"] = str(path)
    return label


# ---------------------------------------------------------------- loading


def load(path: Path, channels: int) -> MetaTensor:
    """Any volume as (channels, D, H, W) float32, RAS; shape, grid and the file's own checksum are checked, values are
    not. For images and labels that will be trained on there are `read_image` and `read_label`."""
    _check_readable(path)
    if path.is_dir():
        array, meta = _read_dicom(path)
    elif path.name.lower().endswith((".nii", ".nii.gz")):
        array, meta = nifti.read(path)
    else:
        array, meta = _read_other(path)
    if channels == 1 and array.ndim == 4 and array.shape[3] == 1:
        array = array[..., 0]  # 4D with one channel is a volume
    if array.ndim != (3 if channels == 1 else 4) or (channels > 1 and array.shape[3] != channels):
        needs = "a 3D volume" if channels == 1 else f"4D with {channels} channels last"
        raise InputError(f"{path}: found {array.ndim}D data of shape {tuple(array.shape)}, needs {needs}")
    if min(array.shape[:3]) < 2:
        raise InputError(f"{path}: found one slice, shape {tuple(array.shape)}, needs a volume")
    if array.dtype.kind not in "iuf":
        raise InputError(f"{path}: found data of type {array.dtype}, needs whole or decimal numbers")
    affine = np.asarray(meta["affine"], np.float64)
    geometry.check_affine(affine, path)
    array = np.moveaxis(array, 3, 0) if channels > 1 else array[None]
    image = MetaTensor(torch.from_numpy(np.ascontiguousarray(array, np.float32)), affine=torch.as_tensor(affine))
    image.meta["filename_or_obj"] = str(path)
    image.meta["original_affine"] = torch.as_tensor(affine)
    image.meta["spatial_shape"] = tuple(array.shape[1:])
    return Orientation("RAS", labels=None)(image)


def _check_readable(path: Path) -> None:
    try:
        if path.is_dir():
            next(path.iterdir(), None)
        elif path.stat().st_size == 0:
            raise InputError(f"{path}: found 0 bytes, the file is empty")
        else:
            open(path, "rb").close()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file or folder") from None
    except OSError as error:  # no permission, a loop of symbolic links, a name that is too long
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def _read_dicom(path: Path) -> tuple[np.ndarray, dict]:
    files = [str(file) for file in dicom.check_series(path)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            reader = PydicomReader()
            datasets = reader.read(files)
            reader.has_series, reader.filenames = True, [files]  # what it sets itself when given the folder
            return reader.get_data(datasets)
        except Exception as error:  # pydicom's decoders raise what their libraries raise
            raise InputError(f"{path}: the DICOM series cannot be decoded ({one_line(error)})") from None


def _read_other(path: Path) -> tuple[np.ndarray, dict]:
    try:
        image = LoadImage(image_only=True)(str(path))
    except Exception as error:  # MONAI tries all its readers: RuntimeError, OptionalImportError, ...
        raise InputError(
            f"{path}: cannot be read; needs .nii, .nii.gz, a folder with a DICOM series, or what else MONAI's "
            f"installed readers know (pynrrd: .nrrd) ({one_line(error)})"
        ) from None
    return np.asarray(image), {"affine": image.affine.numpy()}


# ---------------------------------------------------------------- preprocessing
