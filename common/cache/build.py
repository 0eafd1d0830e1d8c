"""The on-disk cache: one folder per preprocessed volume, written once, read in boxes. Axis order (C, D, H, W).

    cache_dir/<key>/image.b2nd         blosc2 arrays: int16 (or uint8), compressed, in chunks of 64^3 and blocks of 32^3
                    image_2x.b2nd ...  reduced levels, area-averaged, for views that cover much of a scan
                    label.b2nd  points.npz  meta.json
    cache_dir/index.jsonl              (path, size, modification time) -> hash: a second call reads no volume
    cache_dir/failures.jsonl           volumes that cannot be used, with the reasons
    cache_dir/locks/                   locks of the volumes that are being built

The key is a hash of the files, of every preprocessing setting and of the format's version. So another spacing makes
another volume, a changed file is noticed, and the same call again does nothing. A volume is written to a temporary
folder and renamed, so it is complete or absent. Any number of processes may build one cache; each builds the volumes
that no other process is building.
"""

import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import blosc2
import numpy as np
import torch
from monai.data import MetaTensor

from common import watchdog
from common.cache import hashing, storage
from common.cache.failures import Failure, failure_table
from common.cache.hashing import FileRecord, HashIndex
from common.cache.jsonlines import JsonLines
from common.cache.volume import FORMAT, CachedVolume, open_volume, volume_key
from common.data.datalist import Case
from common.data.preprocessing import Preprocessing
from common.data.volume_io import read_image, read_label
from common.errors import InputError, one_line
from common.files import digest, naming_errors, try_lock
from common.resources import peak_memory
from common.runlog import print_main, progress

# sampled voxels per label class
MAX_POINTS = 2000
# fewer volumes are built faster than worker processes start
MIN_VOLUMES_FOR_WORKERS = 8
PERCENTILES = (0.5, 5, 25, 50, 75, 95, 99.5)


@dataclass
class BuildResult:
    """The usable volumes in the order of the cases, the other cases with reasons, and what building cost.

    `peak_memory` is the largest memory of a process that built, in bytes.
    """

    volumes: list[CachedVolume]
    failures: list[Failure]
    built: int
    seconds: float
    peak_memory: int


def build_cache(
    cases: Sequence[Case],
    preprocessing: Preprocessing,
    cache_dir: str | Path,
    workers: int = 0,
    skip_failures: bool = False,
) -> list[CachedVolume]:
    """Return the cached volumes of `cases`, in their order; build those that are missing, with a progress bar.

    Args:
        skip_failures: leave out a volume that cannot be used, or whose voxels are those of another, and print why.

    Raises:
        InputError: a volume cannot be used (the others are built first), or with `skip_failures` none can.
    """
    result = build_missing(cases, preprocessing, cache_dir, workers, unique=skip_failures)
    failures = result.failures
    if not skip_failures and failures:
        others = f" (and {len(failures) - 1} more of {len(cases)} volumes cannot be used)" if len(failures) > 1 else ""
        raise InputError(failures[0].reason + others)
    if failures:
        print_main(failure_table(failures, limit=20))
    if skip_failures and not result.volumes:
        reason = failures[0].reason if failures else "the list is empty"
        raise InputError(f"none of the {len(cases)} volumes can be used: {reason}")
    return result.volumes


def build_missing(
    cases: Sequence[Case], preprocessing: Preprocessing, cache_dir: str | Path, workers: int = 0, unique: bool = False
) -> BuildResult:
    """Build the volumes that are missing. A case that cannot be used is logged, and the others are built.

    Args:
        unique: of several cases with the same voxels use the first; the others are failures.

    Raises:
        InputError: the cache cannot be written.
    """
    cache_dir, start = Path(cache_dir), time.monotonic()
    outcomes: dict[int, Built | Failure] = {}
    jobs: dict[int, Job] = {}
    with naming_errors(cache_dir):
        (cache_dir / "locks").mkdir(parents=True, exist_ok=True)
        index = HashIndex(cache_dir / "index.jsonl")
        log = JsonLines(cache_dir / "failures.jsonl", key="key")
        for number, case in enumerate(cases):
            job = Job(case, preprocessing, cache_dir, _state_key(case, preprocessing))
            if known := _known_outcome(job, index, log):
                outcomes[number] = known
            else:
                jobs[number] = job
        if jobs:
            for number, outcome in progress(_run(jobs, workers), "cache", len(jobs), unit="volume"):
                outcomes[number] = outcome
                if isinstance(outcome, Built):
                    index.add(map(vars, outcome.records))
                elif outcome.lasting:
                    log.add([outcome.record(jobs[number].key)])
    ordered = [outcome for _, outcome in sorted(outcomes.items())]
    built = [outcome for outcome in ordered if isinstance(outcome, Built)]
    final = _without_repeats(ordered) if unique else ordered
    return BuildResult(
        volumes=[outcome.volume for outcome in final if isinstance(outcome, Built)],
        failures=[outcome for outcome in final if isinstance(outcome, Failure)],
        built=sum(outcome.fresh for outcome in built),
        seconds=time.monotonic() - start,
        peak_memory=max((outcome.memory for outcome in built), default=0),
    )


