"""How fast is the loader alone? What `--loader_only` of the training programs prints."""

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
    """A loader measured without a model. `waited`: seconds in which the caller had no batch to work on."""

    batches: int
    volumes: int
    crops: int
    seconds: float
    waited: float
    bytes_read: int  # from disk, by this process and its workers; 0 where all came from the page cache

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
    """Go through `loader` (at most `max_batches` batches) and time it.

    `sizes(batch)` -> (volumes, crops) in a batch. `work` stands for what training would do with a batch; without it
    the loader is all there is, and all time is waiting. Time runs from the first batch on: workers have started then.
    """
    iterator = iter(loader)
    bar = progress(desc="loader", total=max_batches, unit="batch")
    next(iterator, None)
    workers = [w.pid for w in getattr(iterator, "_workers", ())]
    before, start, waited = disk_bytes(workers), time.perf_counter(), 0.0
    batches = volumes = crops = 0
    while max_batches is None or batches < max_batches:
        asked = time.perf_counter()
        batch = next(iterator, None)
        waited += time.perf_counter() - asked
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
    """Bytes that this process and `workers` have had read from disk so far; 0 where the system does not tell."""
    total = 0
    for pid in (os.getpid(), *workers):
        try:
            lines = Path(f"/proc/{pid}/io").read_text().splitlines()
        except OSError:  # not Linux, or a worker that has ended
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))
    return total


def build_loader(dataset: Dataset, sampler: StreamSampler, workers: int, device: torch.device) -> DataLoader:
    """Batches of this rank in the order of the stream."""
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
    for number in (signal.SIGTERM, signal.SIGUSR1):  # meant for the training process, which still needs its data
        signal.signal(number, signal.SIG_IGN)


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
