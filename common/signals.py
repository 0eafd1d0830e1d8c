"""Asked to stop: SIGTERM and SIGUSR1 end a program with an exit code that means "start the same command again".

Every program may be stopped anywhere: its files are whole or not there, and what is done is not done again. So the
signal raises `Requeue` in the main thread wherever that is, as Ctrl-C raises KeyboardInterrupt (`run_program` listens).
Where more is wanted first it is `deferred`: the training loop ends its update and saves
(common/training/preemption.py), and
a program that runs another one waits until that has ended.
"""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

EXIT_REQUEUE = os.EX_TEMPFAIL  # 75, sysexits.h: "temporary failure, the user is invited to retry"
MARKER = "requeue"  # a file in out_dir that says the same where a launcher swallows the code (torchrun ends with 1)
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_OUTSIDE = "outside of training"


class Requeue(SystemExit):
    """The program was asked to stop, and wants to be started again. `agreed`: every rank ends so, after the same
    update."""

    def __init__(self, agreed: bool = False) -> None:
        super().__init__(EXIT_REQUEUE)
        self.agreed = agreed


class _Process:
    """What this process knows; handlers belong to a process, so there is one."""

    received: signal.Signals | None = None  # the first one
    deferred = False
    mark_when_stopped: Path | None = None  # out_dir of a training program
    child: subprocess.Popen | None = None


def install_handlers() -> None:
    """From now on the first signal raises Requeue. Further ones (Slurm's, and then torchrun's) do not: cleaning up goes
    on undisturbed."""
    for number in SIGNALS:
        signal.signal(number, _receive)


def mark_when_stopped(out_dir: Path) -> None:
    """From now on being asked to stop leaves the marker in `out_dir`."""
    _Process.marks = out_dir


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Within the block a signal is noted, for `asked`. The former handlers are put back at its end."""
    former = {number: signal.signal(number, _receive) for number in SIGNALS}
    _Process.received, _Process.deferred = None, True
    try:
        yield
    finally:
        _Process.deferred = False
        for number, handler in former.items():
            signal.signal(number, handler)


def asked() -> bool:
    """Has a signal been noted?"""
    return _Process.deferred and _Process.received is not None


def _receive(number: int, frame: FrameType | None) -> None:
    first = _Process.received is None
    _Process.received = _Process.received or signal.Signals(number)
    if _Process.child is not None:
        _Process.child.send_signal(number)
    if first and not _Process.deferred:
        if _Process.marks is not None:
            with contextlib.suppress(OSError):
                mark_requeue(_Process.marks)
        raise Requeue


def run_child(command: Sequence[str], **kwargs: Any) -> int:
    """The exit code of one of our programs, run with the arguments of subprocess.Popen. A signal is passed on to it,
    which knows what to do; Requeue is raised when it has ended."""
    with deferred(), subprocess.Popen(command, **kwargs) as child:
        _Process.child = child
        try:
            if asked():  # before there was a child
                child.send_signal(_Process.received)
            code = child.wait()
        finally:
            _Process.child = None
        if asked() or code in (EXIT_REQUEUE, *(-number for number in SIGNALS)):  # negative: before it listened
            raise Requeue
    return code


def mark_requeue(out_dir: Path, step: int | None = None) -> None:
    """Leave the marker. `step`: updates that were saved; without it training was not going on, and what an earlier stop
    has saved stays said."""
    marker = out_dir / MARKER
    if step is None and marker.exists():
        marker.touch()
    else:
        out_dir.mkdir(parents=True, exist_ok=True)
        where = _OUTSIDE if step is None else f"after update {step}"
        marker.write_text(f"stopped by a signal {where}; start the same command again\n")


def saved_when_stopped(out_dir: Path) -> bool:
    """Does the marker say that the newest checkpoint in `out_dir` is of the run that was asked to stop?"""
    marker = out_dir / MARKER
    return marker.exists() and _OUTSIDE not in marker.read_text()


def clear_requeue(out_dir: Path) -> None:
    (out_dir / MARKER).unlink(missing_ok=True)
