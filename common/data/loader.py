"""The data loader, the way of its batches to the device, and its speed without a model (`--loader_only`)."""

import math
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from common.data.sampler import StreamSampler, StreamSamples
from common.errors import InputError
from common.runlog import progress
from common.signals import SIGNALS

# micro-batches that are made ahead: by each loading process, or with `Loading.by_sample` by all together
PREFETCH = 2
SHARED_MEMORY = Path("/dev/shm")
# samples whose size is measured: blocks of volumes have different ones
SIZED = 4
# open files besides those of samples: libraries, the cache, logs, connections of processes
OTHER_FILES = 512


def measure_loader(loader: DataLoader, batches: Iterator[Any], volumes_in: Callable[[Any], int], crops: int) -> str:
    """Take all `batches` and return their speed as text, measured from the second one on: then the workers run.

    Args:
        loader: the one that the batches come from.
        volumes_in: returns the number of volumes in a batch.
        crops: number of crops of a volume.
    """
    next(batches, None)
    # torch has no public name for the iterator of persistent workers
    workers = [worker.pid for worker in getattr(loader._iterator, "_workers", ())]
    before, start = disk_bytes(workers), time.perf_counter()
    counts = [volumes_in(batch) for batch in progress(batches, "loader", unit="batch")]
    seconds = max(time.perf_counter() - start, 1e-9)
    rate, read = sum(counts) / seconds, max(disk_bytes(workers) - before, 0) / 1e6
    return (
        f"loader alone: {len(counts)} batches in {seconds:.1f} s; {rate:.2f} volumes/s, {rate * crops:.1f} crops/s; "
        f"{read:.1f} MB read from disk ({read / seconds:.1f} MB/s)"
    )


def disk_bytes(workers: Iterable[int] = ()) -> int:
    """Return the bytes that this process and `workers` have read from disk, 0 if the system does not report them."""
    total = 0
    for pid in (os.getpid(), *workers):
        try:
            lines = Path(f"/proc/{pid}/io").read_text().splitlines()
        # not Linux, or a worker that has ended
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))
    return total


