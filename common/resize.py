"""Trilinear resizing of one volume on one core, in slabs that stay in its cache.

The same values as `torch.nn.functional.interpolate(mode="trilinear", align_corners=False)`, axis by axis. Why our own:
a loader resizes ten views per volume, for which torch takes about twice as long.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

SLAB = 1 << 18  # voxels of a slab between two axes: 1 MB of float32


def trilinear(image: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """`image` (C, D, H, W) of any number type -> (C, *size) float32."""
    x, size = image.numpy(), tuple(int(n) for n in size)
    out = np.empty((x.shape[0], *size), np.float32)
    first, second = _taps(x.shape[1], size[0]), _taps(x.shape[2], size[1])
    rows = max(1, SLAB // max(1, x.shape[2] * x.shape[3]))
    for channel, target in zip(x, out):
        for start in range(0, size[0], rows):
            stop = min(start + rows, size[0])
            slab = _mix(channel, 0, [tap[start:stop] for tap in first])  # (r, H, W)
            slab = _mix(slab, 1, second)  # (r, size 1, W)
            flat = torch.from_numpy(slab).view(1, -1, slab.shape[2])
            line = F.interpolate(flat, size=size[2], mode="linear", align_corners=False)
            target[start:stop] = line.view(stop - start, *size[1:]).numpy()
    return torch.from_numpy(out)


def _taps(length: int, size: int) -> list[np.ndarray]:
    """Of each new voxel along an axis the two old ones that it lies between, and the share of the second."""
    place = np.clip((np.arange(size) + 0.5) * (length / size) - 0.5, 0, length - 1)
    left = np.floor(place).astype(np.int64)
    return [left, np.minimum(left + 1, length - 1), (place - left).astype(np.float32)]


def _mix(x: np.ndarray, axis: int, taps: Sequence[np.ndarray]) -> np.ndarray:
    """Linear interpolation along the first or second axis of a (D, H, W) array."""
    left, right, share = taps
    share = share.reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
    low = x.take(left, axis).astype(np.float32, copy=False)
    high = x.take(right, axis).astype(np.float32, copy=False)
    high -= low
    high *= share
    high += low
    return high
