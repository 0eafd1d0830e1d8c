"""The on-disk cache: one folder per preprocessed volume, written once, read in crops. Axis order (C, D, H, W).

    cache_dir/index.jsonl              (path, size, mtime) -> content hash, so that a second call reads no volume
    cache_dir/<key>/image.b2nd         blosc2 arrays: int16 (or uint8), compressed, in chunks of 64^3 and blocks of 32^3
                    image_2x.b2nd ...  reduced levels, area-averaged, for views that cover much of a scan
                    label.b2nd  points.npz  meta.json

The key is content: the bytes of the files, every preprocessing setting, the format's version. So another spacing makes
new entries, a replaced file is noticed, and the same call again does nothing. An entry is written under a temporary
name and renamed: it is whole or absent, and any number of processes may fill one cache.
"""

import hashlib
import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import torch

from common import arrays, identity
from common.config import InputError
from common.datalist import Case
from common.logging import progress
from common.volumes import Preprocessing, read_image, read_label

FORMAT = 1
MAX_POINTS = 2000  # sampled voxels per label class
WORTH_WORKERS = 8  # fewer volumes are built faster than worker processes start


@dataclass(frozen=True)
class Entry:
    """One cached volume. Cheap to make and to pickle; arrays are opened where they are read, once per process."""

    name: str
    source: Path  # image file or DICOM folder of the case
    folder: Path
    content_hash: str  # of the voxels as scanned, whatever the file's name, format or compression
    channels: int
    levels: tuple[tuple[int, int, int], ...]  # shape (D, H, W) of each level, the full one first
    affine: np.ndarray = field(compare=False, repr=False)  # (4, 4): voxel of the cached grid -> mm, RAS
    spacing: tuple[float, float, float]  # mm
    has_label: bool
    scale: float  # stored number * scale + offset = preprocessed intensity
    offset: float

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.levels[0]

    def read(self, start: Sequence[int], size: Sequence[int], level: int = 0) -> torch.Tensor:
        """The box [start, start + size) of a level as (C, d, h, w) float32; outside the volume 0, the scale's minimum.

        Only the chunks that the box touches are read. InputError when the entry is gone or damaged.
        """
        box = arrays.read_box(self.folder / arrays.level_name(level), start, size)
        values = box.inside.astype(np.float32) * np.float32(self.scale) + np.float32(self.offset)
        return torch.from_numpy(box.pad(values))

    def read_label(self, start: Sequence[int], size: Sequence[int]) -> torch.Tensor:
        """The box of the label map as (1, d, h, w) uint8; outside the volume 0. InputError without a label."""
        if not self.has_label:
            raise InputError(f"{self.source}: was cached without a label")
        box = arrays.read_box(self.folder / "label.b2nd", start, size)
        return torch.from_numpy(box.pad(np.ascontiguousarray(box.inside)))

    @property
    def class_points(self) -> dict[int, np.ndarray]:
        """Of each label class that is present, up to 2000 random voxels: id -> (K, 3) int32."""
        return _points(self.folder) if self.has_label else {}


@lru_cache(maxsize=1024)
def _points(folder: Path) -> dict[int, np.ndarray]:
    try:
        with np.load(folder / "points.npz") as file:
            return {int(name): file[name] for name in file.files}
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder}: this cache entry is damaged ({error}); delete the folder to make it anew"
        ) from None


# ---------------------------------------------------------------- filling


@dataclass
class Filled:
    """What `fill` did: an entry per usable case, in the order of the cases, and the reason for each of the others."""

    entries: list[Entry]
    failures: list[tuple[Case, str]]
    built: int = 0
    seconds: float = 0.0
    peak_memory: int = 0  # bytes, the largest of any worker


def ensure(cases: Sequence[Case], preprocessing: Preprocessing, cache_dir: str | Path, workers: int = 0) -> list[Entry]:
    """The cached entries of `cases`, in their order; what is missing is built, with a progress bar.

    InputError when a case cannot be used, after all others are built; `fill` leaves it out and goes on instead.
    """
    filled = fill(cases, preprocessing, cache_dir, workers)
    if filled.failures:
        first = filled.failures[0][1]
        others = len(filled.failures) - 1
        raise InputError(first if not others else f"{first} (and {others} more of {len(cases)} volumes cannot be used)")
    return filled.entries


def fill(cases: Sequence[Case], preprocessing: Preprocessing, cache_dir: str | Path, workers: int = 0) -> Filled:
    """Build what is missing; a case that cannot be used is reported in `failures` and the rest goes on."""
    cache_dir, start = Path(cache_dir), time.monotonic()
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cache_dir {cache_dir}: cannot be written ({error.strerror})") from None
    index = identity.Index(cache_dir / "index.jsonl")
    entries: dict[int, Entry] = {}
    reasons: dict[int, str] = {}
    missing = []
    for number, case in enumerate(cases):
        entry = _lookup(case, preprocessing, cache_dir, index)
        if entry is None:
            missing.append(number)
        else:
            entries[number] = entry
    peak = 0
    if missing:
        jobs = {n: (cases[n], preprocessing, cache_dir) for n in missing}
        bar = progress(desc="cache", total=len(missing), unit="volume")
        for number, result in _run(jobs, workers):
            if isinstance(result, str):
                reasons[number] = result
            else:
                entries[number], known, memory = result
                index.add(known)
                peak = max(peak, memory)
            bar.update()
        bar.close()
    return Filled(
        entries=[entries[n] for n in sorted(entries)],
        failures=[(cases[n], reasons[n]) for n in sorted(reasons)],
        built=len(missing) - len(reasons),
        seconds=time.monotonic() - start,
        peak_memory=peak,
    )


