"""Training samples from cached volumes. Each depends on the seed and its position in the stream of samples only."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from monai.data import get_track_meta, set_track_meta
from monai.transforms import (
    Compose,
    RandAdjustContrastd,
    RandAffined,
    RandFlipd,
    RandGaussianNoised,
    RandRotate90d,
    RandScaleIntensityd,
    RandShiftIntensityd,
)
from torch import Tensor
from torch.utils.data import Dataset

from common.cache.volume import CachedVolume
from common.data.sampler import generator
from Finetune.cases import class_of
from Finetune.presets import Augmentation, Preset

KEYS = ("image", "label")
Volumes = Sequence[CachedVolume]


class CachedVolumes(Dataset):
    """Base of the data sets. All randomness of a sample is drawn from the seed and its position in the stream."""

    def __init__(self, volumes: Volumes, roi: tuple[int, int, int], seed: int):
        self.volumes, self.roi, self.seed = list(volumes), tuple(roi), seed

    def __len__(self) -> int:
        return len(self.volumes)

    def name(self, index: int) -> str:
        return self.volumes[index].name


class CropDataset(CachedVolumes):
    """Augmented crops, balanced between foreground and background.

    `dataset[position, index]` is {"image": (crops, C, *roi) float32, "label": (crops, 1, *roi) uint8} of the volume
    `index`, at the place `position` in the stream of samples.

    Args:
        roi: voxels (D, H, W) of a crop.
        crops: crops per sample.
    """

    def __init__(
        self, volumes: Volumes, roi: tuple[int, int, int], augmentation: Augmentation, crops: int = 4, seed: int = 0
    ):
        super().__init__(volumes, roi, seed)
        self.crops, self.augment = crops, augmentations(augmentation, self.roi)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        position, index = key
        volume, rng = self.volumes[index], generator(self.seed, position)
        crops = []
        for _ in range(self.crops):
            start = crop_start(volume, self.roi, rng)
            crop = {"image": volume.read(start, self.roi), "label": volume.read_label(start, self.roi)}
            self.augment.set_random_state(seed=int(torch.randint(2**31, (), generator=rng)))
            with plain_tensors():
                crops.append(self.augment(crop))
        return {key: torch.stack([crop[key] for crop in crops]) for key in KEYS}


@contextmanager
def plain_tensors() -> Iterator[None]:
    """Let MONAI's transforms return plain tensors without metadata, at half the time of a crop.

    The switch is global in MONAI, so it is restored afterwards.
    """
    before = get_track_meta()
    set_track_meta(False)
    try:
        yield
    finally:
        set_track_meta(before)


def crop_start(volume: CachedVolume, roi: Sequence[int], rng: torch.Generator) -> tuple[int, ...]:
    """Return the first voxel (D, H, W) of a random crop.

    Half of the crops are centred on a voxel of a foreground class, each class with the same probability so that small
    organs are seen, and half are anywhere. A volume smaller than the crop is in its middle.
    """
    classes = [number for number, points in sorted(volume.class_points.items()) if number != 0 and len(points)]
    if classes and torch.rand((), generator=rng) < 0.5:
        points = volume.class_points[classes[int(torch.randint(len(classes), (), generator=rng))]]
        centre = points[int(torch.randint(len(points), (), generator=rng))]
        wanted = [int(c) - size // 2 for c, size in zip(centre, roi)]
    else:
        spans = [max(have - size, 0) for have, size in zip(volume.shape, roi)]
        wanted = [int(torch.randint(span + 1, (), generator=rng)) for span in spans]
    return tuple(
        min(max(first, 0), have - size) if have >= size else -((size - have) // 2)
        for first, have, size in zip(wanted, volume.shape, roi)
    )


def augmentations(a: Augmentation, roi: Sequence[int]) -> Compose:
    """Return MONAI's random transforms with the probabilities and ranges of the preset.

    Quarter turns are in the plane of the first two axes (left-right, back-front), and left out unless these axes of the
    crop are equal.
    """
    transforms = [
        RandAffined(
            KEYS,
            prob=a.affine,
            rotate_range=[math.radians(angle) for angle in a.rotation],
            scale_range=[a.zoom] * 3,
            # None draws no random numbers
            translate_range=[a.translation * size for size in roi] if a.translation else None,
            mode=("bilinear", "nearest"),
            padding_mode="border",
        ),
        *(RandFlipd(KEYS, prob=a.flip, spatial_axis=axis) for axis in a.flip_axes),
        RandRotate90d(KEYS, prob=a.rotate90 if roi[0] == roi[1] else 0.0, max_k=3, spatial_axes=(0, 1)),
        RandScaleIntensityd("image", factors=0.1, prob=a.scale_intensity),
        RandShiftIntensityd("image", offsets=0.1, prob=a.shift_intensity),
        RandAdjustContrastd("image", prob=a.gamma, gamma=a.gamma_range),
        RandGaussianNoised("image", prob=a.noise, std=0.01),
    ]
    return Compose([transform for transform in transforms if transform.prob > 0])


class VolumeDataset(CachedVolumes):
    """Volumes resized to `roi`, with their class, for classification.

    `dataset[position, index]` is {"image": (C, *roi), "target": class number} of the volume `index`, randomly flipped.
    """

    def __init__(self, volumes: Volumes, preset: Preset, roi: tuple[int, int, int], seed: int = 0):
        super().__init__(volumes, roi, seed)
        self.preset, self.targets = preset, [class_of(preset, volume.source) for volume in volumes]

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        position, index = key
        image = resized(self.volumes[index], self.roi)
        draws = torch.rand(3, generator=generator(self.seed, position))
        augmentation = self.preset.augmentation
        axes = [axis + 1 for axis in augmentation.flip_axes if draws[axis] < augmentation.flip]
        return {"image": image.flip(axes), "target": torch.tensor(self.targets[index])}


def resized(volume: CachedVolume, roi: Sequence[int]) -> Tensor:
    """Return the image of a volume resized trilinearly to (C, *roi)."""
    image = volume.read((0, 0, 0), volume.shape)
    return F.interpolate(image[None], size=tuple(roi), mode="trilinear", align_corners=False)[0]
