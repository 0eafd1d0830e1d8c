"""Work that never ends: the process says where every thread stands, and dies, so that the job can be started again."""

import faulthandler
import sys

_on_watch: "Watchdog | None" = None


class Watchdog:
    """Ends the process (exit code 1, stacks on stderr) unless it is fed again within `minutes`; None: never.

    Watched is whatever lies between two feedings: an update, a window of a validation, the reading of a checkpoint, a
    volume that is preprocessed. faulthandler's own thread holds no interpreter lock, so it also sees a main thread
    stuck in a CUDA or NCCL call.
    """

    def __init__(self, minutes: float | None):
        self.seconds = None if minutes is None else minutes * 60

    def feed(self) -> None:
        global _on_watch
        _on_watch = self
        if self.seconds:
            faulthandler.dump_traceback_later(self.seconds, exit=True, file=sys.__stderr__)

    def rest(self) -> None:
        """Until it is fed again nothing is watched."""
        global _on_watch
        _on_watch = None
        faulthandler.cancel_dump_traceback_later()

    def __enter__(self) -> "Watchdog":
        self.feed()
        return self

    def __exit__(self, *error: object) -> None:
        self.rest()


def feed() -> None:
    """By work that does not know who watches it. Does nothing where nobody does."""
    if _on_watch:
        _on_watch.feed()
