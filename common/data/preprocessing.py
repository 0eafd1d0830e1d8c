"""Preprocessing of a scanned volume with MONAI's transforms: resampling, intensity scaling, foreground crop."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from monai.data import MetaTensor
from monai.transforms import (
    CropForeground,
    NormalizeIntensity,
    ScaleIntensityRange,
    ScaleIntensityRangePercentiles,
    Spacing,
)

from common.errors import InputError


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
