"""Preprocessing of a volume with MONAI's transforms: resampling, intensity scaling, foreground crop."""

from pathlib import Path

import torch
from monai.data import MetaTensor
from monai.transforms import CropForeground, NormalizeIntensity, ScaleIntensityRangePercentiles, Spacing

from common.config import shown
from common.data.geometry import check_size
from common.data.preprocessing import Preprocessing, is_hounsfield
from common.errors import InputError

# image, and label if there is one
Pair = tuple[MetaTensor, MetaTensor | None]


def preprocess(image: MetaTensor, label: MetaTensor | None, settings: Preprocessing, overwrite: bool = False) -> Pair:
    """Return `image` (C, D, H, W) and `label` (1, D, H, W) preprocessed, with their new affines.

    The foreground is found in the image alone, never in the label.

    Args:
        overwrite: may use the memory of `image`, which saves a copy of the volume.

    Raises:
        InputError: the modality is not CT or the intensities cannot be HU, for a window; or there is no foreground.
    """
    where = image.meta.get("filename_or_obj", "image")
    if settings.intensity == "window":
        if settings.modality == "CT":
            check_modality(image.meta.get("modality"), settings, where)
        check_hounsfield(image.as_tensor(), settings.low, settings.high, where)
    if settings.spacing is not None:
        resampled = [n * float(mm) / new for n, mm, new in zip(image.shape[1:], image.pixdim, settings.spacing)]
        check_size([max(1, n) for n in resampled], f"{where} at a spacing of {shown(settings.spacing)} mm")
        image = Spacing(settings.spacing, mode="bilinear", padding_mode="border", dtype=torch.float32)(image)
        if label is not None:
            nearest = Spacing(settings.spacing, mode="nearest", padding_mode="border", dtype=torch.float32)
            label = nearest(label).to(torch.uint8)
    image = _scale(image, settings, overwrite)
    return (image, label) if settings.foreground_threshold is None else _crop(image, label, settings, where)


def _scale(image: MetaTensor, settings: Preprocessing, overwrite: bool) -> MetaTensor:
    if settings.intensity == "zscore":
        return NormalizeIntensity(nonzero=True, channel_wise=True)(image)
    if settings.intensity == "percentiles":
        limits = settings.low, settings.high, 0.0, 1.0
        return ScaleIntensityRangePercentiles(*limits, clip=True, channel_wise=True)(image)
    # in place, where MONAI's ScaleIntensityRange makes three copies of the volume
    image = image.sub_(settings.low) if overwrite else image - settings.low
    return image.div_(settings.high - settings.low).clamp_(0, 1)


def _crop(image: MetaTensor, label: MetaTensor | None, settings: Preprocessing, where: str) -> Pair:
    def foreground(x: torch.Tensor) -> torch.Tensor:
        return x != 0 if settings.intensity == "zscore" else x > settings.foreground_threshold

    if not bool(foreground(image.as_tensor()).any()):
        limit = f"{settings.foreground_threshold:g} of the intensity range"
        raise InputError(f"{where}: found no voxel above {limit}, expected a foreground to crop to")
    crop = CropForeground(select_fn=foreground, margin=settings.margin, allow_smaller=True)
    start, stop = crop.compute_bounding_box(image)
    return crop.crop_pad(image, start, stop), label if label is None else crop.crop_pad(label, start, stop)


def check_modality(modality: str | None, settings: Preprocessing, where: str | Path) -> None:
    """Raise InputError if a DICOM series is not CT and the window is in HU."""
    if modality not in (None, "CT") and is_hounsfield(settings.low, settings.high):
        raise InputError(
            f"{where}: found modality {modality}, expected CT for a window in HU; --modality any accepts others"
        )


def check_hounsfield(image: torch.Tensor, low: float, high: float, where: str | Path) -> None:
    """Raise InputError if intensities cannot be HU: scaled to [0, 1], without the rescale offset, or out of range.

    The thresholds are our choice.
    """
    if not is_hounsfield(low, high):
        return
    least, most = map(float, image.aminmax())
    sample = image.flatten()[:: max(1, image.numel() // 1_000_000)]
    found = f"{where}: found intensities {least:g}..{most:g}, expected HU"
    if most - least < 50:
        raise InputError(f"{found}: a range below 50 looks scaled already")
    if least < -33_000 or most > 70_000:
        raise InputError(f"{found}: scanners store -32768..65535")
    if float(((sample >= low) & (sample <= high)).float().mean()) < 0.001:
        raise InputError(f"{found}: hardly any lie in {low:g}..{high:g}")
    if least >= 0 and float((sample > 800).float().mean()) > 0.2:
        raise InputError(f"{found}: none is below 0 and a fifth is above 800, so the rescale offset seems lost")
