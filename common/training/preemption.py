"""What the ranks agree on while they train: to stop, and to save."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist

from common import distributed, signals, watchdog
from common.distributed import PATIENCE, Run

T = TypeVar("T")


class Stopped(Exception):
    """Some rank was asked to stop; raised on all of them, at the same place."""


class StopRequests:
    """What the ranks agree on after each update. From here to `close` a signal is noted instead of ending the process.

    Each rank's wishes go into a sum over the ranks on the CPU, begun after one update and read after the next, when it
    has long arrived: no rank waits for the device or for another one, and all act after the same update.
    """

    def __init__(self, run: Run):
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE) if run.world_size > 1 else None
        self._pending: tuple[dist.Work, torch.Tensor] | None = None
        self._deferred = contextlib.ExitStack()
        self._deferred.enter_context(signals.deferred())

    def agree(self, save: bool) -> tuple[bool, bool]:
        """(stop, save): what any rank wished for; all ranks call it after each update."""
        wishes = torch.tensor([signals.asked(), save], dtype=torch.int32)
        if self.group is None:
            return tuple(map(bool, wishes))
        arrived, self._pending = self._pending, (dist.all_reduce(wishes, group=self.group, async_op=True), wishes)
        if arrived is None:
            return False, False
        arrived[0].wait()
        return tuple(map(bool, arrived[1]))

    def close(self) -> None:
        """Wait for what is under way, and put the former handlers back."""
        if self._pending:
            self._pending[0].wait()
            self._pending = None
        self._deferred.close()


def until_stopped(items: Iterable[T], run: Run) -> Iterator[T]:
    """The items of this rank one after another (the cases of a validation); the watchdog is fed at each.

    All ranks go through it, with as many items as each has. A rank that is asked to stop takes no further one, and when
    all have come to the end of theirs, Stopped is raised on every one. (Slurm and torchrun signal all ranks.)
    """
    _stop_together(run)
    for item in items:
        watchdog.feed()
        if signals.asked():
            break
        yield item
    _stop_together(run)


def _stop_together(run: Run) -> None:
    watchdog.feed()
    if distributed.all_reduce_mean(torch.tensor(float(signals.asked()), device=run.device)) > 0:
        raise Stopped
