"""Crops: balanced, aligned with their labels, determined by seed and position."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from monai.data import get_track_meta

from common.cli import parse
from common.errors import InputError
from Finetune.data import CropDataset, crop_start
from Finetune.main_finetune import FinetuneSettings
from Finetune.presets import Augmentation

ALL = Augmentation(flip=0.5, rotate90=0.5)


@dataclass
class Volume:
    """A stand-in for `CachedVolume` whose image is a tenth of its label."""

    label: torch.Tensor
    class_points: dict = field(init=False)

    def __post_init__(self):
        numbers = np.unique(self.label.numpy())
        self.class_points = {int(n): np.argwhere(self.label.numpy() == n).astype(np.int32) for n in numbers}

    @property
    def shape(self):
        return tuple(self.label.shape)

    def read(self, start, size):
        return self.read_label(start, size).float() / 10

    def read_label(self, start, size):
        out = torch.zeros(size, dtype=torch.uint8)
        inner = [slice(max(s, 0), min(s + n, m)) for s, n, m in zip(start, size, self.shape)]
        outer = [slice(i.start - s, i.stop - s) for i, s in zip(inner, start)]
        out[tuple(outer)] = self.label[tuple(inner)]
        return out[None]


@pytest.fixture
def volume():
    label = torch.zeros(60, 50, 40, dtype=torch.uint8)
    # a large class and one of 8 voxels
    label[5:35, 5:35, 5:35] = 1
    label[50:52, 40:42, 30:32] = 2
    return Volume(label)


def test_half_of_the_crops_are_centred_on_classes_equally(volume):
    rng = torch.Generator().manual_seed(0)
    roi, small, large = (9, 9, 9), 0, 0
    for _ in range(2000):
        start = crop_start(volume, roi, rng)
        assert all(0 <= s <= have - n for s, have, n in zip(start, volume.shape, roi))
        centre = tuple(s + n // 2 for s, n in zip(start, roi))
        small += volume.label[centre] == 2
        large += volume.label[centre] == 1
    # a quarter each; background crops are often centred on the large class too, and on the small one hardly ever
    assert 0.21 < small / 2000 < 0.29
    assert 0.33 < large / 2000 < 0.48


def test_fewer_than_one_crop_is_refused():
    with pytest.raises(InputError, match="--crops 0"):
        parse(FinetuneSettings, ["--crops", "0"])


def test_a_volume_smaller_than_the_crop_is_in_its_middle(volume):
    rng = torch.Generator().manual_seed(0)
    start = crop_start(volume, (64, 55, 16), rng)
    assert start[:2] == (-2, -2) and 0 <= start[2] <= 24


def test_crops_depend_on_seed_and_position_only(volume):
    crops = CropDataset([volume, volume], (16, 16, 16), ALL, crops=3, seed=5)
    again = CropDataset([volume, volume], (16, 16, 16), ALL, crops=3, seed=5)
    # samples read before do not matter
    again[9, 1]
    first = crops[4, 0]
    assert first["image"].shape == (3, 1, 16, 16, 16) and first["label"].dtype == torch.uint8
    assert torch.equal(first["image"], again[4, 0]["image"])
    assert not torch.equal(first["image"], crops[5, 0]["image"])
    other = CropDataset([volume], (16, 16, 16), ALL, crops=3, seed=6)
    assert not torch.equal(first["image"], other[4, 0]["image"])


def test_image_and_label_move_together_and_are_plain_tensors(volume):
    crops = CropDataset([volume], (16, 16, 16), ALL, crops=4, seed=0)
    moved = 0
    still = CropDataset([volume], (16, 16, 16), Augmentation(), crops=4, seed=0)
    for position in range(10):
        sample = crops[position, 0]
        assert torch.equal((sample["image"] * 10).round().to(torch.uint8), sample["label"])
        assert type(sample["image"]) is torch.Tensor and type(sample["label"]) is torch.Tensor
        moved += not torch.equal(sample["label"], still[position, 0]["label"])
    assert moved > 3 and get_track_meta()


def test_affine_keeps_label_ids_and_aligned_intensities(volume):
    crops = CropDataset([volume], (16, 16, 16), Augmentation(affine=1.0, noise=1.0), crops=8, seed=0)
    sample = crops[0, 0]
    assert set(sample["label"].unique().tolist()) <= {0, 1, 2}
    agreement = ((sample["image"] * 10 - sample["label"]).abs() < 0.6).float().mean()
    assert agreement > 0.9 and not torch.equal(sample["image"], sample["image"].round(decimals=1))
