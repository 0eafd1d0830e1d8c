"""Compressed, chunked arrays of a cached volume: rounding, resolution levels, reading of boxes, resizing.

blosc2, int16, 64^3 chunks of 32^3 blocks, read through a memory map by one thread; benchmarks/cache_formats.py compares
the alternatives.
"""

import os
import shutil
import socket
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import torch
import torch.nn.functional as F

from common.data.preprocessing import Preprocessing, is_hounsfield
from common.errors import InputError, one_line
from common.files import sync

CHUNK, BLOCK = 64, 32
# full, 2x, 4x
MAX_LEVELS = 3
# an axis shorter than this is not halved
MIN_LENGTH = 32
# arrays that a process keeps open, far below its limit of open files
MAX_OPEN = 64
# crops are small and loaders have workers
blosc2.set_nthreads(1)


def level_name(level: int) -> str:
    """Return the file name of a resolution level."""
    return "image.b2nd" if level == 0 else f"image_{2**level}x.b2nd"


# ---------------------------------------------------------------- rounding


def quantisation_of(preprocessing: Preprocessing) -> tuple[float, float]:
    """Return (scale, offset), with preprocessed intensity = stored number * scale + offset.

    int16: a window of HU has steps of 1 HU, so whole HU are stored exactly (a window narrower than 100 is not HU: 4095
    steps); percentiles 1/4095; z-scores 1/512. uint8: 255 steps, z-scores within +-6.
    """
    wide = preprocessing.high - preprocessing.low
    if preprocessing.intensity == "zscore":
        return (1 / 512, 0.0) if preprocessing.dtype == "int16" else (6 / 127, -128 * 6 / 127)
    if preprocessing.dtype == "uint8":
        return 1 / 255, 0.0
    if preprocessing.intensity == "window" and is_hounsfield(preprocessing.low, preprocessing.high):
        return max(1.0, wide / 32767) / wide, 0.0
    return 1 / 4095, 0.0


def quantise(image: torch.Tensor, preprocessing: Preprocessing) -> np.ndarray:
    """Return preprocessed intensities (C, D, H, W) as the whole numbers that are stored, of the same shape."""
    scale, offset = quantisation_of(preprocessing)
    limits = torch.iinfo(getattr(torch, preprocessing.dtype))
    # in place after the first step, for a volume fills much of the memory
    numbers = (image - offset).div_(scale).round_().clamp_(limits.min, limits.max)
    return numbers.to(getattr(torch, preprocessing.dtype)).numpy()


# ---------------------------------------------------------------- writing


