"""Read a volume, say what is wrong with it, preprocess it. Axis order (D, H, W): the array axes in RAS orientation.

MONAI's readers and transforms do the work (read, orient, resample, window, crop); the checks are ours.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from monai.data import MetaTensor, PydicomReader
from monai.transforms import (
    CropForeground,
    LoadImage,
    NormalizeIntensity,
    Orientation,
    ScaleIntensityRange,
    ScaleIntensityRangePercentiles,
    Spacing,
)

from common import dicom, grid, nifti
from common.config import InputError

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
    apart = grid.distance(label.affine.numpy(), image.affine.numpy(), shape)
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
    grid.check_affine(affine, path)
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
            raise InputError(f"{path}: the DICOM series cannot be decoded ({_words(error)})") from None


def _read_other(path: Path) -> tuple[np.ndarray, dict]:
    try:
        image = LoadImage(image_only=True)(str(path))
    except Exception as error:  # MONAI tries all its readers: RuntimeError, OptionalImportError, ...
        raise InputError(
            f"{path}: cannot be read; needs .nii, .nii.gz, a folder with a DICOM series, or what else MONAI's "
            f"installed readers know (pynrrd: .nrrd) ({_words(error)})"
        ) from None
    return np.asarray(image), {"affine": image.affine.numpy()}


def _words(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


# ---------------------------------------------------------------- preprocessing


@dataclass(frozen=True)
class Preprocessing:
    """From a volume as scanned to what a network sees. Order: resample, scale intensities, crop to the foreground.

    `window` maps low..high (HU) to [0, 1]; `percentiles` maps low..high per cent of the case to [0, 1]; `zscore`
    normalises each channel by mean and deviation of its non-zero voxels. `dtype` is what the cache stores.
    """

    spacing: tuple[float, float, float] | None = None  # mm (D, H, W); None keeps the file's
    intensity: Literal["window", "percentiles", "zscore"] = "window"
    low: float = -1000.0
    high: float = 1000.0
    foreground_threshold: float | None = 0.05  # on the [0, 1] scale; None crops nothing. Our choice, like the margin
    margin: int = 8  # voxels kept around the foreground
    channels: int = 1
    dtype: Literal["int16", "uint8"] = "int16"

    def __post_init__(self):
        for name in ("low", "high", "foreground_threshold"):  # 250 and 250.0 are one setting, and one cache key
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else float(value))
        if self.spacing is not None:
            object.__setattr__(self, "spacing", tuple(map(float, self.spacing)))
        if self.spacing is not None and not all(0 < mm < 1000 for mm in self.spacing):
            raise InputError(f"spacing: found {self.spacing}, needs three positive numbers of mm")
        if self.intensity == "window" and not self.low < self.high:
            raise InputError(f"low, high: found {self.low:g} and {self.high:g}, low must be below high")
        if self.intensity == "percentiles" and not 0 <= self.low < self.high <= 100:
            raise InputError(f"low, high: found {self.low:g} and {self.high:g}, needs 0 <= low < high <= 100 per cent")
        if self.margin < 0 or self.channels < 1:
            raise InputError(f"margin {self.margin}, channels {self.channels}: need at least 0 and at least 1")

    def apply(self, image: MetaTensor, label: MetaTensor | None = None) -> tuple[MetaTensor, MetaTensor | None]:
        """`image` (C, D, H, W) and `label` (1, D, H, W) of `read_image` and `read_label`, preprocessed, affines true.

        The foreground box comes from the image alone, never from the label. InputError when intensities cannot be HU,
        or no foreground is left.
        """
        where = image.meta.get("filename_or_obj", "image")
        if self.intensity == "window":
            check_hounsfield(image.as_tensor(), self.low, self.high, where)
        if self.spacing is not None:
            image = Spacing(self.spacing, mode="bilinear", padding_mode="border", dtype=torch.float32)(image)
            if label is not None:
                nearest = Spacing(self.spacing, mode="nearest", padding_mode="border", dtype=torch.float32)
                label = nearest(label).to(torch.uint8)
        image = self._scale(image)
        if self.foreground_threshold is None:
            return image, label
        return self._crop(image, label, where)

    def _scale(self, image: MetaTensor) -> MetaTensor:
        if self.intensity == "window":
            return ScaleIntensityRange(self.low, self.high, 0.0, 1.0, clip=True)(image)
        if self.intensity == "percentiles":
            return ScaleIntensityRangePercentiles(self.low, self.high, 0.0, 1.0, clip=True, channel_wise=True)(image)
        return NormalizeIntensity(nonzero=True, channel_wise=True)(image)

    def _crop(self, image: MetaTensor, label: MetaTensor | None, where: str) -> tuple[MetaTensor, MetaTensor | None]:
        def foreground(x: torch.Tensor) -> torch.Tensor:
            return x != 0 if self.intensity == "zscore" else x > self.foreground_threshold

        if not bool(foreground(image.as_tensor()).any()):
            share = f"{self.foreground_threshold:g} of the intensity range"
            raise InputError(f"{where}: found no voxel above {share}, there is no foreground to crop to")
        crop = CropForeground(select_fn=foreground, margin=self.margin, allow_smaller=True)
        start, stop = crop.compute_bounding_box(image)
        return crop.crop_pad(image, start, stop), label if label is None else crop.crop_pad(label, start, stop)


def check_hounsfield(image: torch.Tensor, low: float, high: float, where: str | Path) -> None:
    """InputError when intensities cannot be HU: scaled already, without the rescale offset, or beyond any scanner.

    Only for windows at least 100 wide, which are HU. Thresholds are our choice.
    """
    if high - low < 100:
        return
    least, most = float(image.min()), float(image.max())
    sample = image.flatten()[:: max(1, image.numel() // 1_000_000)]
    found = f"{where}: found intensities {least:g}..{most:g}"
    if most - least < 50:
        raise InputError(f"{found}, not HU: a range below 50 looks scaled already")
    if least < -33_000 or most > 70_000:
        raise InputError(f"{found}, implausible as HU: scanners store -32768..65535")
    if float(((sample >= low) & (sample <= high)).float().mean()) < 0.001:
        raise InputError(f"{found}, hardly any in {low:g}..{high:g}: implausible as HU")
    if least >= 0 and float((sample > 800).float().mean()) > 0.2:
        raise InputError(f"{found}, implausible as HU: none below 0, a fifth above 800: the rescale offset is lost")
