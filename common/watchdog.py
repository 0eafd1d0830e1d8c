"""A timer that ends a process whose work hangs, with a traceback of every thread, so that the job can start again."""

import faulthandler
import sys

_active: "Watchdog | None" = None


class Watchdog:
    """End the process with exit code 1, and print the stack of every thread, unless `reset` is called in time.

    One interval between two resets covers one unit of work: an update, a window of a validation, a checkpoint that is
    read, a volume that is preprocessed. The timer is faulthandler's, which needs no interpreter lock and therefore
    also ends a main thread that hangs in a CUDA or NCCL call.

    Args:
        minutes: time allowed between two resets; None disables the timer.
    """

    def __init__(self, minutes: float | None):
        self.seconds = None if minutes is None else minutes * 60

    def reset(self) -> None:
        """Start the timer, or start it again."""
        global _active
        _active = self
        if self.seconds:
            faulthandler.dump_traceback_later(self.seconds, exit=True, file=sys.__stderr__)

    def stop(self) -> None:
        """Stop the timer until the next reset."""
        global _active
        _active = None
        faulthandler.cancel_dump_traceback_later()

    def __enter__(self) -> "Watchdog":
        self.reset()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()


def reset() -> None:
    """Reset the watchdog that is running, if any. For code that has no reference to it."""
    if _active:
        _active.reset()
