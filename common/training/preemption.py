"""How the ranks agree, while they train, that a run is to be stopped or saved."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist

from common import distributed, signals, watchdog
from common.distributed import TIMEOUT, Run

T = TypeVar("T")


class Stopped(Exception):
    """Some rank received a signal to stop. Raised on all ranks, at the same place."""


class StopRequests:
    """Agreement of the ranks after each update. Until `close` a signal is noted instead of ending the process.

    The requests of all ranks are summed on the CPU. The sum is started after one update and read after the next, when
    it has long arrived: no rank waits for the device or for another rank, and all act after the same update.
    """

    def __init__(self, run: Run):
        self.group = dist.new_group(backend="gloo", timeout=TIMEOUT) if run.world_size > 1 else None
        self._pending: tuple[dist.Work, torch.Tensor] | None = None
        self._deferred = contextlib.ExitStack()
        self._deferred.enter_context(signals.defer_stop())

    def agree(self, save: bool) -> tuple[bool, bool]:
        """Return (stop, save): what any rank requests. All ranks call it after each update."""
        requests = torch.tensor([signals.stop_requested(), save], dtype=torch.int32)
        if self.group is None:
            return tuple(map(bool, requests))
        arrived, self._pending = self._pending, (dist.all_reduce(requests, group=self.group, async_op=True), requests)
        if arrived is None:
            return False, False
        arrived[0].wait()
        return tuple(map(bool, arrived[1]))

    def close(self) -> None:
        """Wait for a pending sum, and restore the former signal handlers."""
        if self._pending:
            self._pending[0].wait()
            self._pending = None
        self._deferred.close()


def until_stopped(items: Iterable[T], run: Run) -> Iterator[T]:
    """Yield the items of this rank (the cases of a validation), resetting the watchdog's timer before each.

    All ranks iterate, each over its own number of items. A rank that receives a signal takes no further item. When all
    ranks are done, and any of them received one, Stopped is raised on all. (Slurm and torchrun signal all ranks.)
    """
    _raise_if_stopped(run)
    for item in items:
        watchdog.reset()
        if signals.stop_requested():
            break
        yield item
    _raise_if_stopped(run)


def _raise_if_stopped(run: Run) -> None:
    watchdog.reset()
    if distributed.all_reduce_mean(torch.tensor(float(signals.stop_requested()), device=run.device)) > 0:
        raise Stopped
