"""The slab-wise resize gives torch's trilinear interpolation."""

import pytest
import torch
import torch.nn.functional as F

from common.cache import storage

SIZES = [((40, 33, 21), (24, 24, 24)), ((9, 12, 30), (32, 5, 31)), ((8, 8, 8), (8, 8, 8))]


@pytest.mark.parametrize("shape, size", SIZES)
@pytest.mark.parametrize("slab", [64, 1 << 18])
def test_equals_interpolate(shape, size, slab, monkeypatch):
    monkeypatch.setattr(storage, "SLAB", slab)
    image = torch.rand(2, *shape)
    wanted = F.interpolate(image[None], size=size, mode="trilinear", align_corners=False)[0]
    torch.testing.assert_close(storage.trilinear(image, size), wanted, atol=2e-6, rtol=1e-5)


def test_a_view_of_the_tensor_is_resized_as_well():
    image = torch.rand(1, 20, 20, 20)[:, 3:15, ::2, 4:]
    wanted = F.interpolate(image[None], size=(7, 7, 7), mode="trilinear", align_corners=False)[0]
    torch.testing.assert_close(storage.trilinear(image, (7, 7, 7)), wanted, atol=2e-6, rtol=1e-5)
