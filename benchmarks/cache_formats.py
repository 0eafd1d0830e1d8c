"""Array formats for the cache: bytes on disk, and time and bytes read per random crop of 96^3.

One thread; every format returns the crop as float32 in [0, 1]. Warm: the file is in the page cache. Cold: it is dropped
from there before each crop, and what counts are the bytes that the kernel then reads, with read-ahead. h5py and zarr
are measured if they are installed.

Measured 2026-11-22 on a volume of 512 x 512 x 200 (two cores of an AMD EPYC, other work running; blosc2 4.14.1, numpy
2.4.6, h5py 3.16.0, zarr 3.1.6): MB on disk, seconds to write, and milliseconds per warm crop of 96^3, 160^3, 192^3.

    numpy memory map, int16              104.9   0.02    7.71  18.02  17.61
    blosc2 lz4hc 5 shuffle c64 b32        49.4   1.35    2.23   9.09  13.88   the cache's
    blosc2 lz4hc 5 bitshuffle c64 b32     46.8   0.84    2.18  11.06  17.86
    blosc2 lz4hc 9 bitshuffle c64 b32     46.6   1.40    2.70  10.79  16.79
    blosc2 zstd 5 shuffle c64 b32         38.4   1.37    3.89  14.51  23.52
    blosc2 zstd 5 bitshuffle c64 b32      41.2   0.60    3.40  14.38  21.41
    HDF5 lzf shuffle c64                  53.6   0.48   16.05  48.03  69.74
    zarr, its default zstd, c64           46.2   0.44    9.26  25.46  45.03

The cache uses blosc2, lz4hc 5, chunks of 64^3, blocks of 32^3, for int16 with shuffle. It reads as fast as the memory
map with less than half the bytes; zstd saves another 10 to 20 % and takes 1.5 times as long; HDF5 and zarr take 2 to
7 times as long. For a cold 96^3 crop the kernel reads 26 MB with blosc2's memory map and its read-ahead, 5.8 with
HDF5, 3.1 with zarr. Bitshuffle needs 5 % fewer bytes than shuffle, 9 % on a real series (3.1 and 3.4 MB). On another,
idle AMD EPYC (2026-11-27) crops of 96^3 and 160^3 took 2.64 and 10.53 ms with it and 1.65 and 6.80 ms with shuffle.
Bytes cannot be shuffled: uint8 volumes keep bitshuffle, 24.7 MB, 1.91 and 8.90 ms; without it 33.3 MB, 1.47 and 6.44
ms.
"""

import importlib.util
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import torch

from benchmarks.harness import Row, alternate, threads
from common.cache import storage
from common.data.loader import disk_bytes
from common.data.preprocessing import Preprocessing
from scripts.synthetic_ct import phantom

EDGE = 96


@dataclass(frozen=True)
class Format:
    """A format, its functions, and where it wrote the volume."""

    name: str
    path: Path
    write: Callable[[Path, np.ndarray], None]
    read: Callable[[Path, tuple[slice, ...]], torch.Tensor]


def measure(quick: bool, device: torch.device) -> list[dict[str, Any]]:
    """Return the rows: the cache's format against every other one."""
    shape, crops = ((256, 256, 100), 3) if quick else ((512, 512, 200), 9)
    numbers = stored_numbers(shape)
    with tempfile.TemporaryDirectory(prefix="benchmark-formats-") as folder, threads(1):
        found = [Format(name, Path(folder) / str(i), *functions) for i, (name, *functions) in enumerate(formats())]
        for format in found:
            format.write(format.path, numbers)
        os.sync()
        sizes = {format.name: float(sum(file.stat().st_size for file in files(format.path))) for format in found}
        boxes = draw_boxes(shape, EDGE, crops)
        warm, cold = warm_seconds(found, numbers, boxes), cold_bytes(found, boxes[:3])
    rows = []
    for title, unit, values in (
        ("the volume on disk", "bytes", sizes),
        (f"a warm crop of {EDGE}^3", "s", warm),
        (f"read from disk for a cold crop of {EDGE}^3", "bytes", cold),
    ):
        rows += comparisons(f"{title}, {'x'.join(map(str, shape))}", unit, values)
    return rows


def comparisons(title: str, unit: str, values: dict[str, float]) -> list[dict[str, Any]]:
    """Return a row for each other format. Where the kernel does not report what it reads, there is none."""
    ours = values[OURS]
    others = {name: value for name, value in values.items() if name != OURS and ours > 0}
    return [
        Row(name=title, against=name, ours=ours, theirs=value, unit=unit).as_dict() for name, value in others.items()
    ]


def stored_numbers(shape: Sequence[int]) -> np.ndarray:
    """Return the numbers (1, D, H, W) int16 that the cache stores of a synthetic volume with white noise of 20 HU."""
    hu = torch.from_numpy(phantom(shape, noise=20.0)[0])[None].float()
    return storage.quantise(((hu + 1000) / 2000).clamp(0, 1), Preprocessing())


