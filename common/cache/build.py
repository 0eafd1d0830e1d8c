"""The on-disk cache: one folder per preprocessed volume, written once, read in crops. Axis order (C, D, H, W).

    cache_dir/<key>/image.b2nd         blosc2 arrays: int16 (or uint8), compressed, in chunks of 64^3 and blocks of 32^3
                    image_2x.b2nd ...  reduced levels, area-averaged, for views that cover much of a scan
                    label.b2nd  points.npz  meta.json
    cache_dir/index.jsonl              (path, size, time of change) -> content hash: a second call reads no volume
    cache_dir/quarantine.jsonl         volumes that cannot be used, and why
    cache_dir/locks/                   which volumes are being built

The key is content: the bytes of the files, every preprocessing setting, the format's version. So another spacing makes
new entries, a replaced file is noticed, and the same call again does nothing. An entry is written under a temporary
name and renamed: it is whole or absent. Any number of processes may fill one cache; each takes what no other is at.
"""

import fcntl
import hashlib
import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import blosc2
import numpy as np
import torch

from common import watchdog
from common.cache import hashing, storage
from common.cache.failures import Failure, FailureLog, failure_table
from common.cache.volume import FORMAT, CachedVolume, open_volume, volume_key
from common.data.datalist import Case
from common.data.preprocessing import Preprocessing
from common.data.volume_io import read_image, read_label
from common.errors import InputError, one_line
from common.runlog import print_main, progress

MAX_POINTS = 2000  # sampled voxels per label class
WORTH_WORKERS = 8  # fewer volumes are built faster than worker processes start
PERCENTILES = (0.5, 5, 25, 50, 75, 95, 99.5)


@dataclass
class BuildResult:
    """What `fill` did: an entry per usable case, in the order of the cases, and the reason for each of the others."""

    entries: list[CachedVolume]
    failures: list[Failure] = field(default_factory=list)
    built: int = 0
    seconds: float = 0.0
    peak_memory: int = 0  # bytes, the largest of any process that built


def build_cache(
    cases: Sequence[Case],
    preprocessing: Preprocessing,
    cache_dir: str | Path,
    workers: int = 0,
    skip_failures: bool = False,
) -> list[CachedVolume]:
    """The cached volumes of `cases`, in their order; missing ones are built, with a progress bar.

    Args:
        skip_failures: leave out a volume that cannot be used, or whose voxels occur twice, and print why.

    Raises:
        InputError: a volume cannot be used (the others are built first), or with `skip_failures` none can.
    """
    result = fill_cache(cases, preprocessing, cache_dir, workers, unique=skip_failures)
    failures = result.failures
    if not skip_failures and failures:
        others = f" (and {len(failures) - 1} more of {len(cases)} volumes cannot be used)" if len(failures) > 1 else ""
        raise InputError(failures[0].reason + others)
    if failures:
        print_main(failure_table(failures, limit=20))
    if skip_failures and not result.entries:
        reason = failures[0].reason if failures else "the list is empty"
        raise InputError(f"none of the {len(cases)} volumes can be used: {reason}")
    return result.entries


def fill_cache(
    cases: Sequence[Case],
    preprocessing: Preprocessing,
    cache_dir: str | Path,
    workers: int = 0,
    unique: bool = False,
) -> BuildResult:
    """Build what is missing. A case that cannot be used goes to the quarantine list and the rest goes on.

    `unique`: of several cases with the same voxels the first is used, the others count as failures.
    """
    cache_dir, start = Path(cache_dir), time.monotonic()
    try:
        (cache_dir / "locks").mkdir(parents=True, exist_ok=True)
        index = hashing.HashIndex(cache_dir / "index.jsonl")
        quarantine = FailureLog(cache_dir / "quarantine.jsonl")
        filled = _fill(cases, preprocessing, cache_dir, workers, index, quarantine)
    except OSError as error:
        raise InputError(f"cache_dir {cache_dir}: cannot be written ({error.strerror or error})") from None
    if unique:
        _leave_out_doubles(filled, {case.name: case for case in cases})
    filled.seconds = time.monotonic() - start
    return filled


