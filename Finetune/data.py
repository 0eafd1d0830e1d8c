"""Training crops from cached volumes: foreground-balanced, augmented, a function of (seed, position) alone."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from monai.data import get_track_meta, set_track_meta
from monai.transforms import (
    Compose,
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
from common.errors import InputError
from Finetune.cases import class_of
from Finetune.presets import Augmentation, Preset

KEYS = ("image", "label")


class CropDataset(Dataset):
    """`crops` crops of `roi` voxels per volume: {"image": (crops, C, d, h, w) float32, "label": (crops, 1, d, h, w)
    uint8}.

    The index is (position, volume): position in the stream of samples, from which all randomness is drawn.
    """

    def __init__(
        self,
        entries: Sequence[CachedVolume],
        roi: tuple[int, int, int],
        augmentation: Augmentation,
        crops: int = 4,
        seed: int = 0,
    ):
        if crops < 1:
            raise InputError(f"crops: found {crops}, needs at least 1 per volume")
        self.entries, self.roi, self.crops, self.seed = list(entries), tuple(roi), crops, seed
        self.augment = augmentations(augmentation, self.roi)

    def __len__(self) -> int:
        return len(self.entries)

    def name(self, index: int) -> str:
        return self.entries[index].name

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        position, index = key
        entry, rng = self.entries[index], generator(self.seed, position)
        crops = []
        for _ in range(self.crops):
            start = crop_start(entry, self.roi, rng)
            crop = {"image": entry.read(start, self.roi), "label": entry.read_label(start, self.roi)}
            self.augment.set_random_state(seed=int(torch.randint(2**31, (), generator=rng)))
            with plain_tensors():
                crops.append(self.augment(crop))
        return {key: torch.stack([crop[key] for crop in crops]) for key in KEYS}


@contextmanager
def plain_tensors() -> Iterator[None]:
    """MONAI's transforms on plain tensors, without metadata: half the cost of a crop. The switch is global, so it is
    put back."""
    before = get_track_meta()
    set_track_meta(False)
    try:
        yield
    finally:
        set_track_meta(before)


def crop_start(entry: CachedVolume, roi: Sequence[int], rng: torch.Generator) -> tuple[int, ...]:
    """First voxel of a random crop: half of them around a voxel of a foreground class (each class as likely as any
    other, so that small organs are seen), half anywhere. Where the volume is smaller than the crop, it sits in the
    middle of it."""
    classes = [number for number in sorted(entry.class_points) if number != 0 and len(entry.class_points[number])]
    if classes and torch.rand((), generator=rng) < 0.5:
        points = entry.class_points[classes[int(torch.randint(len(classes), (), generator=rng))]]
        centre = points[int(torch.randint(len(points), (), generator=rng))]
        wanted = [int(c) - size // 2 for c, size in zip(centre, roi)]
    else:
        spans = [max(have - size, 0) for have, size in zip(entry.shape, roi)]
        wanted = [int(torch.randint(span + 1, (), generator=rng)) for span in spans]
    return tuple(
        min(max(first, 0), have - size) if have >= size else -((size - have) // 2)
        for first, have, size in zip(wanted, entry.shape, roi)
    )


def augmentations(probability: Augmentation, roi: Sequence[int]) -> Compose:
    """MONAI's random transforms with the preset's probabilities. Quarter turns and rotations stay in the plane of the
    first two axes (left-right, back-front), and need it to be square."""
    chosen = []
    if probability.affine:
        chosen.append(
            RandAffined(
                KEYS,
                prob=probability.affine,
                rotate_range=(0.0, 0.0, torch.pi / 15),
                scale_range=(0.1, 0.1, 0.1),
                mode=("bilinear", "nearest"),
                padding_mode="border",
            )
        )
    if probability.flip:
        chosen += [RandFlipd(KEYS, prob=probability.flip, spatial_axis=axis) for axis in range(3)]
    if probability.rotate90 and roi[0] == roi[1]:
        chosen.append(RandRotate90d(KEYS, prob=probability.rotate90, max_k=3, spatial_axes=(0, 1)))
    if probability.scale_intensity:
        chosen.append(RandScaleIntensityd("image", factors=0.1, prob=probability.scale_intensity))
    if probability.shift_intensity:
        chosen.append(RandShiftIntensityd("image", offsets=0.1, prob=probability.shift_intensity))
    if probability.noise:
        chosen.append(RandGaussianNoised("image", prob=probability.noise, std=0.01))
    return Compose(chosen)


class VolumeDataset(Dataset):
    """Whole volumes at one size: {"image": (C, *roi), "target": class number}. Flips are drawn from (seed, position)
    alone."""

    def __init__(self, entries: Sequence[CachedVolume], preset: Preset, roi: tuple[int, int, int], seed: int = 0):
        self.entries, self.preset, self.roi, self.seed = list(entries), preset, tuple(roi), seed
        self.targets = [class_of(preset, entry.source) for entry in entries]

    def __len__(self) -> int:
        return len(self.entries)

    def name(self, index: int) -> str:
        return self.entries[index].name

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        position, index = key
        image = resized(self.entries[index], self.roi)
        draws = torch.rand(3, generator=generator(self.seed, position))
        axes = [axis + 1 for axis in range(3) if draws[axis] < self.preset.augmentation.flip]
        return {"image": image.flip(axes), "target": torch.tensor(self.targets[index])}


def resized(entry: CachedVolume, roi: Sequence[int]) -> Tensor:
    """The whole volume (C, *roi), trilinearly."""
    image = entry.read((0, 0, 0), entry.shape)
    return F.interpolate(image[None], size=tuple(roi), mode="trilinear", align_corners=False)[0]
