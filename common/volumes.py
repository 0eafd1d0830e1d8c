"""Read a volume, say what is wrong with it, preprocess it. Axis order (D, H, W) = the array axes of the volume in RAS orientation.

Files are read by MONAI's readers and brought to RAS, spacing, window and foreground box by MONAI's transforms; ours are the checks.
"""

import gzip
import io
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor, NibabelReader, PydicomReader
from monai.transforms import (
    CropForeground,
    LoadImage,
    NormalizeIntensity,
    Orientation,
    ScaleIntensityRange,
    ScaleIntensityRangePercentiles,
    Spacing,
)

from common import dicom
from common.config import InputError

warnings.filterwarnings("ignore", message=".*nvImageCodec.*")

SPACING_LIMITS = (0.05, 50.0)  # mm; our choice: micro-CT below, no scanner above
MAX_BYTES = 32 * 2**30  # of one decompressed volume
NIFTI = (".nii", ".nii.gz")
Triple = tuple[float, float, float]


def read_image(path: str | Path, channels: int = 1) -> MetaTensor:
    """The volume as (channels, D, H, W) float32 in RAS orientation, intensities as in the file.

    `path`: a NIfTI file (with several channels: 4D, channels last), a folder with one DICOM series, or another file that MONAI can read.
    InputError says in words what is wrong with it: missing, damaged, of another shape, without a sane grid, not finite, constant.
    """
    path = Path(path)
    image = _load(path, channels)
    shape = tuple(image.shape[1:])
    if min(shape) < 2:
        raise InputError(f"{path}: found one slice {shape}, needs a volume")
    broken = int(image.numel() - torch.isfinite(image.as_tensor()).sum())
    if broken:
        raise InputError(f"{path}: found {broken} of {image.numel()} voxels NaN or infinite, all must be finite")
    if image.min() == image.max():
        raise InputError(f"{path}: found the value {float(image.min()):g} in every voxel, there is nothing to see")
    return image


def read_label(path: str | Path, image: MetaTensor) -> MetaTensor:
    """The label map as (1, D, H, W) uint8 on the grid of `image` (C, D, H, W), which `read_image` returned.

    InputError when it lies on another grid (shape or affine), or holds anything but the whole numbers 0..255.
    """
    path = Path(path)
    label = _load(path, channels=1)
    if label.shape[1:] != image.shape[1:]:
        raise InputError(
            f"{path}: found a label of shape {tuple(label.shape[1:])}, its image has {tuple(image.shape[1:])}"
        )
    tolerance = 0.1 * float(_spacing(image.affine).min())  # mm, over the whole of the grid
    corner = torch.as_tensor([*image.shape[1:], 1], dtype=torch.float64)
    shift = max(
        float((label.affine.double() - image.affine.double())[:3, :3].abs().max() * max(image.shape[1:])),
        float(((label.affine.double() - image.affine.double()) @ corner).abs().max()),
        float((label.affine - image.affine)[:3, 3].abs().max()),
    )
    if shift > tolerance:
        raise InputError(
            f"{path}: found a label whose grid is off its image's by up to {shift:.3g} mm, {tolerance:.2g} mm is allowed"
        )
    values = label.as_tensor()
    if not torch.isfinite(values).all() or bool((values != values.round()).any()):
        found = values[values != values.round()].flatten()[0]
        raise InputError(f"{path}: found the label value {float(found):g}, only whole numbers are allowed")
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 255:
        raise InputError(f"{path}: found label values {low}..{high}, allowed: 0..255")
    label = MetaTensor(values.to(torch.uint8), affine=image.affine)
    label.meta["filename_or_obj"] = str(path)
    return label


# ---------------------------------------------------------------- loading


