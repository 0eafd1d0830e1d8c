"""Maintenance of a cache: estimate the cost of building it, verify it, prune it, describe its volumes."""

import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.cache import build, hashing
from common.cache.volume import CachedVolume, read_meta
from common.data.datalist import Case
from common.data.preprocessing import Preprocessing
from common.errors import one_line
from common.files import naming_errors
from common.resources import duration
from common.runlog import progress

# volumes that a dry run builds and measures
SAMPLES = 3
# seconds after which the unfinished folder of another machine is abandoned
STALE = 24 * 3600


def volume_folders(cache_dir: Path) -> list[Path]:
    """Return the folders of all volumes, complete or not. InputError if the cache cannot be read."""
    with naming_errors(cache_dir, "cannot be read"):
        found = [path for path in cache_dir.iterdir() if path.is_dir() and not path.name.startswith(".")]
    return sorted(path for path in found if len(path.name) == 32)


def folder_bytes(folder: Path) -> int:
    """Return the size of all files under a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# ---------------------------------------------------------------- estimate


@dataclass(frozen=True)
class Estimate:
    """The cost of building the missing volumes, extrapolated by file size from a few that were built."""

    volumes: int
    cached: int
    source_bytes: int
    cache_bytes: int
    seconds: float
    sampled: int
    failed: int

    def __str__(self) -> str:
        text = f"{self.volumes} volumes, {self.cached} of them cached already"
        if not self.sampled:
            return text
        return (
            f"{text}; the rest: {self.source_bytes / 1e9:.2f} GB of files -> about {self.cache_bytes / 1e9:.2f} GB of "
            f"cache in about {duration(self.seconds)} (from {self.sampled} volumes, {self.failed} of them unusable)"
        )


def estimate(cases: Sequence[Case], preprocessing: Preprocessing, cache_dir: Path, workers: int = 0) -> Estimate:
    """Return the cost of building the missing volumes of `cases`; build a few of them in a temporary folder."""
    index = hashing.HashIndex(cache_dir / "index.jsonl")
    missing = [case for case in cases if build.find_volume(case, preprocessing, cache_dir, index) is None]
    sizes = {case.name: sum(_bytes(path) for path in (case.image, case.label) if path) for case in missing}
    by_size = sorted(missing, key=lambda case: sizes[case.name])
    picks = sorted({round(q * (len(by_size) - 1)) for q in np.linspace(0.2, 0.8, SAMPLES)}) if by_size else []
    sample = [by_size[i] for i in picks]
    with tempfile.TemporaryDirectory(prefix="cache-dry-run-") as folder:
        result = build.build_missing(sample, preprocessing, folder)
        built = sum(folder_bytes(volume.folder) for volume in result.volumes)
    total, measured = sum(sizes.values()), max(sum(sizes[case.name] for case in sample), 1)
    share = total / measured
    return Estimate(
        volumes=len(cases),
        cached=len(cases) - len(missing),
        source_bytes=total,
        cache_bytes=round(built * share),
        seconds=result.seconds * share / max(workers, 1),
        sampled=len(sample),
        failed=len(result.failures),
    )


def _bytes(path: Path) -> int:
    try:
        return folder_bytes(path) if path.is_dir() else path.stat().st_size
    except OSError:
        return 0


# ---------------------------------------------------------------- verify


def verify(cache_dir: Path, workers: int = 0) -> tuple[int, dict[Path, str]]:
    """Compare every file with its checksum; return the number of volumes, and what is wrong with which folder."""
    folders = volume_folders(cache_dir)
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        results = progress(pool.map(_damage, folders), desc="verify", total=len(folders), unit="volume")
        return len(folders), {folder: wrong for folder, wrong in zip(folders, results) if wrong}


def _damage(folder: Path) -> str | None:
    try:
        for name, checksum in read_meta(folder)["checksums"].items():
            if hashing.file_hash(folder / name) != checksum:
                return f"{name} has changed since it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError) as error:
        return f"meta.json cannot be read ({one_line(error)})"
    return None


# ---------------------------------------------------------------- prune


def prune(cache_dir: Path, cases: Iterable[Case], remove: bool = True) -> tuple[list[Path], int]:
    """Remove the volumes that are not of `cases`, and the unfinished folders of killed processes.

    The volumes of a case stay with any settings.

    Args:
        remove: False only lists what would be removed.

    Returns:
        The removed folders and their size in bytes.
    """
    index = hashing.HashIndex(cache_dir / "index.jsonl")
    wanted = {record.hash for case in cases if (record := index.get(case.image))}
    unwanted = [folder for folder in volume_folders(cache_dir) if _image_hash(folder) not in wanted]
    unwanted += [folder for folder in cache_dir.glob(".tmp-*") if _abandoned(folder)]
    size = sum(map(folder_bytes, unwanted))
    if remove:
        for folder in unwanted:
            shutil.rmtree(folder)
    return unwanted, size


def _image_hash(folder: Path) -> str | None:
    try:
        return read_meta(folder)["files"][0]
    except (OSError, ValueError, KeyError, IndexError):
        return None


def _abandoned(folder: Path) -> bool:
    """Return whether the process that wrote an unfinished folder has ended, or on another machine seems to have."""
    host, _, rest = folder.name.removeprefix(".tmp-").rpartition("-")[0].rpartition("-")
    if host == socket.gethostname() and rest.isdigit():
        return not _alive(int(rest))
    return time.time() - folder.stat().st_mtime > STALE


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


# ---------------------------------------------------------------- describe


def describe_cache(volumes: Sequence[CachedVolume]) -> str:
    """Return a table with minimum, median and maximum of shape, spacing, intensities, foreground and bytes."""
    metas = [read_meta(volume.folder) for volume in volumes]
    if not metas:
        return "no volume"
    lines = [f"{len(metas)} volumes, {len({volume.content_hash for volume in volumes})} different"]
    lines.append(f"{'':42s}{'least':>10s}{'median':>10s}{'most':>10s}")
    rows = _rows(metas) | {"MB on disk": [folder_bytes(volume.folder) / 1e6 for volume in volumes]}
    for name, values in rows.items():
        lines.append(f"{name:42s}" + "".join(f"{v:10.4g}" for v in (min(values), np.median(values), max(values))))
    return "\n".join(lines)


def _rows(metas: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Return the rows of the table: name -> one number per volume."""
    scanned = [meta["scanned"] for meta in metas]
    rows = {f"shape {axis} as scanned": [s["shape"][i] for s in scanned] for i, axis in enumerate("DHW")}
    rows |= {f"spacing {axis} as scanned, mm": [s["spacing"][i] for s in scanned] for i, axis in enumerate("DHW")}
    rows |= {f"shape {axis} cached": [meta["levels"][0][i] for meta in metas] for i, axis in enumerate("DHW")}
    percentiles = enumerate(build.PERCENTILES)
    rows |= {f"intensity, {p:g} % percentile": [s["percentiles"][i] for s in scanned] for i, p in percentiles}
    rows["foreground share of the cached box"] = [meta["foreground_share"] for meta in metas]
    rows["rounding error, of the intensity range"] = [meta["quantisation"]["max_error"] for meta in metas]
    return rows
