"""Compare array formats for the cache: bytes on disk, time to write, time and bytes read per random crop.

    python -m benchmarks.cache_formats                        a synthetic volume of 512 x 512 x 200
    python -m benchmarks.cache_formats --volume SCAN          a NIfTI file or a folder with a DICOM series

One thread; every format returns the crop as float32 in [0, 1]. Warm: median of `repeats` crops from the page cache.
Cold: the file is dropped from the page cache before each crop; bytes read: those that the kernel read, with read-ahead.
h5py and zarr are measured if they are installed.

Measured 2026-11-22 with `--repeats 7` (two cores of an AMD EPYC, other work running; blosc2 4.14.1, numpy 2.4.6,
h5py 3.16.0, zarr 3.1.6): MB on disk, seconds to write, and milliseconds per warm crop of 96^3, 160^3, 192^3.

    numpy memory map, int16              104.9   0.02    7.71  18.02  17.61
    blosc2 lz4hc 5 shuffle c64 b32        49.4   1.35    2.23   9.09  13.88
    blosc2 lz4hc 5 bitshuffle c64 b32     46.8   0.84    2.18  11.06  17.86   the cache's
    blosc2 lz4hc 9 bitshuffle c64 b32     46.6   1.40    2.70  10.79  16.79
    blosc2 zstd 5 shuffle c64 b32         38.4   1.37    3.89  14.51  23.52
    blosc2 zstd 5 bitshuffle c64 b32      41.2   0.60    3.40  14.38  21.41
    HDF5 lzf shuffle c64                  53.6   0.48   16.05  48.03  69.74
    zarr, its default zstd, c64           46.2   0.44    9.26  25.46  45.03

The cache uses blosc2, lz4hc 5 with bitshuffle, chunks of 64^3, blocks of 32^3. It reads as fast as the memory map with
less than half the bytes; zstd saves another 10 to 20 % and takes 1.5 times as long; HDF5 and zarr take 2 to 7 times as
long. Bitshuffle needs 5 % fewer bytes than shuffle here, 9 % on a real series (3.1 and 3.4 MB), and reads large crops
20 % slower. For a cold 96^3 crop the kernel reads 26 MB with blosc2's memory map and its read-ahead, 5.8 with HDF5,
3.1 with zarr.
"""

import importlib.util
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import blosc2
import numpy as np
import torch

from common.cache import storage
from common.cli import parse, run_program
from common.config import setting
from common.data.loader import disk_bytes
from common.data.preprocessing import Preprocessing
from common.data.volume_io import read_image
from common.runlog import print_main
from Finetune.evaluation.formats import aligned
from scripts.synthetic_ct import phantom


@dataclass(kw_only=True)
class FormatSettings:
    """Settings of the comparison."""

    volume: Path | None = setting(None, "a CT scan; none: a synthetic one")
    shape: tuple[int, int, int] = setting((512, 512, 200), "shape of the synthetic volume")
    sizes: tuple[int, ...] = setting((96, 160, 192), "edges of the crops")
    repeats: int = setting(9, "crops per size")


def main() -> None:
    settings = parse(FormatSettings, description=__doc__)
    torch.set_num_threads(1)
    numbers, name = load(settings)
    versions = f"blosc2 {blosc2.__version__}, numpy {np.__version__}"
    print_main(f"{name}: {numbers.shape} int16, {numbers.nbytes / 1e6:.1f} MB; {versions}")
    header = ["format", "MB", "ratio", "write s"]
    header += [title for n in settings.sizes for title in (f"{n}^3 warm ms", "cold ms", "MB read")]
    with tempfile.TemporaryDirectory(prefix="cache-formats-", dir=os.environ.get("BENCH_DIR")) as folder:
        print_main("\n".join(aligned([header, *measure(Path(folder), numbers, settings)])))