class Job(NamedTuple):
    """A volume to build. `key` identifies case, files and settings, for the lock and the log of failures."""

    case: Case
    preprocessing: Preprocessing
    cache_dir: Path
    key: str


class Built(NamedTuple):
    """A volume, the new records of its files, whether this call built it, and the peak memory in bytes."""

    case: Case
    volume: CachedVolume
    records: Sequence[FileRecord] = ()
    fresh: bool = False
    memory: int = 0


def _known_outcome(job: Job, index: HashIndex, log: JsonLines) -> Built | Failure | None:
    if job.case.problem:
        return Failure(job.case, job.case.problem)
    if volume := find_volume(job.case, job.preprocessing, job.cache_dir, index):
        return Built(job.case, volume)
    return Failure(job.case, log.records[job.key]["reason"]) if job.key in log.records else None


def find_volume(case: Case, preprocessing: Preprocessing, cache_dir: Path, index: HashIndex) -> CachedVolume | None:
    """Return the cached volume of a case, None if it must be built or cannot be."""
    records = [index.get(path) for path in _files(case)]
    if None in records:
        return None
    return open_volume(cache_dir / volume_key([record.hash for record in records], preprocessing), case)


def _files(case: Case) -> list[Path]:
    return [case.image] if case.label is None else [case.image, case.label]


def _state_key(case: Case, preprocessing: Preprocessing) -> str:
    states = []
    for path in _files(case):
        try:
            state = hashing.file_state(path)
        except OSError:
            state = "unreadable"
        states.append([str(path.absolute()), state])
    text = json.dumps([states, preprocessing.key(), FORMAT])
    return digest([text], 32)


def _without_repeats(outcomes: Sequence[Built | Failure]) -> list[Built | Failure]:
    first: dict[str, CachedVolume] = {}
    result = list(outcomes)
    for number, outcome in enumerate(outcomes):
        if isinstance(outcome, Built):
            other = first.setdefault(outcome.volume.content_hash, outcome.volume)
            if other is not outcome.volume:
                problem = f"found the same voxels as in {other.source}, expected each volume once"
                result[number] = Failure(outcome.case, f"{outcome.volume.source}: {problem}")
    return result


# ---------------------------------------------------------------- workers


def _run(jobs: dict[int, Job], workers: int) -> Iterator[tuple[int, Built | Failure]]:
    """Yield (number, outcome) for each job when it is done, last those that other processes are building."""
    waiting = dict(jobs)
    pause = 0.0
    while waiting:
        busy = {}
        use_workers = workers > 0 and len(waiting) >= MIN_VOLUMES_FOR_WORKERS
        here = ((number, _build_case(job)) for number, job in waiting.items())
        for number, outcome in _in_workers(waiting, workers) if use_workers else here:
            watchdog.reset()
            if outcome is None:
                busy[number] = waiting[number]
            else:
                yield number, outcome
        pause = 0.0 if len(busy) < len(waiting) else min(1.0, pause + 0.05)
        time.sleep(pause)
        waiting = busy


def _in_workers(jobs: dict[int, Job], workers: int) -> Iterator[tuple[int, Built | Failure | None]]:
    """Yield (number, outcome) for each job from worker processes; None for a job of another process.

    If a worker dies (out of memory, a crash in a library), the jobs that were running are tried again one by one, and
    the one that kills its worker is a failure.
    """
    waiting = list(jobs.items())
    suspects: list[tuple[int, Job]] = []
    while waiting or suspects:
        queue, limit = (suspects, 1) if suspects else (waiting, workers)
        running: dict[Future, tuple[int, Job]] = {}
        pool = _pool(limit)
        try:
            yield from _drain(pool, queue, running, limit)
        except BrokenProcessPool:
            if queue is waiting:
                suspects = list(running.values())
            else:
                ((number, job),) = running.values()
                reason = "the process that read it died (out of memory, or a crash in a library)"
                yield number, Failure(job.case, f"{job.case.image}: {reason}")
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _drain(
    pool: ProcessPoolExecutor, queue: list[tuple[int, Job]], running: dict[Future, tuple[int, Job]], limit: int
) -> Iterator[tuple[int, Built | Failure | None]]:
    """Run the jobs of `queue`, at most `limit` at a time, which `running` holds."""
    while queue or running:
        while queue and len(running) < limit:
            number, job = queue.pop(0)
            running[pool.submit(_build_case, job)] = number, job
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            # before it leaves `running`, for it may raise BrokenProcessPool
            outcome = future.result()
            yield running.pop(future)[0], outcome


