"""Stop requests: SIGTERM and SIGUSR1 end a program with exit code 75, which means "start the same command again".

By default a signal raises `Requeue` in the main thread, as Ctrl-C raises KeyboardInterrupt. A program can be stopped
anywhere, because every file is either complete or absent and finished work is not repeated. Within `defer_stop` a
signal is only recorded: the training loop finishes its update and saves (common/training/preemption.py), and a program
that runs others waits for them (`forward_signals`).
"""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

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
    # sends a signal on to child processes
    forward: Callable[[int], None] | None = None


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
    if _state.forward is not None:
        _state.forward(number)
    if is_first and not _state.deferred:
        if _state.marker_folder is not None:
            with contextlib.suppress(OSError):
                write_requeue_marker(_state.marker_folder)
        raise Requeue


@contextlib.contextmanager
def forward_signals(send: Callable[[int], None]) -> Iterator[None]:
    """Within the block also pass signals, which are recorded as by `defer_stop`, to `send`, which sends them on."""
    with defer_stop():
        _state.forward = send
        try:
            yield
        finally:
            _state.forward = None


def is_stop(code: int) -> bool:
    """Return whether a program that ended with this exit code was asked to stop."""
    # -number if the signal came before it had installed its handlers
    return code in (EXIT_REQUEUE, *(-number for number in SIGNALS))


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