def warm_seconds(found: Sequence[Format], numbers: np.ndarray, boxes: Sequence[tuple[slice, ...]]) -> dict[str, float]:
    """Return the median seconds per crop. The formats take turns."""
    for format in found:
        check(format.read(format.path, boxes[0]), numbers, boxes[0])
    rounds = [alternate({f.name: lambda f=f, box=box: f.read(f.path, box) for f in found}, 1) for box in boxes]
    return {format.name: statistics.median(times[format.name] for times in rounds) for format in found}


def cold_bytes(found: Sequence[Format], boxes: Sequence[tuple[slice, ...]]) -> dict[str, float]:
    """Return the median bytes that the kernel reads for a crop of a file that is not in the page cache."""
    counts: dict[str, list[int]] = {format.name: [] for format in found}
    for box in boxes:
        for format in found:
            drop(format.path)
            before = disk_bytes()
            format.read(format.path, box)
            counts[format.name].append(disk_bytes() - before)
    return {name: float(statistics.median(values)) for name, values in counts.items()}


def draw_boxes(shape: Sequence[int], edge: int, count: int) -> list[tuple[slice, ...]]:
    rng = np.random.default_rng(edge)
    starts = [[int(rng.integers(max(n - edge, 0) + 1)) for n in shape] for _ in range(count)]
    return [tuple(slice(a, min(a + edge, n)) for a, n in zip(start, shape)) for start in starts]


def files(path: Path) -> list[Path]:
    """Return the files of an array: `path` itself, or those in the folder."""
    return [file for file in (path, *path.rglob("*")) if file.is_file()]


def drop(path: Path) -> None:
    """Drop an array from the page cache."""
    for file in files(path):
        with open(file, "rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def check(crop: torch.Tensor, numbers: np.ndarray, box: tuple[slice, ...]) -> None:
    wanted = torch.from_numpy(numbers[0][box].astype(np.float32)) / 2000
    assert torch.allclose(crop.reshape(wanted.shape), wanted), "a format returned other voxels"


def scaled(crop: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(crop.astype(np.float32) * np.float32(1 / 2000))


# ---------------------------------------------------------------- formats


OURS = "blosc2 lz4hc 5 shuffle"


def formats() -> list[tuple[str, Callable, Callable]]:
    """Return (name, write(path, numbers), read(path, box) -> float32) of each format."""
    found = [("numpy memory map, int16", write_npy, read_npy)]
    for codec, level, filter_ in (("LZ4HC", 5, "SHUFFLE"), ("LZ4HC", 5, "BITSHUFFLE"), ("ZSTD", 5, "BITSHUFFLE")):
        name = f"blosc2 {codec.lower()} {level} {filter_.lower()}"
        found.append((name, blosc_writer(codec, level, filter_), read_blosc))
    if importlib.util.find_spec("h5py"):
        found.append(("HDF5 lzf shuffle c64", write_h5, read_h5))
    if importlib.util.find_spec("zarr"):
        found.append(("zarr, its default zstd, c64", write_zarr, read_zarr))
    return found


def write_npy(path: Path, numbers: np.ndarray) -> None:
    with open(path, "wb") as file:
        np.save(file, numbers)


def read_npy(path: Path, box: tuple[slice, ...]) -> torch.Tensor:
    return scaled(np.load(path, mmap_mode="r")[(0, *box)])


def blosc_writer(codec: str, level: int, filter_: str) -> Callable:
    def write(path: Path, numbers: np.ndarray) -> None:
        params = blosc2.CParams(codec=blosc2.Codec[codec], clevel=level, nthreads=1, filters=[blosc2.Filter[filter_]])
        chunks = (1, *(min(64, n) for n in numbers.shape[1:]))
        blocks = (1, *(min(32, n) for n in chunks[1:]))
        blosc2.asarray(numbers, chunks=chunks, blocks=blocks, cparams=params, urlpath=str(path), mode="w")

    return write


def read_blosc(path: Path, box: tuple[slice, ...]) -> torch.Tensor:
    array = blosc2.open(str(path), mode="r", mmap_mode="r", dparams=blosc2.DParams(nthreads=1))
    return scaled(array[(slice(0, 1), *box)])


def write_h5(path: Path, numbers: np.ndarray) -> None:
    import h5py

    with h5py.File(path, "w") as file:
        chunks = (1, *(min(64, n) for n in numbers.shape[1:]))
        file.create_dataset("x", data=numbers, chunks=chunks, compression="lzf", shuffle=True)


def read_h5(path: Path, box: tuple[slice, ...]) -> torch.Tensor:
    import h5py

    with h5py.File(path, "r") as file:
        return scaled(file["x"][(0, *box)])


def write_zarr(path: Path, numbers: np.ndarray) -> None:
    import zarr

    array = zarr.create_array(str(path), shape=numbers.shape, chunks=(1, 64, 64, 64), dtype=numbers.dtype)
    array[:] = numbers


def read_zarr(path: Path, box: tuple[slice, ...]) -> torch.Tensor:
    import zarr

    return scaled(zarr.open_array(str(path), mode="r")[(0, *box)])
