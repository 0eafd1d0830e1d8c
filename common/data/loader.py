"""The data loader, the way of its batches to the device, and its speed without a model (`--loader_only`)."""

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from common.data.sampler import StreamSampler
from common.errors import InputError
from common.runlog import progress
from common.signals import SIGNALS

# batches that a loading process makes ahead
PREFETCH = 2
SHARED_MEMORY = Path("/dev/shm")


def measure_loader(loader: Iterable[Any], volumes_in: Callable[[Any], int], crops: int) -> str:
    """Iterate over `loader` and return its speed as text, measured from the second batch on: then the workers run.

    Args:
        volumes_in: returns the number of volumes in a batch.
        crops: number of crops of a volume.
    """
    iterator = iter(loader)
    next(iterator, None)
    workers = [worker.pid for worker in getattr(iterator, "_workers", ())]
    before, start = disk_bytes(workers), time.perf_counter()
    counts = [volumes_in(batch) for batch in progress(iterator, "loader", unit="batch")]
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


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Return the batch with its tensors on `device`."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}


@dataclass(frozen=True)
class Loading:
    """What the loading processes read, and what the training process makes of it.

    Attributes:
        dataset: `dataset[(position, index)]` returns a sample.
        collate: samples -> micro-batch in host memory, in the loading process.
        prepare: (micro-batch, device) -> what the method takes, on the device.
    """

    dataset: Dataset
    collate: Callable[[list], dict[str, Any]] = default_collate
    prepare: Callable[[dict[str, Any], torch.device], dict[str, Any]] = to_device


def build_loader(loading: Loading, sampler: StreamSampler, workers: int, device: torch.device) -> DataLoader:
    """Return a loader of the batches of this rank, in the order of the stream."""
    return DataLoader(
        loading.dataset,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=loading.collate,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
        prefetch_factor=PREFETCH if workers else None,
        worker_init_fn=_start_worker,
    )


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


class DeviceBatches:
    """Iterator over the batches of a loader, each prepared on the device.

    On CUDA a batch is prepared on a stream of its own while the device works on the one before: the copy from pinned
    memory and what `prepare` computes overlap with the update. On a CPU a batch is prepared when it is asked for.
    """

    def __init__(self, loader: Iterable[Any], prepare: Callable[[Any, torch.device], Any], device: torch.device):
        self._batches, self._prepare, self._device = iter(loader), prepare, device
        self._stream, self._next = None, None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            # what `prepare` reads may have been written on the current stream just now
            self._stream.wait_stream(torch.cuda.current_stream(device))
            self._load()

    def __iter__(self) -> "DeviceBatches":
        return self

    def __next__(self) -> Any:
        if self._stream is None:
            return self._prepare(next(self._batches), self._device)
        if self._next is None:
            raise StopIteration
        batch, current = self._next, torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        for value in batch.values():
            if isinstance(value, Tensor):
                # its memory must not be used again on its own stream before this one is done with it
                value.record_stream(current)
        self._load()
        return batch

    def _load(self) -> None:
        batch = next(self._batches, None)
        with torch.cuda.stream(self._stream):
            self._next = None if batch is None else self._prepare(batch, self._device)


# ---------------------------------------------------------------- shared memory


def check_shared_memory(sample: Any, sampler: StreamSampler, workers: int, folder: Path = SHARED_MEMORY) -> None:
    """Check that the batches on their way from the loading processes fit into shared memory; without, there is none.

    A loading process that finds it full dies of a bus error, often hours later. Nothing is checked where the system has
    no such folder.

    Args:
        sample: a batch of one sample, about as large as the others.
        sampler: of the batches to come.
        workers: loading processes of this process; every process on this machine has as many.

    Raises:
        InputError: they do not fit, with the remedy.
    """
    if workers == 0 or not folder.is_dir():
        return
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # and the one that is trained on
    batches, micro_batch = min(workers * PREFETCH + 1, len(sampler)), sampler.micro_batch
    needed, free = tensor_bytes(sample) * micro_batch * batches * processes, shutil.disk_usage(folder).free
    if needed > free:
        each = f"{processes} process(es) x {batches} batches of {micro_batch} samples on their way"
        raise InputError(
            f"{folder}: {free / 1e6:,.0f} MB free, about {needed / 1e6:,.0f} MB needed for {each}; enlarge it (docker "
            "run --shm-size=16g or --ipc=host), or lower --workers (0: load in the training process) or "
            "--micro_batch_size"
        )


def tensor_bytes(value: Any) -> int:
    """Return the bytes of all tensors in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return sum(map(tensor_bytes, parts))