def _fill(
    cases: Sequence[Case],
    preprocessing: Preprocessing,
    cache_dir: Path,
    workers: int,
    index: hashing.HashIndex,
    quarantine: FailureLog,
) -> BuildResult:
    entries: dict[int, CachedVolume] = {}
    failures: dict[int, Failure] = {}
    jobs: dict[int, tuple[Case, Preprocessing, Path]] = {}
    keys: dict[int, str] = {}
    for number, case in enumerate(cases):
        entry = lookup(case, preprocessing, cache_dir, index)
        keys[number] = _state_key(case, preprocessing)
        if case.problem:
            failures[number] = Failure(case, case.problem)
        elif entry:
            entries[number] = entry
        elif reason := quarantine.reason(keys[number]):
            failures[number] = Failure(case, reason, lasting=True)
        else:
            jobs[number] = (case, preprocessing, cache_dir)
    built = peak = 0
    bar = progress(desc="cache", total=len(jobs), unit="volume") if jobs else None
    for number, result in _run(jobs, workers):
        watchdog.reset()
        if isinstance(result, Failure):
            failures[number] = result
            if result.lasting:
                quarantine.add(keys[number], result)
        else:
            entries[number] = result.entry
            index.add(result.files)
            built += result.fresh
            peak = max(peak, result.memory)
        bar.update()
    if bar is not None:
        bar.close()
    return BuildResult(
        entries=[entries[n] for n in sorted(entries)],
        failures=[failures[n] for n in sorted(failures)],
        built=built,
        peak_memory=peak,
    )


def lookup(case: Case, preprocessing: Preprocessing, cache_dir: Path, index: hashing.HashIndex) -> CachedVolume | None:
    """The entry of a case whose files the index knows; None when it must be built, or cannot be."""
    hashes = [index.get(path) for path in _files(case)]
    return None if None in hashes else open_volume(cache_dir / volume_key(hashes, preprocessing), case)


def _files(case: Case) -> list[Path]:
    return [case.image] if case.label is None else [case.image, case.label]


def _state_key(case: Case, preprocessing: Preprocessing) -> str:
    """Name of a case for locks and quarantine: its paths, their state, every setting. Reads no file."""
    states = []
    for path in _files(case):
        try:
            states.append([str(path.absolute()), hashing.file_state(path)])
        except OSError:
            states.append([str(path.absolute()), "unreadable"])
    text = json.dumps([states, asdict(preprocessing), FORMAT])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _leave_out_doubles(filled: BuildResult, cases: dict[str, Case]) -> None:
    first: dict[str, CachedVolume] = {}
    kept = []
    for entry in filled.entries:
        twin = first.setdefault(entry.content_hash, entry)
        if twin is entry:
            kept.append(entry)
        else:
            reason = f"{entry.source}: found the same voxels as in {twin.source}, a volume is used once"
            filled.failures.append(Failure(cases[entry.name], reason))
    filled.entries = kept


# ---------------------------------------------------------------- workers


def _run(jobs: dict[int, tuple], workers: int) -> Iterator[tuple[int, Any]]:
    """(number, result of `_build_case`) for each job as it is done; a job that another process is at comes last."""
    waiting = dict(jobs)
    pause = 0.0
    while waiting:
        watchdog.reset()  # another process may take long
        busy = {}
        step = _in_workers if workers > 0 and len(waiting) >= WORTH_WORKERS else _here
        for number, result in step(waiting, workers):
            if result is None:
                busy[number] = waiting[number]
            else:
                yield number, result
        pause = 0.0 if len(busy) < len(waiting) else min(1.0, pause + 0.05)
        time.sleep(pause)
        waiting = busy


def _here(jobs: dict[int, tuple], workers: int) -> Iterator[tuple[int, Any]]:
    for number, job in jobs.items():
        yield number, _build_case(*job)


def _in_workers(jobs: dict[int, tuple], workers: int) -> Iterator[tuple[int, Any]]:
    """As `_here` in worker processes. When one dies (out of memory, a crash in a library), the jobs that were running
    are tried again one by one, and the one that kills its worker is reported."""
    waiting = list(jobs.items())
    suspects: list[tuple[int, tuple]] = []
    while waiting or suspects:
        alone = bool(suspects)
        queue = suspects if alone else waiting
        running: dict[Future, tuple[int, tuple]] = {}
        pool = _pool(1 if alone else min(workers, len(queue)))
        try:
            while queue or running:
                while queue and len(running) < (1 if alone else workers):
                    job = queue.pop(0)
                    running[pool.submit(_build_case, *job[1])] = job
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    result = future.result()
                    yield running.pop(future)[0], result
        except BrokenProcessPool:
            if alone:
                ((number, job),) = running.values()
                reason = "the process that read it died (out of memory, or a crash in a library)"
                yield number, Failure(job[0], f"{job[0].image}: {reason}")
            else:
                suspects = list(running.values())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _pool(workers: int) -> ProcessPoolExecutor:
    context = get_context("forkserver")
    context.set_forkserver_preload(["common.cache.build"])  # imports once, for all workers
    return ProcessPoolExecutor(workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,))


