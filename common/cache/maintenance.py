"""What else can be asked of a cache: what filling would cost, whether it is whole, what is in it, what may go."""

import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.cache import build, hashing
from common.cache.volume import CachedVolume
from common.data.datalist import Case
from common.data.preprocessing import Preprocessing
from common.errors import InputError
from common.runlog import progress

SAMPLES = 3  # volumes that a dry run builds to measure with
STALE = 24 * 3600  # seconds after which another machine's unfinished folder is given up


def entry_folders(cache_dir: Path) -> list[Path]:
    """The folders of all entries, whole or not."""
    try:
        found = [p for p in cache_dir.iterdir() if p.is_dir() and not p.name.startswith(".") and p.name != "locks"]
    except OSError as error:
        raise InputError(f"cache_dir {cache_dir}: cannot be read ({error.strerror})") from None
    return sorted(p for p in found if len(p.name) == 32)


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# ---------------------------------------------------------------- before filling


@dataclass(frozen=True)
class Estimate:
    """What filling would take, extrapolated by the size of the files from a few volumes that were really built."""

    volumes: int
    cached: int
    source_bytes: int
    cache_bytes: int
    seconds: float
    sampled: int
    bad: int

    def __str__(self) -> str:
        text = f"{self.volumes} volumes, {self.cached} of them cached already"
        if not self.sampled:
            return text
        return (
            f"{text}; the rest: {self.source_bytes / 1e9:.2f} GB of files -> about {self.cache_bytes / 1e9:.2f} GB of "
            f"cache in about {duration(self.seconds)} (extrapolated from {self.sampled} volumes; {self.bad} unusable)"
        )


def estimate(cases: Sequence[Case], preprocessing: Preprocessing, cache_dir: Path, workers: int = 0) -> Estimate:
    """Nothing is written to `cache_dir`; a few volumes are built in a temporary folder and measured."""
    index = hashing.HashIndex(cache_dir / "index.jsonl")
    missing = [case for case in cases if build.lookup(case, preprocessing, cache_dir, index) is None]
    sizes = {case.name: sum(_bytes(path) for path in (case.image, case.label) if path) for case in missing}
    by_size = sorted(missing, key=lambda case: sizes[case.name])
    picks = sorted({round(q * (len(by_size) - 1)) for q in np.linspace(0.2, 0.8, SAMPLES)}) if by_size else []
    sample = [by_size[i] for i in picks]
    with tempfile.TemporaryDirectory(prefix="cache-dry-run-") as folder:
        filled = build.fill_cache(sample, preprocessing, folder)
        built = sum(folder_bytes(entry.folder) for entry in filled.entries)
    total, measured = sum(sizes.values()), max(sum(sizes[case.name] for case in sample), 1)
    share = total / measured
    seconds = filled.seconds * share / max(workers, 1)
    return Estimate(
        len(cases), len(cases) - len(missing), total, round(built * share), seconds, len(sample), len(filled.failures)
    )


def _bytes(path: Path) -> int:
    try:
        return folder_bytes(path) if path.is_dir() else path.stat().st_size
    except OSError:
        return 0


def duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{hours:.1f} h" if hours >= 1 else f"{minutes:.1f} min" if minutes >= 1 else f"{seconds:.0f} s"


# ---------------------------------------------------------------- is it whole


def verify(cache_dir: Path, workers: int = 0) -> tuple[int, dict[Path, str]]:
    """(entries read, what is wrong with which folder). Every byte is read and compared with its checksum."""
    folders = entry_folders(cache_dir)
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        results = progress(pool.map(_damage, folders), desc="verify", total=len(folders), unit="volume")
        return len(folders), {folder: wrong for folder, wrong in zip(folders, results) if wrong}


def _damage(folder: Path) -> str | None:
    try:
        meta = json.loads((folder / "meta.json").read_text())
        for name, checksum in meta["checksums"].items():
            if hashing.file_hash(folder / name) != checksum:
                return f"{name} has changed since it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError) as error:
        return f"meta.json cannot be read ({error})"
    return None


# ---------------------------------------------------------------- what may go


def prune(cache_dir: Path, cases: Iterable[Case], remove: bool = True) -> tuple[list[Path], int]:
    """Remove the entries of volumes that `cases` do not name, and what killed processes left; (folders, bytes).

    Entries of a named volume stay, whatever their settings. With `remove` False nothing is touched.
    """
    index = hashing.HashIndex(cache_dir / "index.jsonl")
    named = {index.get(case.image) for case in cases}
    gone = [folder for folder in entry_folders(cache_dir) if not set(_files(folder)[:1]) & named]
    gone += [folder for folder in cache_dir.glob(".tmp-*") if _abandoned(folder)]
    freed = sum(map(folder_bytes, gone))
    if remove:
        for folder in gone:
            shutil.rmtree(folder)
    return gone, freed


def _files(folder: Path) -> list[str]:
    try:
        return json.loads((folder / "meta.json").read_text())["files"]
    except (OSError, ValueError, KeyError):
        return []


def _abandoned(folder: Path) -> bool:
    """Whether the process that was writing an unfinished folder is gone (or, on another machine, long silent)."""
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
        return True
    return True


# ---------------------------------------------------------------- what is in it


def describe_cache(entries: Sequence[CachedVolume]) -> str:
    """The data set in numbers: least, median and most of shape, spacing, intensities as scanned, foreground, bytes."""
    metas = [json.loads((entry.folder / "meta.json").read_text()) for entry in entries]
    if not metas:
        return "no volume"
    scanned = [meta["scanned"] for meta in metas]
    rows = [(f"shape {axis} as scanned", [s["shape"][i] for s in scanned]) for i, axis in enumerate("DHW")]
    rows += [(f"spacing {axis} as scanned, mm", [s["spacing"][i] for s in scanned]) for i, axis in enumerate("DHW")]
    rows += [(f"shape {axis} cached", [meta["levels"][0][i] for meta in metas]) for i, axis in enumerate("DHW")]
    rows += [
        (f"intensity, {p:g} % percentile", [s["percentiles"][i] for s in scanned])
        for i, p in enumerate(build.PERCENTILES)
    ]
    rows.append(("foreground share of the cached box", [meta["foreground_share"] for meta in metas]))
    rows.append(("rounding error, of the intensity range", [meta["quantisation"]["max_error"] for meta in metas]))
    rows.append(("MB on disk", [folder_bytes(entry.folder) / 1e6 for entry in entries]))
    lines = [f"{len(metas)} volumes, {len({entry.content_hash for entry in entries})} different"]
    lines.append(f"{'':42s}{'least':>10s}{'median':>10s}{'most':>10s}")
    for name, values in rows:
        lines.append(f"{name:42s}" + "".join(f"{v:10.4g}" for v in (min(values), np.median(values), max(values))))
    return "\n".join(lines)