def write_image(folder: Path, image: Any, preprocessing: Preprocessing) -> tuple[dict[str, Any], list[list[int]]]:
    """Write `image` (C, D, H, W) and its reduced levels; return the rounding and the shape of each level."""
    scale, offset = quantisation_of(preprocessing)
    spacing = [float(mm) for mm in image.pixdim]
    level, shapes = image.as_tensor(), []
    for number in range(MAX_LEVELS):
        numbers = quantise(level, preprocessing)
        if number == 0:
            error = float(torch.from_numpy(numbers).float().mul_(scale).add_(offset).sub_(level).abs_().max())
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
    """Return the shape of the next level: half, except for axes that are coarse (thick slices) or short."""
    fine = 1.5 * min(spacing)
    return tuple((n + 1) // 2 if mm <= fine and n >= MIN_LENGTH else n for n, mm in zip(shape, spacing))


def halve(x: torch.Tensor, axis: int) -> torch.Tensor:
    """Return `x` with (n + 1) // 2 voxels along `axis`, each the mean of the part of the axis that it covers.

    The extent and the mean do not change, also for an odd n, and nothing is aliased.
    """
    n = x.shape[axis]
    half = (n + 1) // 2
    edges = torch.arange(half + 1, dtype=torch.float64) * n / half
    first = edges[:-1].floor()
    total = torch.zeros([half if a == axis else length for a, length in enumerate(x.shape)])
    # a new voxel covers n / half <= 2 old ones, so it touches at most 3
    for offset in range(3):
        left, right = torch.maximum(edges[:-1], first + offset), torch.minimum(edges[1:], first + offset + 1)
        weight = ((right - left).clamp(min=0) * half / n).float()
        old = x.index_select(axis, (first + offset).clamp(max=n - 1).long())
        total += old.mul_(weight.reshape([-1 if a == axis else 1 for a in range(x.ndim)]))
    return total


def write(path: Path, numbers: np.ndarray, codec: blosc2.Codec = blosc2.Codec.LZ4HC) -> None:
    """Write an array (C, D, H, W) to a file."""
    chunks = (1, *(min(CHUNK, n) for n in numbers.shape[1:]))
    blocks = (1, *(min(BLOCK, n) for n in chunks[1:]))
    # bytes cannot be shuffled; the bits of wider numbers take longer to put back than their bytes
    filter_ = blosc2.Filter.BITSHUFFLE if numbers.itemsize == 1 else blosc2.Filter.SHUFFLE
    params = blosc2.CParams(codec=codec, clevel=5, nthreads=1, filters=[filter_])
    numbers = np.ascontiguousarray(numbers)
    blosc2.asarray(numbers, chunks=chunks, blocks=blocks, cparams=params, urlpath=str(path), mode="w")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder, and rename it to `folder` at the end, unless another process was faster."""
    temporary = folder.parent / f".tmp-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    try:
        temporary.mkdir()
        yield temporary
        for path in temporary.iterdir():
            sync(path)
        try:
            os.rename(temporary, folder)
        except OSError:
            if not (folder / "meta.json").exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# ---------------------------------------------------------------- reading


def read_box(path: Path, start: Sequence[int], size: Sequence[int], outside: int = 0) -> np.ndarray:
    """Return the stored numbers of the box [start, start + size) as (C, d, h, w), with `outside` beyond the array.

    Raises:
        InputError: the array is missing or damaged.
    """
    array = _open(path, os.getpid())
    start, size = [int(a) for a in start], tuple(int(n) for n in size)
    first = [min(max(a, 0), n) for a, n in zip(start, array.shape[1:])]
    last = [min(max(a + s, f), n) for a, s, f, n in zip(start, size, first, array.shape[1:])]
    try:
        inside = array[(slice(None), *(slice(f, e) for f, e in zip(first, last)))]
    # blosc2 raises RuntimeError for a damaged chunk
    except Exception as error:
        raise damaged(path, error) from None
    if inside.shape[1:] == size:
        return inside
    box = np.full((inside.shape[0], *size), outside, inside.dtype)
    places = [slice(min(f - a, s), min(f - a, s) + n) for f, a, s, n in zip(first, start, size, inside.shape[1:])]
    box[(slice(None), *places)] = inside
    return box


def read_into(path: Path, start: Sequence[int], out: np.ndarray) -> None:
    """Read the box of an array that begins at `start` and lies inside it into `out` (C, d, h, w), of the array's type.

    Raises:
        InputError: the array is missing or damaged.
    """
    stop = [a + n for a, n in zip(start, out.shape[1:])]
    try:
        # what indexing calls on a new array
        _open(path, os.getpid()).get_slice_numpy(out, ([0, *start], [out.shape[0], *stop]))
    # blosc2 raises RuntimeError for a damaged chunk
    except Exception as error:
        raise damaged(path, error) from None


def number_type(path: Path) -> np.dtype:
    """Return the number type of an array. InputError if it is missing or damaged."""
    return _open(path, os.getpid()).dtype


@lru_cache(maxsize=MAX_OPEN)
def _open(path: Path, pid: int) -> Any:
    """Return the array at `path`. Each process opens its own, and closes the least recently used ones."""
    try:
        return blosc2.open(str(path), mode="r", mmap_mode="r", dparams=blosc2.DParams(nthreads=1))
    except Exception as error:
        raise damaged(path, error) from None


def damaged(path: Path, error: Exception) -> InputError:
    """Return the error for a file of a cached volume that cannot be read."""
    what = "is missing" if not path.exists() else f"is damaged ({one_line(error)})"
    return InputError(f"{path}: this part of the cache {what}; delete {path.parent} to build it again")


# ---------------------------------------------------------------- resize
# Trilinear resizing of one volume by one core, in slabs that fit into its cache.

# voxels of a slab between two axes: 1 MB of float32
SLAB = 1 << 18


def trilinear(image: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Return `image` (C, D, H, W), of any number type, resized to (C, *size) float32."""
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
    """Return the two old voxels around each new voxel along an axis, and the weight of the second."""
    place = np.clip((np.arange(size) + 0.5) * (length / size) - 0.5, 0, length - 1)
    left = np.floor(place).astype(np.int64)
    return [left, np.minimum(left + 1, length - 1), (place - left).astype(np.float32)]


def _mix(x: np.ndarray, axis: int, taps: Sequence[np.ndarray]) -> np.ndarray:
    """Interpolate a (D, H, W) array linearly along its first or second axis."""
    left, right, weight = taps
    weight = weight.reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
    low = x.take(left, axis).astype(np.float32, copy=False)
    high = x.take(right, axis).astype(np.float32, copy=False)
    high -= low
    high *= weight
    high += low
    return high