def _pool(workers: int) -> ProcessPoolExecutor:
    context = get_context("forkserver")
    # import once, for all workers
    context.set_forkserver_preload(["common.cache.build"])
    return ProcessPoolExecutor(workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,))


# ---------------------------------------------------------------- one volume


def _build_case(job: Job) -> Built | Failure | None:
    """Build one volume. Return None if another process is building it."""
    case = job.case
    try:
        with _lock(job.cache_dir / "locks" / job.key) as locked:
            return _build_locked(job) if locked else None
    except InputError as error:
        return Failure(case, str(error))
    # an unforeseen error of a library: leave out this volume and continue
    except Exception as error:
        return Failure(case, f"{case.image}: {type(error).__name__}: {one_line(error)}")


@contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Yield whether this process holds the lock `path`. The lock ends with the process, however that ends."""
    with open(path, "ab") as file:
        locked = try_lock(file.fileno())
        try:
            yield locked
        finally:
            if locked:
                path.unlink(missing_ok=True)


def _build_locked(job: Job) -> Built | Failure:
    case = job.case
    records = [hashing.file_record(path) for path in _files(case)]
    hashes = [record.hash for record in records]
    folder = job.cache_dir / volume_key(hashes, job.preprocessing)
    volume = open_volume(folder, case)
    fresh = volume is None
    if fresh:
        try:
            _write_volume(case, job.preprocessing, folder, hashes)
        except InputError as error:
            return Failure(case, str(error), lasting=True)
        volume = open_volume(folder, case)
    records[0] = replace(records[0], content=volume.content_hash)
    return Built(case, volume, records, fresh, peak_memory())


def _write_volume(case: Case, preprocessing: Preprocessing, folder: Path, hashes: list[str]) -> None:
    image = read_image(case.image, preprocessing.channels)
    label = None if case.label is None else read_label(case.label, image)
    meta = {
        "format": FORMAT,
        "name": case.name,
        "source": str(case.image),
        "label": case.label and str(case.label),
        "files": hashes,
        "content_hash": hashing.content_hash(image),
        "scanned": _as_scanned(image),
        "preprocessing": preprocessing.key(),
        "has_label": label is not None,
    }
    image, label = preprocessing.apply(image, label, overwrite=True)
    threshold = preprocessing.foreground_threshold or 0.0
    with storage.new_folder(folder) as temporary:
        quantisation, levels = storage.write_image(temporary, image, preprocessing)
        if label is not None:
            storage.write(temporary / "label.b2nd", label.numpy(), codec=blosc2.Codec.ZSTD)
            _write_points(temporary / "points.npz", label.numpy()[0])
        meta |= {
            "channels": image.shape[0],
            "levels": levels,
            "affine": _round(image.affine),
            "spacing": _round(image.pixdim),
            "foreground_share": int(torch.count_nonzero(image > threshold)) / image.numel(),
            "quantisation": quantisation,
            "checksums": {path.name: hashing.file_hash(path) for path in sorted(temporary.iterdir())},
        }
        (temporary / "meta.json").write_text(json.dumps(meta, indent=1))


def _round(values: torch.Tensor) -> Any:
    return np.round(np.asarray(values, np.float64), 9).tolist()


def _as_scanned(image: MetaTensor) -> dict[str, Any]:
    """Return shape, spacing, and percentiles of a million voxels of the first channel."""
    voxels = image.as_tensor()[0].flatten()
    percentiles = np.percentile(voxels[:: max(1, len(voxels) // 1_000_000)].numpy(), PERCENTILES)
    shape, spacing = list(image.shape[1:]), _round(image.pixdim)
    return {"shape": shape, "spacing": spacing, "percentiles": percentiles.round(3).tolist()}


def _write_points(path: Path, label: np.ndarray) -> None:
    """Write a random sample of the voxels of every class present, the same in every call."""
    rng, points = np.random.default_rng(0), {}
    flat = label.reshape(-1)
    for number in np.flatnonzero(np.bincount(flat, minlength=256)):
        where = np.flatnonzero(flat == number)
        if len(where) > MAX_POINTS:
            where = np.sort(rng.choice(where, MAX_POINTS, replace=False))
        points[str(number)] = np.stack(np.unravel_index(where, label.shape), 1).astype(np.int32)
    np.savez_compressed(path, **points)