# ---------------------------------------------------------------- building one entry


class _Built(NamedTuple):
    entry: CachedVolume
    files: list[hashing.File]  # what the index learns
    fresh: bool  # made now, not by another process meanwhile
    memory: int  # peak of this process, bytes


def _build_case(case: Case, preprocessing: Preprocessing, cache_dir: Path) -> _Built | Failure | None:
    """Build one entry, or say why not; None: another process is at it."""
    try:
        with _claim(cache_dir / "locks" / _state_key(case, preprocessing)) as mine:
            if not mine:
                return None
            files = [hashing.fingerprint(path) for path in _files(case)]
            folder = cache_dir / volume_key([file.hash for file in files], preprocessing)
            if fresh := open_volume(folder, case) is None:
                try:
                    _build(case, preprocessing, folder, [file.hash for file in files])
                except InputError as error:
                    return Failure(case, str(error), lasting=True)
            entry = open_volume(folder, case)
            files[0] = hashing.File(**(vars(files[0]) | {"content": entry.content_hash}))
            return _Built(entry, files, fresh, hashing.peak_memory())
    except InputError as error:
        return Failure(case, str(error))
    except Exception as error:  # a library met what nobody foresaw: this volume is left out, the run goes on
        return Failure(case, f"{case.image}: {type(error).__name__}: {one_line(error)}")


@contextmanager
def _claim(path: Path) -> Iterator[bool]:
    """Whether this process may build what `path` stands for. The claim ends with the process, however that ends."""
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:
            pass  # a file system without locks: work may be done twice, never wrongly
        try:
            yield True
        finally:
            path.unlink(missing_ok=True)


def _build(case: Case, preprocessing: Preprocessing, folder: Path, hashes: list[str]) -> None:
    image = read_image(case.image, preprocessing.channels)
    label = None if case.label is None else read_label(case.label, image)
    content_hash = hashing.content_hash(image)
    scanned = {"shape": list(image.shape[1:]), "spacing": _round(image.pixdim), "percentiles": _percentiles(image)}
    image, label = preprocessing.apply(image, label)
    temporary = folder.parent / f".tmp-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    try:
        temporary.mkdir()
        quantisation, levels = storage.write_image(temporary, image, preprocessing)
        if label is not None:
            storage.write(temporary / "label.b2nd", label.numpy(), codec=blosc2.Codec.ZSTD)
            _write_points(temporary / "points.npz", label.numpy()[0])
        meta = {
            "format": FORMAT,
            "name": case.name,
            "source": str(case.image),
            "label": case.label and str(case.label),
            "files": hashes,
            "content_hash": content_hash,
            "scanned": scanned,
            "preprocessing": asdict(preprocessing),
            "channels": image.shape[0],
            "levels": levels,
            "affine": _round(image.affine),
            "spacing": _round(image.pixdim),
            "foreground_share": float((image.as_tensor() > (preprocessing.foreground_threshold or 0.0)).float().mean()),
            "has_label": label is not None,
            "quantisation": quantisation,
            "checksums": {path.name: hashing.file_hash(path) for path in sorted(temporary.iterdir())},
        }
        with open(temporary / "meta.json", "w") as file:
            json.dump(meta, file, indent=1)
        storage.publish(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _round(values: torch.Tensor) -> Any:
    return np.round(np.asarray(values, np.float64), 9).tolist()


def _percentiles(image: torch.Tensor) -> list[float]:
    """Of a million voxels of the first channel, as scanned."""
    voxels = torch.as_tensor(image)[0].flatten()
    return np.percentile(voxels[:: max(1, len(voxels) // 1_000_000)].numpy(), PERCENTILES).round(3).tolist()


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
