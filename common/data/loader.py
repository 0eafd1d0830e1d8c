"""The data loader, and a measurement of its speed without a model (`--loader_only` of the training programs)."""

import os
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common.data.sampler import StreamSampler
from common.runlog import progress


@dataclass(frozen=True)
class LoaderSpeed:
    """The speed of a loader without a model.

    `waited` are the seconds in which the caller had no batch. `bytes_read` are those that this process and its workers
    read from disk, 0 if all came from the page cache.
    """

    batches: int
    volumes: int
    crops: int
    seconds: float
    waited: float
    bytes_read: int

    def __str__(self) -> str:
        share, read = 100 * self.waited / self.seconds, self.bytes_read / 1e6
        return (
            f"loader alone: {self.batches} batches in {self.seconds:.1f} s; "
            f"{self.volumes / self.seconds:.2f} volumes/s, {self.crops / self.seconds:.1f} crops/s; "
            f"waiting for data {share:.0f} % of the time; {read:.1f} MB read from disk ({read / self.seconds:.1f} MB/s)"
        )


def measure_loader(
    loader: Iterable[Any],
    sizes: Callable[[Any], tuple[int, int]],
    max_batches: int | None = None,
    work: Callable[[Any], None] | None = None,
) -> LoaderSpeed:
    """Iterate over `loader` and return its speed, measured after the first batch, when the workers have started.

    Args:
        sizes: returns the numbers of volumes and crops in a batch.
        max_batches: stop after so many batches.
        work: called with every batch, in place of a training step.
    """
    iterator = iter(loader)
    bar = progress(desc="loader", total=max_batches, unit="batch")
    next(iterator, None)
    workers = [w.pid for w in getattr(iterator, "_workers", ())]
    before, start, waited = disk_bytes(workers), time.perf_counter(), 0.0
    batches = volumes = crops = 0
    while max_batches is None or batches < max_batches:
        began = time.perf_counter()
        batch = next(iterator, None)
        waited += time.perf_counter() - began
        if batch is None:
            break
        batches, (more, cut) = batches + 1, sizes(batch)
        volumes, crops = volumes + more, crops + cut
        if work:
            work(batch)
        bar.update()
    bar.close()
    seconds = max(time.perf_counter() - start, 1e-9)
    return LoaderSpeed(batches, volumes, crops, seconds, waited, max(disk_bytes(workers) - before, 0))


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
        worker_init_fn=_start_worker if workers else None,
    )


def _start_worker(worker: int) -> None:
    torch.set_num_threads(1)
    # these are meant for the training process, which still needs its data
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Return the batch with its tensors on `device`."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
