"""Crops: balanced, aligned with their labels, determined by seed and position."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import get_track_meta

from common.cli import parse
from common.errors import InputError
from Finetune.data import CropDataset, VolumeDataset, crop_start
from Finetune.presets import Augmentation, load_preset
from Finetune.settings import FinetuneSettings

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


def augmented(image, position=0, **settings):
    """Return the crop of a volume that is as large as the crop, so that nothing but the augmentation changes it."""
    number = Numbered(image)
    return CropDataset([number], number.shape, Augmentation(**settings), crops=1, seed=3)[position, 0]


@dataclass
class Numbered:
    """A stand-in for `CachedVolume` without classes: its label is its image in bytes."""

    image: torch.Tensor
    class_points: dict = field(default_factory=dict)

    @property
    def shape(self):
        return tuple(self.image.shape)

    def read(self, start, size):
        return self.image[None].float()

    def read_label(self, start, size):
        return (self.image[None] * 255).to(torch.uint8)


def ramp(axis, size=12):
    """Return a volume whose values rise from 0 to 1 along one axis."""
    shape = [size if axis == other else 1 for other in range(3)]
    return torch.linspace(0, 1, size).view(shape).expand(size, size, size).clone()


@pytest.mark.parametrize("axes", [(0,), (1, 2)])
def test_flips_stay_on_their_axes(axes):
    for axis in range(3):
        image = ramp(axis)
        crops = [augmented(image, n, flip=0.5, flip_axes=axes)["image"][0, 0] for n in range(20)]
        flipped = [torch.equal(crop, image.flip(axis)) for crop in crops]
        assert any(flipped) == (axis in axes) and not all(flipped)
        assert all(torch.equal(crop, image) for crop, flip in zip(crops, flipped) if not flip)


def test_scans_are_flipped_on_their_axes_only():
    preset = replace(load_preset("CC_CCII"), augmentation=Augmentation(flip=0.5, flip_axes=(1,)))
    for axis in range(3):
        scan = Numbered(ramp(axis))
        scan.source = Path("Normal/1-1.nii.gz")
        scans = VolumeDataset([scan], preset, scan.shape)
        moved = [not torch.equal(scans[n, 0]["image"][0], scan.image) for n in range(20)]
        assert any(moved) == (axis == 1) and not all(moved)


@pytest.mark.parametrize("axis", range(3))
def test_rotations_are_about_their_axis(axis):
    settings = {"affine": 1.0, "zoom": 0.0, "rotation": tuple(12.0 * (axis == other) for other in range(3))}
    for other in range(3):
        change = (augmented(ramp(other), **settings)["image"][0, 0] - ramp(other)).abs().max()
        assert (change < 1e-5) == (other == axis)


def test_translations_and_zooms_stay_within_their_range():
    coordinate = ramp(0, size=21) * 20
    middle = []
    for position in range(50):
        crop = augmented(coordinate, position, affine=1.0, rotation=(0.0, 0.0, 0.0), zoom=0.0, translation=0.2)
        middle.append(float(crop["image"][0, 0, 10, 10, 10]) - 10)
        zoomed = augmented(coordinate, position, affine=1.0, rotation=(0.0, 0.0, 0.0), zoom=0.2)["image"][0, 0, 10:12]
        assert 0.8 <= float(zoomed[1, 10, 10] - zoomed[0, 10, 10]) <= 1.2
    assert max(map(abs, middle)) <= 0.2 * 21 and min(middle) < -2 and max(middle) > 2


def test_gamma_keeps_order_range_and_labels():
    image = ramp(1)
    sample, again = (augmented(image, 4, gamma=1.0, gamma_range=(2.0, 3.0)) for _ in range(2))
    values = sample["image"][0, 0, 0, :, 0]
    assert torch.equal(sample["image"], again["image"])
    assert (values.diff() > 0).all() and values[0] == 0 and values[-1] == pytest.approx(1, abs=1e-5)
    assert (values[1:-1] < image[0, 1:-1, 0] ** 1.99).all()
    assert torch.equal(sample["label"][0, 0], (image * 255).to(torch.uint8))