def _load(path: Path, channels: int) -> MetaTensor:
    """(channels, D, H, W) float32, RAS; the grid and the shape checked, the values not."""
    _check_readable(path)
    if path.is_dir():
        array, meta = _read_dicom(path)
    elif path.name.endswith(NIFTI):
        array, meta = _read_nifti(path)
    else:
        array, meta = _read_other(path)
    allowed = 3 if channels == 1 else 4
    if array.ndim == 4 and channels == 1 and array.shape[3] == 1:
        array = array[..., 0]  # 4D with one channel is a volume
    if array.ndim != allowed or (channels > 1 and array.shape[3] != channels):
        needs = "a 3D volume" if channels == 1 else f"4D with {channels} channels last"
        raise InputError(f"{path}: found {array.ndim}D data of shape {tuple(array.shape)}, needs {needs}")
    if not 0 < array.size < np.iinfo(np.int64).max or array.dtype.kind not in "iuf":
        raise InputError(f"{path}: found {array.size} values of type {array.dtype}, needs numbers")
    affine = np.asarray(meta["affine"], np.float64)
    check_affine(affine, path)
    array = np.ascontiguousarray(np.moveaxis(array, 3, 0) if channels > 1 else array[None], dtype=np.float32)
    image = MetaTensor(torch.from_numpy(array), affine=torch.as_tensor(affine))
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
            with open(path, "rb"):
                pass
    except FileNotFoundError:
        raise InputError(f"{path}: no such file or folder") from None
    except OSError as error:  # permission, a loop of symbolic links, a name that is too long
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def _read_nifti(path: Path) -> tuple[np.ndarray, dict]:
    data = _nifti_bytes(path)
    kind = nib.Nifti2Image if data[:4] in (b"\x1c\x02\x00\x00", b"\x00\x00\x02\x1c") else nib.Nifti1Image
    reader = NibabelReader()
    reader.filenames = [str(path)]
    try:
        return reader.get_data(kind.from_bytes(data))
    except (
        ValueError,
        OSError,
        TypeError,
        nib.spatialimages.HeaderDataError,
        nib.filebasedimages.ImageFileError,
    ) as error:
        raise InputError(f"{path}: not a NIfTI volume that can be read ({_one_line(error)})") from None


def _nifti_bytes(path: Path) -> bytes:
    """The decompressed file. The header is checked before the data is read, the gzip checksum after it."""
    zipped = path.name.endswith(".gz")
    try:
        with open(path, "rb") as raw:
            if zipped and raw.read(2) != b"\x1f\x8b":
                raise InputError(f"{path}: found a file that is not gzip (wrong first bytes), its name ends in .gz")
            raw.seek(0)
            file = gzip.GzipFile(fileobj=raw) if zipped else raw
            head = file.read(540)
            expected = _check_header(head, path)
            data = head + file.read(max(expected - len(head), 0))
            if len(data) < expected:
                raise InputError(
                    f"{path}: found {len(data)} bytes of data, its header promises {expected}: the file is cut off"
                )
            extra = 0
            while zipped and (block := file.read(1 << 20)):  # to the end, where gzip keeps its checksum
                extra += len(block)
                if extra > 1 << 28:
                    raise InputError(
                        f"{path}: found more than {extra} bytes behind the image, its header promises {expected} in all"
                    )
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: the gzip data is cut off or damaged ({_one_line(error)})") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({_one_line(error)})") from None
    return data


def _check_header(head: bytes, path: Path) -> int:
    """Check a NIfTI header as it is written (nibabel would repair it in silence); returns the bytes that the file must have."""
    kinds = {(348, "little"): nib.Nifti1Header, (348, "big"): nib.Nifti1Header, (540, "little"): nib.Nifti2Header}
    kinds[540, "big"] = nib.Nifti2Header
    for (size, order), kind in kinds.items():
        if len(head) >= size and int.from_bytes(head[:4], order) == size:
            header = kind(head[:size], endianness="<" if order == "little" else ">", check=False)
            break
    else:
        raise InputError(f"{path}: found no NIfTI header (wrong first bytes), needs a .nii or .nii.gz file")
    if header["magic"].item()[:3] not in (b"n+1", b"n+2"):
        raise InputError(f"{path}: found the magic {header['magic'].item()!r}, needs a single-file NIfTI ('n+1')")
    count = int(header["dim"][0])
    dims = [int(n) for n in header["dim"][1 : 1 + max(min(count, 7), 0)]]
    while len(dims) > 3 and dims[-1] == 1:
        dims.pop()
    if not 1 <= count <= 7 or min(dims) < 1:
        raise InputError(f"{path}: found the shape {dims} ({count} dimensions), needs a volume")
    if len(dims) < 3:
        raise InputError(f"{path}: found 2D data of shape {tuple(dims)}, needs a 3D volume")
    if min(dims[:3]) < 2:
        raise InputError(f"{path}: found one slice, shape {tuple(dims)}, needs a volume")
    zooms = header["pixdim"][1:4].astype(np.float64)
    _check_spacing(zooms, path)
    try:
        itemsize = header.get_data_dtype().itemsize
    except nib.spatialimages.HeaderDataError as error:
        raise InputError(f"{path}: found an unknown data type ({_one_line(error)})") from None
    offset = float(header["vox_offset"])
    if not (np.isfinite(offset) and 0 <= offset < 2**30):
        raise InputError(f"{path}: found the data offset {offset}, needs a number of bytes")
    expected = (
        max(int(offset), len(head[: int.from_bytes(head[:4], order)]) + 4) + int(np.prod(dims, dtype=object)) * itemsize
    )
    if expected > MAX_BYTES:
        raise InputError(
            f"{path}: found the shape {tuple(dims)}, {expected / 2**30:.0f} GiB; at most {MAX_BYTES >> 30} GiB is read"
        )
    return expected


