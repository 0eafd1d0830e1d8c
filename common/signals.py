"""Asked to stop: SIGTERM and SIGUSR1 end a run after the update it is at, saved, with an exit code that means "start
me again"."""

import os
import signal
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from common.distributed import PATIENCE, Run

EXIT_REQUEUE = os.EX_TEMPFAIL  # 75, sysexits.h: "temporary failure, the user is invited to retry"
MARKER = (
    "requeue"  # a file in out_dir that says the same where a launcher swallows the code (torchrun always ends with 1)
)
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Requeue(SystemExit):
    """The run was asked to stop, has saved, and wants to be started again."""

    def __init__(self) -> None:
        super().__init__(EXIT_REQUEUE)


class Requests:
    """What the ranks agree on after each update: to stop, and to save.

    Each rank's wishes go into a sum over the ranks on the CPU, begun after one update and read after the next, when it
    has long arrived: no rank waits for the device or for another one, and all act after the same update.
    """

    def __init__(self, run: Run):
        self.received: signal.Signals | None = None
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE) if run.world_size > 1 else None
        self._pending: tuple[dist.Work, torch.Tensor] | None = None
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)

    def agree(self, save: bool) -> tuple[bool, bool]:
        """(stop, save): what any rank wished for; all ranks call it after each update."""
        wishes = torch.tensor([self.received is not None, save], dtype=torch.int32)
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
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def mark_requeue(out_dir: Path, step: int) -> None:
    (out_dir / MARKER).write_text(f"stopped by a signal after update {step}; start the same command again\n")


def clear_requeue(out_dir: Path) -> None:
    (out_dir / MARKER).unlink(missing_ok=True)
