"""Arrays of a cached volume: reduced levels, reading of boxes, and trilinear resizing as torch does it."""

import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.cache import storage

SIZES = [((40, 33, 21), (24, 24, 24)), ((9, 12, 30), (32, 5, 31)), ((8, 8, 8), (8, 8, 8))]


def test_reduced_levels_are_means_without_aliasing():
    ramp = torch.arange(101.0)[None, :, None, None].expand(1, 101, 4, 4)
    half = storage.halve(ramp, 1)
    assert half.shape[1] == 51
    torch.testing.assert_close(half.mean(), ramp.mean())
    middle = (torch.arange(51) + 0.5) * 101 / 51 - 0.5
    torch.testing.assert_close(half[0, :, 0, 0], middle, atol=0.03, rtol=0)
    stripes = (torch.arange(64) % 2).float()[None, :, None, None].expand(1, 64, 4, 4)
    assert (storage.halve(stripes, 1) == 0.5).all()


@pytest.mark.parametrize("dtype", [np.int16, np.uint8])
def test_a_box_is_read_to_its_place(tmp_path, dtype):
    numbers = np.random.default_rng(0).integers(0, 255, (2, 70, 90, 40)).astype(dtype)
    storage.write(tmp_path / "image.b2nd", numbers)
    assert storage.number_type(tmp_path / "image.b2nd") == dtype
    buffer = np.full(2 * 5 * 40 * 39 + 7, 9, dtype)
    storage.read_into(tmp_path / "image.b2nd", (62, 50, 1), buffer[3:-4].reshape(2, 5, 40, 39))
    assert (buffer[3:-4].reshape(2, 5, 40, 39) == numbers[:, 62:67, 50:90, 1:40]).all()
    assert (buffer[:3] == 9).all() and (buffer[-4:] == 9).all()


def test_thick_slices_are_not_reduced_further():
    assert storage.reduced_shape((512, 512, 60), (0.8, 0.8, 5.0)) == (256, 256, 60)
    assert storage.reduced_shape((200, 200, 201), (1.0, 1.0, 1.2)) == (100, 100, 101)
    assert storage.reduced_shape((40, 20, 40), (1.0, 1.0, 1.0)) == (20, 20, 20)


def test_a_box_is_read_faster_than_the_volume(tmp_path):
    big = np.random.default_rng(0).integers(0, 900, (224, 224, 224)).astype(np.int16)
    storage.write(tmp_path / "image.b2nd", big[None])
    storage.read_box(tmp_path / "image.b2nd", (0, 0, 0), (8, 8, 8))

    def seconds(size):
        start = time.perf_counter()
        storage.read_box(tmp_path / "image.b2nd", (64, 64, 64), size)
        return time.perf_counter() - start

    small = min(seconds((32, 32, 32)) for _ in range(5))
    assert small < min(seconds((160, 160, 160)) for _ in range(3)) / 10


@pytest.mark.parametrize("shape, size", SIZES)
@pytest.mark.parametrize("slab", [64, 1 << 18])
def test_trilinear_equals_interpolate(shape, size, slab, monkeypatch):
    monkeypatch.setattr(storage, "SLAB", slab)
    image = torch.rand(2, *shape)
    wanted = F.interpolate(image[None], size=size, mode="trilinear", align_corners=False)[0]
    torch.testing.assert_close(storage.trilinear(image, size), wanted, atol=2e-6, rtol=1e-5)


def test_trilinear_of_a_strided_view():
    image = torch.rand(1, 20, 20, 20)[:, 3:15, ::2, 4:]
    wanted = F.interpolate(image[None], size=(7, 7, 7), mode="trilinear", align_corners=False)[0]
    torch.testing.assert_close(storage.trilinear(image, (7, 7, 7)), wanted, atol=2e-6, rtol=1e-5)