def load(settings: FormatSettings) -> tuple[np.ndarray, str]:
    """Return the stored numbers (1, D, H, W) int16 of a preprocessed volume, and its description."""
    if settings.volume is None:
        hu = torch.from_numpy(phantom(settings.shape, noise=20.0)[0])[None].float()
        return storage.quantise(((hu + 1000) / 2000).clamp(0, 1), Preprocessing()), "synthetic, white noise of 20 HU"
    image, _ = Preprocessing().apply(read_image(settings.volume))
    return storage.quantise(image.as_tensor(), Preprocessing()), settings.volume.name


def measure(folder: Path, numbers: np.ndarray, settings: FormatSettings) -> list[list[str]]:
    """Return a row per format. The formats take turns, so that other load on the machine affects all of them."""
    rows, reads = {}, {}
    for name, write, read in formats():
        path = folder / f"{len(reads)}"
        seconds, _ = timed(write, path, numbers)
        size = sum(file.stat().st_size for file in files(path))
        rows[name] = [name, f"{size / 1e6:.1f}", f"{numbers.nbytes / size:.2f}", f"{seconds:.2f}"]
        reads[name] = (read, path)
    os.sync()
    for edge in settings.sizes:
        boxes = draw_boxes(numbers.shape[1:], edge, settings.repeats)
        for read, path in reads.values():
            check(read(path, boxes[0]), numbers, boxes[0])
        warm, cold = defaultdict(list), defaultdict(list)
        for number, box in enumerate(boxes):
            for name, (read, path) in reads.items():
                warm[name].append(timed(read, path, box)[0])
                if number < 3:
                    drop(path)
                    cold[name].append(timed(read, path, box))
        for name, row in rows.items():
            seconds, count = map(statistics.median, zip(*cold[name]))
            row += [f"{statistics.median(warm[name]) * 1e3:.2f}", f"{seconds * 1e3:.1f}", f"{count / 1e6:.1f}"]
    return list(rows.values())


def draw_boxes(shape: Sequence[int], edge: int, count: int) -> list[tuple[slice, ...]]:
    rng = np.random.default_rng(edge)
    starts = [[int(rng.integers(max(n - edge, 0) + 1)) for n in shape] for _ in range(count)]
    return [tuple(slice(a, min(a + edge, n)) for a, n in zip(start, shape)) for start in starts]


def timed(function: Callable, *args) -> tuple[float, int]:
    """Return the seconds that a call takes, and the bytes that it reads from disk."""
    before, start = disk_bytes(), time.perf_counter()
    function(*args)
    return time.perf_counter() - start, disk_bytes() - before


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


def formats() -> list[tuple[str, Callable, Callable]]:
    """Return (name, write(path, numbers), read(path, box) -> float32) of each format."""
    found = [("numpy memory map, int16", write_npy, read_npy)]
    for codec, level, filter_, chunk, block in (
        ("LZ4HC", 5, "SHUFFLE", 64, 32),
        ("LZ4HC", 5, "BITSHUFFLE", 64, 32),
        ("LZ4HC", 9, "BITSHUFFLE", 64, 32),
        ("LZ4HC", 9, "BITSHUFFLE", 32, 32),
        ("LZ4HC", 9, "BITSHUFFLE", 64, 16),
        ("ZSTD", 5, "SHUFFLE", 64, 32),
        ("ZSTD", 1, "BITSHUFFLE", 64, 32),
        ("ZSTD", 5, "BITSHUFFLE", 64, 32),
    ):
        name = f"blosc2 {codec.lower()} {level} {filter_.lower()} c{chunk} b{block}"
        found.append((name, blosc_writer(codec, level, filter_, chunk, block), read_blosc))
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


def blosc_writer(codec: str, level: int, filter_: str, chunk: int, block: int) -> Callable:
    def write(path: Path, numbers: np.ndarray) -> None:
        params = blosc2.CParams(codec=blosc2.Codec[codec], clevel=level, nthreads=1, filters=[blosc2.Filter[filter_]])
        chunks = (1, *(min(chunk, n) for n in numbers.shape[1:]))
        blocks = (1, *(min(block, n) for n in chunks[1:]))
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


if __name__ == "__main__":
    sys.exit(run_program(main))
