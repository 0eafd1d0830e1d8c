"""The data loader, and a measurement of its speed without a model (`--loader_only` of Pretrain.main_pretrain)."""

import os
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common.data.sampler import StreamSampler
from common.runlog import progress
from common.signals import SIGNALS


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


def build_loader(dataset: Dataset, sampler: StreamSampler, workers: int, device: torch.device) -> DataLoader:
    """Return a loader of the batches of this rank, in the order of the stream."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
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


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Return the batch with its tensors on `device`."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