def to_device(batch: Any, device: torch.device) -> Any:
    """Return a batch, a dict, with its tensors and those in its dicts and lists on `device`."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {name: to_device(part, device) for name, part in batch.items()}
    return [to_device(part, device) for part in batch] if isinstance(batch, list) else batch


@dataclass(frozen=True)
class Loading:
    """What the loading processes read, and what the training process makes of it.

    Attributes:
        dataset: `dataset[(position, index)]` returns a sample.
        collate: samples -> micro-batch in host memory.
        prepare: (micro-batch, device) -> what the method takes, on the device.
        by_sample: loading processes hand over single samples, and the training process collates them, which must be
            cheap. Then the samples of a micro-batch are loaded by all of them. Else each micro-batch is loaded and
            collated by one.
    """

    dataset: Dataset
    collate: Callable[[list], dict[str, Any]] = default_collate
    prepare: Callable[[dict[str, Any], torch.device], dict[str, Any]] = to_device
    by_sample: bool = False


def build_loader(loading: Loading, sampler: StreamSampler, workers: int, device: torch.device) -> DataLoader:
    """Return a loader of the micro-batches of this rank, or of their samples, in the order of the stream.

    `micro_batches` returns micro-batches of both.
    """
    if loading.by_sample:
        order = {"batch_size": None, "sampler": StreamSamples(sampler), "collate_fn": _unchanged}
    else:
        order = {"batch_sampler": sampler, "collate_fn": loading.collate}
    return DataLoader(
        loading.dataset,
        **order,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
        prefetch_factor=_prefetch(loading, sampler, workers) if workers else None,
        worker_init_fn=_start_worker,
    )


def micro_batches(loader: DataLoader, loading: Loading, micro_batch: int) -> Iterator[dict[str, Any]]:
    """Start a loader of `build_loader`, and return an iterator over its micro-batches of `micro_batch` samples."""
    items = iter(loader)
    return _collated(items, loading.collate, micro_batch) if loading.by_sample else items


def _collated(samples: Iterator[Any], collate: Callable[[list], dict[str, Any]], count: int) -> Iterator[dict]:
    while batch := list(islice(samples, count)):
        yield collate(batch)


def _prefetch(loading: Loading, sampler: StreamSampler, workers: int) -> int:
    """Return what a loading process makes ahead: micro-batches, or samples, at least those of PREFETCH micro-batches
    by all processes together."""
    return max(PREFETCH, math.ceil(PREFETCH * sampler.micro_batch / workers)) if loading.by_sample else PREFETCH


def _unchanged(sample: dict[str, Any]) -> dict[str, Any]:
    return sample


def _start_worker(worker: int) -> None:
    torch.set_num_threads(1)
    # these are meant for the training process, which still needs its data
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_workers(loader: DataLoader | None) -> None:
    """End the persistent workers of a loader, if it has any.

    After an exception they would live as long as its traceback, and a program that ends with one would hang: at its
    exit Python sends SIGTERM to them, which they ignore, and waits.
    """
    iterator = getattr(loader, "_iterator", None)
    if iterator is not None:
        # torch has no public name for this.
        iterator._shutdown_workers()


def device_batches(
    batches: Iterable[Any], prepare: Callable[[Any, torch.device], Any], device: torch.device
) -> Iterator[Any]:
    """Yield the batches of a loader, each prepared on the device.

    On CUDA they are prepared on a stream of their own. The host launches an update without waiting for it and then asks
    for the next batch, so that the copy from pinned memory and what `prepare` computes overlap with that update, and a
    late loader delays no update whose batch is there. They do not overlap where the host has waited for the update: to
    log, or to save.
    """
    if device.type != "cuda":
        for batch in batches:
            yield prepare(batch, device)
        return
    stream = torch.cuda.Stream(device)
    # what `prepare` reads may have been written on the current stream just now
    stream.wait_stream(torch.cuda.current_stream(device))
    for batch in batches:
        with torch.cuda.stream(stream):
            prepared = prepare(batch, device)
        current = torch.cuda.current_stream(device)
        current.wait_stream(stream)
        for value in prepared.values():
            if isinstance(value, Tensor):
                # its memory must not be used again on its own stream before this one is done with it
                value.record_stream(current)
        yield prepared


# ---------------------------------------------------------------- shared memory


def check_limits(loading: Loading, sampler: StreamSampler, workers: int) -> None:
    """Check that what comes from the loading processes fits into shared memory, and raise the limit of open files.

    Raises:
        InputError: it does not fit, or the system does not allow as many files.
    """
    check_shared_memory(loading, sampler, workers)
    # a batch has few tensors, whatever the number of its samples
    if workers and loading.by_sample:
        allow_open_files(samples_on_their_way(loading, sampler, workers))


def check_shared_memory(loading: Loading, sampler: StreamSampler, workers: int, folder: Path = SHARED_MEMORY) -> None:
    """Check that the samples on their way from the loading processes fit into shared memory; without, there is none.

    A loading process that finds it full dies of a bus error, often hours later. Nothing is checked where the system has
    no such folder.

    Args:
        sampler: of the samples to come. The largest of the first ones stands for all.
        workers: loading processes of this process; every process on this machine has as many.

    Raises:
        InputError: they do not fit, with the remedy.
    """
    if workers == 0 or not folder.is_dir():
        return
    first = (loading.collate([loading.dataset[item]]) for item in islice(StreamSamples(sampler), SIZED))
    processes, samples = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), samples_on_their_way(loading, sampler, workers)
    needed, free = max(map(tensor_bytes, first)) * samples * processes, shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"{folder}: {free / 1e6:,.0f} MB free, about {needed / 1e6:,.0f} MB needed for {processes} process(es) x "
            f"{samples} samples on their way; enlarge it (docker run --shm-size=16g or --ipc=host), or lower --workers "
            "(0: load in the training process) or --micro_batch_size"
        )


def allow_open_files(count: int) -> None:
    """Raise this process's limit of open files, where it is lower: a tensor in shared memory is an open file.

    Args:
        count: files for the samples on their way; OTHER_FILES more are allowed.

    Raises:
        InputError: the system does not allow as many.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + OTHER_FILES
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise InputError(
            f"open files: {hard} allowed, {needed} needed for {count} samples on their way; allow more (ulimit -Hn), "
            "or lower --workers (0: load in the training process) or --micro_batch_size"
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def samples_on_their_way(loading: Loading, sampler: StreamSampler, workers: int) -> int:
    """Return the largest number of samples that have left the loading processes, with those that are trained on."""
    ahead = workers * _prefetch(loading, sampler, workers) * (1 if loading.by_sample else sampler.micro_batch)
    return min(ahead + sampler.micro_batch, len(sampler) * sampler.micro_batch)


def tensor_bytes(value: Any) -> int:
    """Return the bytes of all tensors in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return sum(map(tensor_bytes, parts))