def _read_dicom(path: Path) -> tuple[np.ndarray, dict]:
    files = dicom.check_series(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            reader = PydicomReader()
            datasets = reader.read([str(file) for file in files])
            reader.has_series, reader.filenames = True, [[str(file) for file in files]]
            return reader.get_data(datasets)
        except Exception as error:  # pydicom's decoders raise whatever their library raises
            raise InputError(f"{path}: the DICOM series cannot be decoded ({_one_line(error)})") from None


def _read_other(path: Path) -> tuple[np.ndarray, dict]:
    try:
        image = LoadImage(image_only=True)(str(path))
    except Exception as error:  # MONAI tries all its readers and raises RuntimeError, OptionalImportError, ...
        raise InputError(
            f"{path}: cannot be read, needs .nii, .nii.gz or a folder with a DICOM series; other formats as far as MONAI's readers are "
            f"installed, e.g. pynrrd for .nrrd ({_one_line(error)[:200]})"
        ) from None
    return np.asarray(image), {"affine": image.affine.numpy()}


def check_affine(affine: np.ndarray, path: str | Path) -> None:
    """InputError when the grid of `affine` (4, 4; voxels to mm) is not finite, singular, sheared, or of absurd spacing."""
    if affine.shape != (4, 4) or not np.isfinite(affine).all():
        raise InputError(f"{path}: found an affine with values that are not finite, needs a 4x4 matrix of numbers")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    _check_spacing(spacing, path)
    directions = affine[:3, :3] / spacing
    if abs(np.linalg.det(directions)) < 1e-3:
        raise InputError(f"{path}: found a singular affine (two axes point the same way), needs three independent axes")
    shear = np.abs(directions.T @ directions - np.eye(3)).max()
    if shear > 0.01:
        raise InputError(
            f"{path}: found a sheared affine (cosine {shear:.3f} between axes), needs a right-angled grid: resample it first"
        )


def _check_spacing(spacing: np.ndarray, path: str | Path) -> None:
    low, high = SPACING_LIMITS
    if not all(low <= abs(mm) <= high and mm > 0 for mm in spacing.tolist()):
        raise InputError(
            f"{path}: found the spacing {[float(f'{mm:.4g}') for mm in spacing.tolist()]} mm, allowed: {low:g}..{high:g}"
        )


def _spacing(affine: torch.Tensor) -> torch.Tensor:
    return affine[:3, :3].double().norm(dim=0)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# ---------------------------------------------------------------- preprocessing


@dataclass(frozen=True)
class Preprocessing:
    """From a volume as scanned to what a network sees. Order: resample, scale intensities, crop to the foreground.

    `window` maps low..high (HU) to [0, 1]; `percentiles` maps the low..high per cent of the case to [0, 1]; `zscore` normalises each channel
    by mean and deviation of its non-zero voxels. `dtype` is what the cache stores: int16, or uint8 at half the bytes and 1/255 steps.
    """

    spacing: Triple | None = None  # mm (D, H, W); None keeps the file's
    intensity: Literal["window", "percentiles", "zscore"] = "window"
    low: float = -1000.0
    high: float = 1000.0
    foreground_threshold: float | None = (
        0.05  # on the [0, 1] scale; None crops nothing. Our choice (HU > -900), as the margin
    )
    margin: int = 8  # voxels kept around the foreground
    channels: int = 1
    dtype: Literal["int16", "uint8"] = "int16"

    def __post_init__(self):
        if self.spacing is not None and not all(0 < mm < 1000 for mm in self.spacing):
            raise InputError(f"spacing: found {self.spacing}, needs three positive numbers of mm")
        if self.intensity == "window" and not self.low < self.high:
            raise InputError(f"low, high: found {self.low:g} and {self.high:g}, low must be below high")
        if self.intensity == "percentiles" and not 0 <= self.low < self.high <= 100:
            raise InputError(
                f"low, high: found {self.low:g} and {self.high:g}, percentiles need 0 <= low < high <= 100"
            )

    def apply(self, image: MetaTensor, label: MetaTensor | None = None) -> tuple[MetaTensor, MetaTensor | None]:
        """`image` (C, D, H, W) and `label` (1, D, H, W) from `read_image`, `read_label` -> both preprocessed, affines kept true.

        The foreground box comes from the image alone, never from the label. InputError when nothing is left, or HU cannot be HU.
        """
        where = image.meta.get("filename_or_obj", "image")
        if self.intensity == "window":
            check_hounsfield(image.as_tensor(), self.low, self.high, where)
        if self.spacing is not None:
            image = Spacing(self.spacing, mode="bilinear", padding_mode="border", dtype=torch.float32)(image)
            label = (
                label
                if label is None
                else Spacing(self.spacing, mode="nearest", padding_mode="border")(label).to(torch.uint8)
            )
        image = self._scale(image)
        if self.foreground_threshold is not None:
            image, label = self._crop(image, label, where)
        return image, label

    def _scale(self, image: MetaTensor) -> MetaTensor:
        if self.intensity == "window":
            return ScaleIntensityRange(self.low, self.high, 0.0, 1.0, clip=True)(image)
        if self.intensity == "percentiles":
            return ScaleIntensityRangePercentiles(self.low, self.high, 0.0, 1.0, clip=True, channel_wise=True)(image)
        return NormalizeIntensity(nonzero=True, channel_wise=True)(image)

    def _crop(self, image: MetaTensor, label: MetaTensor | None, where: str) -> tuple[MetaTensor, MetaTensor | None]:
        def foreground(x: torch.Tensor) -> torch.Tensor:
            return x != 0 if self.intensity == "zscore" else x > self.foreground_threshold

        crop = CropForeground(select_fn=foreground, margin=self.margin, allow_smaller=True)
        start, stop = crop.compute_bounding_box(image)
        if min(int(b) - int(a) for a, b in zip(start, stop)) < 1 or not bool(foreground(image.as_tensor()).any()):
            raise InputError(
                f"{where}: no voxel is above {self.foreground_threshold:g} of the intensity range, there is no foreground"
            )
        return crop.crop_pad(image, start, stop), label if label is None else crop.crop_pad(label, start, stop)


def check_hounsfield(image: torch.Tensor, low: float, high: float, where: str | Path) -> None:
    """InputError when intensities meant to be HU cannot be: scaled already, without the rescale offset, or out of any scanner's range.

    Only for windows at least 100 wide, which are HU; thresholds are our choice.
    """
    if high - low < 100:
        return
    values = image.flatten()[:: max(1, image.numel() // 1_000_000)]
    least, most = float(image.min()), float(image.max())
    found = f"{where}: found intensities {least:g}..{most:g}"
    if most - least < 50:
        raise InputError(f"{found}, which are not HU: a range below 50 looks scaled already")
    if least < -33_000 or most > 70_000:
        raise InputError(f"{found}, implausible as HU: a scanner stores -32768..65535")
    if float(((values >= low) & (values <= high)).float().mean()) < 0.001:
        raise InputError(f"{found}, hardly any between {low:g} and {high:g}: implausible as HU")
    if least >= 0 and float((values > 800).float().mean()) > 0.2:
        raise InputError(
            f"{found}, implausible as HU: none below 0 and a fifth above 800, the rescale offset seems lost"
        )