def _run(jobs: dict[int, tuple], workers: int):
    """(number, result of `_build_case`) for each job as it is done."""
    if workers <= 0 or len(jobs) < WORTH_WORKERS:
        for number, job in jobs.items():
            yield number, _build_case(*job)
        return
    context = get_context("forkserver")
    context.set_forkserver_preload(["common.cache"])  # imports once, for all workers
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context) as pool:
        futures = {pool.submit(_build_case, *job): number for number, job in jobs.items()}
        for future in as_completed(futures):
            yield futures[future], future.result()


def _lookup(case: Case, preprocessing: Preprocessing, cache_dir: Path, index: identity.Index) -> Entry | None:
    """The entry of a case whose files the index knows, None when it must be built (or cannot be read)."""
    hashes = [index.get(path) for path in _files(case)]
    if None in hashes:
        return None
    return open_entry(cache_dir / entry_key(hashes, preprocessing), case)


def _files(case: Case) -> list[Path]:
    return [case.image] if case.label is None else [case.image, case.label]


def entry_key(hashes: Sequence[str], preprocessing: Preprocessing) -> str:
    """Name of an entry: a hash of the files' hashes (image, then label), every setting and the format's version."""
    text = json.dumps({"files": list(hashes), "preprocessing": asdict(preprocessing), "format": FORMAT}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def open_entry(folder: Path, case: Case | None = None) -> Entry | None:
    """The entry in `folder`, under the name of `case`; None when there is none that is whole."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        return Entry(
            name=case.name if case else meta["name"],
            source=case.image if case else Path(meta["source"]),
            folder=folder,
            content_hash=meta["content_hash"],
            channels=meta["channels"],
            levels=tuple(tuple(shape) for shape in meta["levels"]),
            affine=np.asarray(meta["affine"], np.float64),
            spacing=tuple(meta["spacing"]),
            has_label=meta["has_label"],
            scale=meta["quantisation"]["scale"],
            offset=meta["quantisation"]["offset"],
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):  # not one that this code wrote whole: build it anew
        shutil.rmtree(folder, ignore_errors=True)
        return None


# ---------------------------------------------------------------- building one entry


def _build_case(case: Case, preprocessing: Preprocessing, cache_dir: Path):
    """(entry, what the index learns, peak memory of this process in bytes), or why the case cannot be used."""
    try:
        known = [identity.fingerprint(path) for path in _files(case)]
        folder = cache_dir / entry_key([file.hash for file in known], preprocessing)
        entry = open_entry(folder, case)
        if entry is None:
            _build(case, preprocessing, folder)
            entry = open_entry(folder, case)
        return entry, known, identity.peak_memory()
    except InputError as error:
        return str(error)
    except OSError as error:
        return f"{case.image}: {error}"


def _build(case: Case, preprocessing: Preprocessing, folder: Path) -> None:
    image = read_image(case.image, preprocessing.channels)
    label = None if case.label is None else read_label(case.label, image)
    content_hash = identity.content_hash(image)
    scanned = {"shape": list(image.shape[1:]), "spacing": _round(image.pixdim), "affine": _round(image.affine)}
    image, label = preprocessing.apply(image, label)
    temporary = folder.parent / f".tmp-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    try:
        temporary.mkdir()
        quantisation, levels = arrays.write_image(temporary, image, preprocessing)
        if label is not None:
            arrays.write(temporary / "label.b2nd", label.numpy(), codec=blosc2.Codec.ZSTD)
            _write_points(temporary / "points.npz", label.numpy()[0])
        meta = {
            "format": FORMAT,
            "name": case.name,
            "source": str(case.image),
            "label": case.label and str(case.label),
            "content_hash": content_hash,
            "scanned": scanned,
            "preprocessing": asdict(preprocessing),
            "channels": image.shape[0],
            "shape": list(image.shape[1:]),
            "levels": levels,
            "affine": _round(image.affine),
            "spacing": _round(image.pixdim),
            "has_label": label is not None,
            "quantisation": quantisation,
            "checksums": {path.name: identity.file_hash(path) for path in sorted(temporary.iterdir())},
        }
        with open(temporary / "meta.json", "w") as file:
            json.dump(meta, file, indent=1)
        arrays.publish(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _round(values: torch.Tensor) -> Any:
    return np.round(np.asarray(values, np.float64), 9).tolist()


def _write_points(path: Path, label: np.ndarray) -> None:
    """Sampled voxels of every class present, the same ones each time."""
    rng, points = np.random.default_rng(0), {}
    flat = label.reshape(-1)
    for number in np.flatnonzero(np.bincount(flat, minlength=256)):
        where = np.flatnonzero(flat == number)
        if len(where) > MAX_POINTS:
            where = np.sort(rng.choice(where, MAX_POINTS, replace=False))
        points[str(number)] = np.stack(np.unravel_index(where, label.shape), 1).astype(np.int32)
    np.savez_compressed(path, **points)
