"""Compressed, chunked arrays of one cache entry: how numbers are rounded, written in levels, and read in boxes.

blosc2, int16, 64^3 chunks of 32^3 blocks, read through a memory map by one thread. Why: benchmarks/cache_formats.py.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import torch
import torch.nn.functional as F

from common.data.preprocessing import Preprocessing
from common.errors import InputError, one_line
from common.files import sync

CHUNK, BLOCK = 64, 32
MAX_LEVELS = 3  # full, 2x, 4x
MIN_LENGTH = 32  # an axis shorter than this is not halved
MAX_OPEN = 64  # arrays held open by a process: far below its limit of open files
blosc2.set_nthreads(1)  # crops are small and loaders have workers


def level_name(level: int) -> str:
    return "image.b2nd" if level == 0 else f"image_{2**level}x.b2nd"


# ---------------------------------------------------------------- rounding


def quantisation_of(preprocessing: Preprocessing) -> tuple[float, float]:
    """(scale, offset): stored number * scale + offset = preprocessed intensity.

    int16: a window of HU keeps steps of 1 HU, so whole HU are kept as they are (a window under 100 wide is not HU: 4095
    steps); percentiles 1/4095; z-scores 1/512. uint8: 255 steps, z-scores within +-6.
    """
    wide = preprocessing.high - preprocessing.low
    if preprocessing.intensity == "zscore":
        return (1 / 512, 0.0) if preprocessing.dtype == "int16" else (6 / 127, -128 * 6 / 127)
    if preprocessing.dtype == "uint8":
        return 1 / 255, 0.0
    if preprocessing.intensity == "window" and wide >= 100:
        return max(1.0, wide / 32767) / wide, 0.0
    return 1 / 4095, 0.0


def quantise(image: torch.Tensor, preprocessing: Preprocessing) -> np.ndarray:
    """Preprocessed intensities as the whole numbers that are stored."""
    scale, offset = quantisation_of(preprocessing)
    limits = torch.iinfo(getattr(torch, preprocessing.dtype))
    numbers = ((image - offset) / scale).round().clamp(limits.min, limits.max)
    return numbers.to(getattr(torch, preprocessing.dtype)).numpy()


# ---------------------------------------------------------------- writing


def write_image(folder: Path, image: Any, preprocessing: Preprocessing) -> tuple[dict[str, Any], list[list[int]]]:
    """Write `image` (C, D, H, W) and its reduced levels; returns how it was rounded, and the shape of each level."""
    scale, offset = quantisation_of(preprocessing)
    spacing = [float(mm) for mm in image.pixdim]
    level, shapes = image.as_tensor(), []
    numbers = quantise(level, preprocessing)
    error = float((torch.from_numpy(numbers).float() * scale + offset - level).abs().max())
    for number in range(MAX_LEVELS):
        if number:
            numbers = quantise(level, preprocessing)
        write(folder / level_name(number), numbers)
        shapes.append(list(level.shape[1:]))
        smaller = reduced_shape(level.shape[1:], spacing)
        if smaller == tuple(level.shape[1:]):
            break
        spacing = [mm * n / m for mm, n, m in zip(spacing, level.shape[1:], smaller)]
        for axis in range(3):
            if smaller[axis] != level.shape[1 + axis]:
                level = halve(level, 1 + axis)
    rounding = {"dtype": preprocessing.dtype, "scale": scale, "offset": offset, "max_error": error}
    return rounding, shapes


def reduced_shape(shape: Sequence[int], spacing: Sequence[float]) -> tuple[int, int, int]:
    """Shape of the next level: half, but axes that are coarse already (thick slices) or short keep their voxels."""
    fine = 1.5 * min(spacing)
    return tuple((n + 1) // 2 if mm <= fine and n >= MIN_LENGTH else n for n, mm in zip(shape, spacing))


def halve(x: torch.Tensor, axis: int) -> torch.Tensor:
    """`x` with (n + 1) // 2 voxels along `axis`, each the mean of the share of the axis that it covers.

    The extent and the mean stay exactly the same, also for an odd n, and nothing is aliased.
    """
    n = x.shape[axis]
    half = (n + 1) // 2
    edges = torch.arange(half + 1, dtype=torch.float64) * n / half
    first = edges[:-1].floor()
    total = torch.zeros([half if a == axis else length for a, length in enumerate(x.shape)])
    for offset in range(3):  # a new voxel covers n / half <= 2 old ones, so it touches at most 3
        left, right = torch.maximum(edges[:-1], first + offset), torch.minimum(edges[1:], first + offset + 1)
        weight = (
            ((right - left).clamp(min=0) * half / n).float().reshape([-1 if a == axis else 1 for a in range(x.ndim)])
        )
        total += weight * x.index_select(axis, (first + offset).clamp(max=n - 1).long())
    return total


def write(path: Path, numbers: np.ndarray, codec: blosc2.Codec = blosc2.Codec.LZ4HC) -> None:
    """One array (C, D, H, W) as a file."""
    chunks = (1, *(min(CHUNK, n) for n in numbers.shape[1:]))
    blocks = (1, *(min(BLOCK, n) for n in chunks[1:]))
    params = blosc2.CParams(codec=codec, clevel=5, nthreads=1, filters=[blosc2.Filter.BITSHUFFLE])
    numbers = np.ascontiguousarray(numbers)
    blosc2.asarray(numbers, chunks=chunks, blocks=blocks, cparams=params, urlpath=str(path), mode="w")


def publish(temporary: Path, folder: Path) -> None:
    """Flush the files of a finished entry to disk and give it its name. Another process may have been faster: fine."""
    for path in temporary.iterdir():
        sync(path)
    try:
        os.rename(temporary, folder)
    except OSError:
        if not (folder / "meta.json").exists():
            raise


# ---------------------------------------------------------------- reading


@dataclass
class Box:
    """The part of a box that lies in the volume, (C, d, h, w), and how much of the box lies outside on each side."""

    inside: np.ndarray
    before: tuple[int, ...]
    size: tuple[int, ...]

    def pad(self, values: np.ndarray, fill: int = 0) -> np.ndarray:
        """`values`, shaped like `inside`, in a box of the full size with `fill` around."""
        if values.shape[1:] == self.size:
            return values
        full = np.full((values.shape[0], *self.size), fill, values.dtype)
        full[(slice(None), *(slice(a, a + n) for a, n in zip(self.before, values.shape[1:])))] = values
        return full


def read_box(path: Path, start: Sequence[int], size: Sequence[int]) -> Box:
    """The stored numbers of [start, start + size) as far as they lie in the array. InputError when it is damaged."""
    array = _open(path)
    start, size = [int(a) for a in start], tuple(int(n) for n in size)
    first = [min(max(a, 0), n) for a, n in zip(start, array.shape[1:])]
    last = [min(max(a + s, f), n) for a, s, f, n in zip(start, size, first, array.shape[1:])]
    try:
        inside = array[(slice(None), *(slice(f, e) for f, e in zip(first, last)))]
    except Exception as error:  # blosc2 raises RuntimeError for a damaged chunk
        raise _damaged(path, error) from None
    return Box(inside, tuple(min(f - a, s) for f, a, s in zip(first, start, size)), size)


_arrays: OrderedDict[Path, Any] = OrderedDict()
_owner = os.getpid()
_lock = threading.Lock()


def _open(path: Path) -> Any:
    """The array at `path`, opened once per process (a forked worker opens its own); the least used ones are closed."""
    global _owner
    with _lock:
        if _owner != os.getpid():
            _arrays.clear()
            _owner = os.getpid()
        array = _arrays.pop(path, None)
        if array is None:
            try:
                array = blosc2.open(str(path), mode="r", mmap_mode="r", dparams=blosc2.DParams(nthreads=1))
            except Exception as error:
                raise _damaged(path, error) from None
        _arrays[path] = array
        while len(_arrays) > MAX_OPEN:
            _arrays.popitem(last=False)
        return array


def _damaged(path: Path, error: Exception) -> InputError:
    what = "is missing" if not path.exists() else f"is damaged ({one_line(error)})"
    return InputError(f"{path}: this part of the cache {what}; delete {path.parent} to have it made anew")


# ---------------------------------------------------------------- resize
# Trilinear resizing of one volume on one core, in slabs that stay in its cache.

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
