"""Stop requests: SIGTERM and SIGUSR1 end a program with exit code 75, which means "start the same command again".

By default a signal raises `Requeue` in the main thread, as Ctrl-C raises KeyboardInterrupt. A program can be stopped
anywhere, because every file is either complete or absent and finished work is not repeated. Within `defer_stop` a
signal is only recorded: the training loop finishes its update and saves (common/training/preemption.py), and
`run_child` waits for its child.
"""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

# 75 in sysexits.h: "temporary failure, the user is invited to retry"
EXIT_REQUEUE = os.EX_TEMPFAIL
# A file in out_dir with the same meaning, because torchrun ends with 1 whatever its processes return.
MARKER = "requeue"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_OUTSIDE = "outside of training"


class Requeue(SystemExit):
    """The program was asked to stop and should be started again.

    Args:
        agreed: all ranks stop after the same update.
    """

    def __init__(self, agreed: bool = False) -> None:
        super().__init__(EXIT_REQUEUE)
        self.agreed = agreed


@dataclass
class _State:
    """What the signal handler reads and writes; `received` is the first signal."""

    received: signal.Signals | None = None
    deferred: bool = False
    marker_folder: Path | None = None
    child: subprocess.Popen | None = None


# A process has one handler per signal, hence one state.
_state = _State()


def install_handlers() -> None:
    """Raise Requeue at the first signal from now on. Later ones do not interrupt the cleanup: Slurm sends one, then
    torchrun another."""
    for number in SIGNALS:
        signal.signal(number, _handle)


def write_marker_on_stop(out_dir: Path) -> None:
    """Write the marker into `out_dir` when a signal stops the program from now on."""
    _state.marker_folder = out_dir


@contextlib.contextmanager
def defer_stop() -> Iterator[None]:
    """Record signals within the block instead of raising Requeue; `stop_requested` returns whether there was one.

    The previous handlers are restored at the end of the block.
    """
    previous = {number: signal.signal(number, _handle) for number in SIGNALS}
    _state.received, _state.deferred = None, True
    try:
        yield
    finally:
        _state.deferred = False
        for number, handler in previous.items():
            signal.signal(number, handler)


def stop_requested() -> bool:
    """Return whether a signal was recorded in the current `defer_stop` block; False outside of one."""
    return _state.deferred and _state.received is not None


def _handle(number: int, frame: FrameType | None) -> None:
    is_first = _state.received is None
    _state.received = _state.received or signal.Signals(number)
    if _state.child is not None:
        _state.child.send_signal(number)
    if is_first and not _state.deferred:
        if _state.marker_folder is not None:
            with contextlib.suppress(OSError):
                write_requeue_marker(_state.marker_folder)
        raise Requeue


def run_child(command: Sequence[str], **kwargs: Any) -> int:
    """Run one of this repository's programs, forward signals to it, and return its exit code.

    Args:
        command: program and arguments.
        kwargs: arguments of subprocess.Popen.

    Raises:
        Requeue: after the child has ended, if it or this process was asked to stop.
    """
    with defer_stop(), subprocess.Popen(command, **kwargs) as child:
        _state.child = child
        try:
            # The signal may have come before there was a child.
            if stop_requested():
                child.send_signal(_state.received)
            code = child.wait()
        finally:
            _state.child = None
        # The code is -number if the signal came before the child had installed its handlers.
        if stop_requested() or code in (EXIT_REQUEUE, *(-number for number in SIGNALS)):
            raise Requeue
    return code


def write_requeue_marker(out_dir: Path, step: int | None = None) -> None:
    """Write the marker into `out_dir`.

    Args:
        step: number of updates in the checkpoint that was just saved. None outside of training; a marker that is
            already there then keeps its content, and only its modification time changes.
    """
    marker = out_dir / MARKER
    if step is None and marker.exists():
        marker.touch()
    else:
        out_dir.mkdir(parents=True, exist_ok=True)
        where = _OUTSIDE if step is None else f"after update {step}"
        marker.write_text(f"stopped by a signal {where}; start the same command again\n")


def saved_when_stopped(out_dir: Path) -> bool:
    """Return whether the run in `out_dir` was stopped during training, so that its newest checkpoint is of that run."""
    marker = out_dir / MARKER
    return marker.exists() and _OUTSIDE not in marker.read_text()


def remove_requeue_marker(out_dir: Path) -> None:
    """Remove the marker, if there is one."""
    (out_dir / MARKER).unlink(missing_ok=True)
